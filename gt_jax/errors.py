"""The one exception for what the user can mend, and the shell every command runs in.

Exit codes: 0 done, 1 failed, 2 wrong arguments or refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class Refused(ValueError):
    """The request cannot be carried out as given; the message says what would be right.

    Nothing has been written when it is raised. Commands print it on stderr and exit 2.
    """


class Failed(RuntimeError):
    """The work was begun and cannot be finished; the message says what happened. Commands print it and exit 1."""


def refuse_all(problems: Sequence[str], heading: str) -> None:
    """Raise one `Refused` that lists every problem, or return when there is none."""
    if problems:
        raise Refused(f"{heading}\n" + "\n".join(f"  - {problem}" for problem in problems))


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main(argv)` and leave the process with its exit code.

    `Refused` becomes a message on stderr and exit code 2; `Failed`, a full disk or another error of the operating
    system one line and exit code 1. Other exceptions keep their traceback (they are bugs) and exit 1.
    """
    try:
        code = main(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except (Failed, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
