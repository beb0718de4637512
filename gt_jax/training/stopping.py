"""SIGTERM, as a pod sends it before it takes a machine away, SIGHUP, of a terminal that goes, and Ctrl-C: finish the
step, save, leave."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
    """SIGTERM, SIGHUP or Ctrl-C was heard, and the step is saved: who called must not go on as if all were done."""


class Termination:
    """A context in which SIGTERM, SIGHUP and SIGINT are a wish; `asked(step)` says whether to stop after this step.

    They are one from the first time that is asked: until the first step is compiled and done there is nothing to save,
    and a signal ends the process at once. So does a second SIGINT. On several processes all of them stop after the same
    step, whichever got the signal: JAX's preemption service tells them (it takes SIGTERM itself, the others are sent on
    to it as that). Off the main thread signals are left alone. `interrupted` says whether SIGINT was heard.
    """

    def __init__(self) -> None:
        self._wanted = self._armed = self.interrupted = False
        self._previous: list[tuple[int, object]] = []
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Termination:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous:
            signal.signal(number, previous)  # type: ignore[arg-type]

    def asked(self, step: int) -> bool:
        """Whether this step is to be the last."""
        if not self._armed and threading.current_thread() is threading.main_thread():
            self._armed = True
            self._hear(signal.SIGINT, self._heard_from_keyboard)
            if self._alone:
                self._hear(signal.SIGTERM, self._heard)
            if hasattr(signal, "SIGHUP"):  # not on Windows
                self._hear(signal.SIGHUP, self._heard)
        if not self._alone:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._wanted

    def _hear(self, number: int, handler: object) -> None:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and jobs in the background: they are not meant
            self._previous.append((number, signal.signal(number, handler)))  # type: ignore[arg-type]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def _heard_from_keyboard(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:  # by its default the process ends here, whatever is being written
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\ninterrupted again: leaving at once\n")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.interrupted = True
        self._heard(number, frame)
