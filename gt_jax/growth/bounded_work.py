"""Work in threads with a bound on the bytes it holds, in groups: what follows a group is done after its last task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Group:
    """Tasks that belong together. `done()` runs once, when the group is closed and every task has succeeded."""

    def __init__(self, done: Callable[[], None]) -> None:
        self._done, self._open, self._lock = done, 1, threading.Lock()

    def begin(self) -> None:
        """One more task."""
        with self._lock:
            self._open += 1

    def end(self) -> None:
        """One task has succeeded; the last one runs `done`."""
        with self._lock:
            self._open -= 1
            last = not self._open
        if last:
            self._done()

    close = end  # no task comes any more


class BoundedExecutor:
    """Threads whose tasks hold at most `limit` bytes together, or one task alone holds more.

    The first exception of a task, or of a group's `done`, is raised by the next call; tasks that have not begun by then
    are dropped, and their groups are never done. Leaving the `with` block waits for the others, whatever the reason for
    leaving: what is made is worth keeping.
    """

    def __init__(self, limit: int, threads: int) -> None:
        self._limit, self._held, self._tasks = limit, 0, 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bounded-work")

    def __enter__(self) -> BoundedExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)

    def fits(self, size: int) -> bool:
        """Whether a task of `size` bytes would begin without waiting for others."""
        with self._changed:
            return not self._held or self._held + size <= self._limit

    def submit(self, size: int, task: Callable[[], Any], group: Group | None = None, keep: bool = False) -> Future[Any]:
        """Run `task`, which holds `size` bytes, once there is room for them.

        With `keep` its result still holds them, until `release`. The future is for the result; its exception comes
        from the next call too.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._held or self._held + size <= self._limit)
            self._raise()
            self._held, self._tasks = self._held + size, self._tasks + 1
        if group is not None:
            group.begin()
        return self._pool.submit(self._run, size, task, group, keep)

    def release(self, size: int) -> None:
        """The result of a task that was to `keep` its bytes is gone."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    def wait(self) -> None:
        """Until all tasks are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._tasks)
            self._raise()

    def _run(self, size: int, task: Callable[[], Any], group: Group | None, keep: bool) -> Any:
        try:
            if self._error is None:
                result = task()
                if group is not None:
                    group.end()
                return result
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
            raise
        finally:
            del task  # its bytes are gone before anybody counts on that
            with self._changed:
                self._held, self._tasks = self._held - (0 if keep else size), self._tasks - 1
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
