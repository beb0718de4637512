"""Write-behind: tasks run in threads while the caller makes the next value, with a bound on the bytes that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

_THREADS = 3  # while one waits for the disk, another hands over the next bytes


class WriteBehind:
    """Tasks in threads; together they hold at most `limit` bytes, or one task alone holds more.

    The first exception of a task is raised by the next call; tasks that have not begun by then are dropped. Leaving the
    `with` block waits for the others, whatever the reason for leaving: what is made is worth keeping.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._tasks = limit, 0, 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="write-behind")

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)

    def submit(self, size: int, task: Callable[[], None]) -> None:
        """Run `task`, which holds `size` bytes, once there is room for them."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._held or self._held + size <= self._limit)
            self._raise()
            self._held, self._tasks = self._held + size, self._tasks + 1
        self._pool.submit(self._run, size, task)

    def wait(self) -> None:
        """Until all tasks are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._tasks)
            self._raise()

    def _run(self, size: int, task: Callable[[], None]) -> None:
        try:
            if self._error is None:
                task()
        except BaseException as error:  # noqa: BLE001 - the caller's next call raises it
            with self._changed:
                self._error = self._error or error
        finally:
            del task  # its bytes are gone before anybody counts on that
            with self._changed:
                self._held, self._tasks = self._held - size, self._tasks - 1
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Countdown:
    """Calls `done()` when `finish` has been called and every task that was begun has ended."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done, self._open, self._lock = done, 1, threading.Lock()

    def begin(self) -> None:
        """One more task."""
        with self._lock:
            self._open += 1

    def end(self) -> None:
        """One task has ended; the last one runs `done`."""
        with self._lock:
            self._open -= 1
            last = not self._open
        if last:
            self._done()

    finish = end
