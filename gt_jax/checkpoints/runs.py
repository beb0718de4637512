"""The checkpoints of one training run: RUN/<step>/, the newest few, written beside the training."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.checkpoint import on_primary
from gt_jax.checkpoints.checksums import changed_bytes, checked_files
from gt_jax.checkpoints.folders import (
    Damaged,
    StrPath,
    damage,
    prepare_parent,
    resolve,
    set_aside,
    step_folders,
)
from gt_jax.checkpoints.leftovers import clear_steps, forget
from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Refused, say

T = TypeVar("T")


class RunCheckpoints:
    """The steps of one run, RUN/<step>/, the newest `keep` of them, and those named in `always`.

    An older step goes only after a newer one is complete and on the disk; what killed saves left behind is ignored and
    cleared away by the next save. What cannot be removed stays, and no save is lost for it. `warn`, which may be set
    anew, hears of that once, and of damaged steps. The caller holds the run's lock.
    """

    def __init__(
        self, root: StrPath, keep: int = 2, warn: Callable[[str], None] | None = None, always: Collection[int] = (),
    ) -> None:  # fmt: skip
        if keep < 1:
            raise Refused(f"keep is {keep}; at least one checkpoint must stay")
        self.root = Path(os.path.abspath(root))
        self.keep, self.always = keep, frozenset(always)
        self.warn = warn or (lambda message: None)
        self._staying: set[str] = set()  # the steps of which it was said
        self._writing: checkpoint.Writing | None = None

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
        """Write RUN/<step>, then forget the steps that are too old; raises as `checkpoint.save` does."""
        self.save_beside(step, tree, metadata)
        self.wait()

    def save_beside(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
        """`save` that writes beside the caller; what goes wrong in writing is raised by the next save or by `wait`."""
        self.wait()
        prepare_parent(self.root / str(step), of_run=True)
        on_primary(functools.partial(clear_steps, self.root, self._stays))
        self._writing = checkpoint.save_async(self.root / str(step), tree, {**metadata, "step": step})

    def wait(self) -> None:
        """Until nothing is being written; then the steps that are too old go."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing()
            on_primary(self._forget_old)

    def leave(self) -> None:
        """Until this process writes nothing any more, where an error ends it: the others may not come to a meeting."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.join()
            for error in writing.errors:
                say(f"the step that was being saved is not there: {error}")

    def steps(self) -> list[int]:
        """The complete steps, oldest first."""
        if not self.root.is_dir():
            return []
        return [step for step, folder in sorted(step_folders(self.root).items()) if damage(folder) is None]

    def latest(self) -> int | None:
        """The newest complete step; damaged newer ones are named to `warn`."""
        if not self.root.is_dir() or not step_folders(self.root):
            return None
        return int(resolve(self.root, self.warn).name)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(tree, metadata) of one step; raises `Damaged` when it cannot be read, `Refused` when it does not fit.

        Every byte is compared with what was written. On several processes each compares a share, and all raise alike.
        """
        folder, group = self.root / str(step), ProcessGroup()
        self._together(group, lambda: _refuse_changed(folder, group))
        return self._together(group, lambda: (
            checkpoint.load(folder, abstract, compare=False), checkpoint.describe(folder)[1]))

    def restore_latest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, tree, metadata) of the newest step whose values can be read, None for a run without steps.

        Newer steps that cannot be read are named to `warn` and set aside as RUN/<step>.damaged, so that the run can
        write those steps again. Raises `Damaged` when steps are there and none is readable; then all stay.
        """
        folders = step_folders(self.root) if self.root.is_dir() else {}
        if not folders:
            return None
        problems: dict[int, str] = {}
        for step in sorted(folders, reverse=True):
            try:
                found = step, *self.restore(step, abstract)
            except Damaged as error:
                problems[step] = str(error)
                continue
            for damaged, problem in problems.items():
                on_primary(functools.partial(self._set_aside, folders[damaged], problem, step))
            return found
        raise Damaged("\n".join([f"no step of the run {self.root} can be read:", *problems.values()]))

    def _set_aside(self, folder: Path, problem: str, used: int) -> None:
        self.warn(f"{problem}; set aside as {set_aside(folder)}, step {used} is used")

    @staticmethod
    def _together(group: ProcessGroup, work: Callable[[], T]) -> T:
        """`work()`, or in every process the `Damaged` that one of them raised."""
        result, problem = None, None
        try:
            result = work()
        except Damaged as error:
            problem = str(error)
        found = [one for one in group.gather(problem) if one is not None]
        if found:
            raise Damaged(found[0])
        return result  # type: ignore[return-value]

    def _forget_old(self) -> None:
        complete = []
        for step, folder in sorted(step_folders(self.root).items()):
            with self._or_stays(folder):
                complete += [(step, folder)] if damage(folder) is None else []
        for step, folder in complete[: -self.keep]:
            if step in self.always:
                continue
            with self._or_stays(folder):
                forget(folder, functools.partial(self._kept, folder))

    @contextlib.contextmanager
    def _or_stays(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stays(folder, error)

    def _stays(self, folder: Path, error: OSError) -> None:
        step = folder.name.partition(".")[0]
        if step not in self._staying:
            self._staying.add(step)
            self.warn(f"{folder} cannot be removed ({error}); what is left of it stays, and the run goes on")

    def _kept(self, folder: Path, place: Path) -> None:
        self.warn(f"{folder} is removed, as it is too old; what the run has not saved there is in {place}")


def _refuse_changed(folder: Path, group: ProcessGroup) -> None:
    """Raise `Damaged` where files are missing, or hold other bytes than were written; a process reads its share."""
    problem = damage(folder)
    if problem is None:
        problem = changed_bytes(folder, group.share(checked_files(folder)))
    if problem is not None:
        raise Damaged(f"checkpoint {folder} is not usable: {problem}")
