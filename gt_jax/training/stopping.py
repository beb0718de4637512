"""SIGTERM, as a pod sends it before it takes a machine away: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class Termination:
    """A context in which SIGTERM is a wish; `asked(step)` says whether to stop after this step.

    It is one from the first time that is asked: until the first step is compiled and done there is nothing to save, and
    the signal ends the process at once. On several processes all of them stop after the same step, whichever got the
    signal: JAX's preemption service tells them (it takes the signal itself). Off the main thread signals are left
    alone.
    """

    def __init__(self) -> None:
        self._wanted = self._armed = False
        self._previous: object = None
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Termination:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._armed:
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]

    def asked(self, step: int) -> bool:
        """Whether this step is to be the last."""
        if not self._alone:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        if not self._armed and threading.current_thread() is threading.main_thread():
            self._previous, self._armed = signal.signal(signal.SIGTERM, self._heard), True
        return self._wanted

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
