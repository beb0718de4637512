"""The one exception for what the user can mend, and the shell every command runs in.

Exit codes: 0 done, 1 failed, 2 wrong arguments or refused.

A terminal may have another encoding than UTF-8, and a pipe may be closed: what it cannot show is escaped, and what is
said along the way (`say`) ends nothing when nobody listens.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import io
import os
import re
import resource
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

INTERRUPTED = 130  # as a shell has it for a program that Ctrl-C ended
_MOMENT = 0.02  # seconds
ROOM = 4 << 30  # bytes of address space: a training of a small model asks for some 2 GiB


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


@functools.cache
def say_once(line: str) -> None:
    """`say`, but a line that was said before is not said again."""
    say(line)


def say(line: str) -> None:
    """A line on standard error; nothing where that is closed, or a terminal that has gone: work goes on."""
    if sys.stderr is not None:  # closed before the start: `print` would take standard output, where results go
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def deliver(text: str, files: Mapping[str, Callable[[], object]] | None = None) -> None:
    """Print a command's result, then write its `files`, by the name that an error has: each whatever befalls another.

    Raises the error of standard output, or `Failed` that lists the files that could not be written and why.
    """
    failed: list[str] = []
    closed: OSError | None = None
    try:
        print(text, flush=True)
    except BrokenPipeError as error:  # the files are not lost for that
        closed = error
    except OSError as error:  # a full disk, say
        _leave(sys.stdout)
        closed = OSError(error.errno, error.strerror, "standard output")
    for name, write in (files or {}).items():
        try:
            write()
        except Exception as error:  # noqa: BLE001 - of a library that draws, any; all are raised below
            failed.append(f"{name} could not be written ({first_line(error)})")
    if failed:
        where = "the result itself is on standard output" if closed is None else f"nor standard output ({closed})"
        raise Failed("; ".join([*failed, where])) from closed
    if closed is not None:
        raise closed


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its words that is not blank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _say_no_more() -> None:
    """Leave the interpreter's end silent: libraries print there, a stack each, what became of work given up."""
    sys.unraisablehook = lambda unraisable: None
    warnings.simplefilter("ignore")


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main(argv)` and leave the process with its exit code.

    `Refused` becomes a message on stderr and exit code 2; `Failed`, a full disk, too little memory or another
    error of the operating system one line and exit code 1. Other exceptions keep their traceback (they are bugs) and
    exit 1.
    """
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # ascii, a Windows code page, or names of files that are no UTF-8
            stream.reconfigure(errors="backslashreplace")
    _say_little_room()
    try:
        with _no_interrupt_lost():
            code = main(argv)
        if sys.stdout is not None:
            _flush_output()  # a closed pipe shows here, not in the interpreter's shutdown
    except BrokenPipeError:
        _leave(sys.stdout)
        code = 1
    except (Refused, Failed, OSError, KeyboardInterrupt) as error:
        code = say_error(error)
        if isinstance(error, OSError):
            _say_no_more()
    except Exception as error:
        if not (_lacks_memory(error) or _comes_of_interrupt(error) or _is_of_settings(error)):
            raise
        code = say_error(error)
    try:
        if sys.stderr is not None:
            sys.stderr.flush()  # what `say` could not write is still in it, and would make the exit code 120
    except (OSError, ValueError):
        _leave(sys.stderr)
    if code == INTERRUPTED:
        _end_at_once(code)
    sys.exit(code)


def _say_little_room() -> None:
    """Say where `ulimit -v` may end the process: XLA aborts where it gets no address space, with no word of ours."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < ROOM:
        say(f"note: this process may have {limit / 2**30:.2g} GiB of address space (ulimit -v); JAX asks for more than "
            "it uses, and where it gets none the process is aborted")  # fmt: skip


def _fill_closed_streams() -> None:
    """Give the descriptors 0 to 2 that were closed before the start to nothing.

    The next file that is opened would get them, and in it would stand what a library, which knows these three by their
    numbers alone, writes for the user's eyes: a lock would be none any more.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Ctrl-C again where Python ignores what is raised: JAX has a callback in each collection of garbage."""
    hook, again = sys.unraisablehook, list[threading.Timer]()

    def heed(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        again.append(threading.Timer(_MOMENT, _thread.interrupt_main))  # not from here, where it would be ignored too
        again[-1].daemon = True
        again[-1].start()

    sys.unraisablehook = heed
    try:
        yield
        if any(one.is_alive() for one in again):
            raise KeyboardInterrupt
    finally:
        for one in again:
            one.cancel()
        sys.unraisablehook = hook


def say_error(error: BaseException) -> int:
    """Tell on standard error what ended the work; returns the exit code."""
    if isinstance(error, KeyboardInterrupt) or _comes_of_interrupt(error):
        say("interrupted")
        return INTERRUPTED
    if isinstance(error, (Refused, Failed, OSError)):
        gone = "; the folder that this was started in is gone: change to one that exists" if (
            isinstance(error, FileNotFoundError) and _folder_is_gone()) else ""  # fmt: skip
        say(f"{'refused' if isinstance(error, Refused) else 'failed'}: {error}{gone}")
        return 2 if isinstance(error, Refused) else 1
    if _lacks_memory(error):
        say(f"failed: not enough memory ({first_line(error)}); take fewer or shorter rows, or --accumulate in training")
        return 1
    if _is_of_settings(error):
        say(f"refused: JAX cannot be set up as the environment says: {first_line(error).partition(': ')[2]}")
        return 2
    say("".join(traceback.format_exception(error)).rstrip())
    return 1


def _folder_is_gone() -> bool:
    """Whether no relative path can be found, since the current folder was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _flush_output() -> None:
    """Raise what happens, a full disk say, with the name of the stream; what is left in it goes nowhere then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave(sys.stdout)
        raise OSError(error.errno, error.strerror, "standard output") from error


def _end_at_once(code: int) -> None:
    """Leave without the interpreter's shutdown: in that XLA crashes when it was interrupted while compiling."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: there is no such stream
            stream.flush()
    os._exit(code)


def _comes_of_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is what raised it: a library that is being loaded, or calls back, makes an error of its own."""
    seen: BaseException | None = error
    for _ in range(100):  # a chain may be a ring
        if seen is None or isinstance(seen, KeyboardInterrupt):
            break
        seen = seen.__cause__ or seen.__context__
    return isinstance(seen, KeyboardInterrupt)


def _lacks_memory(error: BaseException) -> bool:
    """Whether it is Python's or NumPy's error of that kind, or XLA's or the loader's, which words alone tell."""
    words = f"{error}"[-200:] if isinstance(error, ImportError) else f"{error}"[:200]
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words or "failed to map segment" in words


def _is_of_settings(error: BaseException) -> bool:
    """Whether it is JAX's, of a JAX_PLATFORMS or another of its variables in the environment; words alone tell."""
    said = r"Unable to initialize backend|[Ii]nvalid (truth )?value .* for (environment|JAX flag) "
    return isinstance(error, (RuntimeError, ValueError)) and re.match(said, str(error)) is not None


def _leave(stream: TextIO | None) -> None:
    """What a closed pipe or a full disk left in a stream goes nowhere: else the interpreter fails on it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: there is no such stream
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
    os.close(nowhere)
