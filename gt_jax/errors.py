"""The one exception for what the user can mend, and the shell every command runs in.

Exit codes: 0 done, 1 failed, 2 wrong arguments or refused.
"""

from __future__ import annotations

import sys
import traceback
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
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except (Refused, Failed, OSError, KeyboardInterrupt) as error:
        code = say(error)
    sys.exit(code)


def say(error: BaseException) -> int:
    """Print on stderr what ended the work; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, (Refused, Failed, OSError)):
        print(f"{'refused' if isinstance(error, Refused) else 'failed'}: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    traceback.print_exception(error)
    return 1
