"""What is renamed is on the disk first, an older step goes last, and only leftovers of its own kind are cleared."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint, leftovers
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.folders import publish, resolve, set_aside, step_folders
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.configs import presets
from gt_jax.configs.run import RunConfig
from gt_jax.configs.tokenizer_file import NAMES
from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Refused
from gt_jax.files import unfinished_name, write_atomically
from gt_jax.training.run_directory import config_to_train

TREE = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}
METADATA: dict[str, Any] = {"config": {}, "kind": "train"}


class Recorder:
    """("sync", path) and ("rename", from, to) and ("delete", path), in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, ...]] = []
        fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

        def synced(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            fsync(descriptor)
            self.events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

        def renamed(source: Any, target: Any, **options: Any) -> None:
            rename(source, target, **options)
            self.events.append(("rename", os.fspath(source), os.fspath(target)))

        def replaced(source: Any, target: Any) -> None:
            replace(source, target)
            self.events.append(("rename", os.fspath(source), os.fspath(target)))

        def deleted(folder: Any, *rest: Any, **options: Any) -> None:
            if os.path.isdir(folder):
                self.events.append(("delete", os.fspath(folder)))
            rmtree(folder, *rest, **options)

        for module, name, made in ((os, "fsync", synced), (os, "rename", renamed), (os, "replace", replaced),
                                   (shutil, "rmtree", deleted)):
            monkeypatch.setattr(module, name, made)

    def assert_durable(self, target: Path) -> int:
        """Every file and folder below `target` was synced, by its name before, then renamed; returns the end of it."""
        unfinished = f"{target}.unfinished"
        rename = self.events.index(("rename", unfinished, str(target)))
        synced = {event[1] for event in self.events[:rename] if event[0] == "sync"}
        below = [unfinished, *(f"{unfinished}/{path.relative_to(target)}" for path in target.rglob("*"))]
        assert not [path for path in below if path not in synced]
        return self.events.index(("sync", str(target.parent)), rename)


def test_all_that_a_save_renames_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    checkpoint.save(tmp_path / "model", TREE, METADATA)
    recorder.assert_durable(tmp_path / "model")
    assert (tmp_path / "model" / "commit_success.txt").exists()  # what Orbax writes without a sync is among them


def test_the_older_step_goes_when_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunCheckpoints(tmp_path / "run", keep=1)
    run.save(1, TREE, METADATA)
    recorder = Recorder(monkeypatch)
    run.save(2, TREE, METADATA)
    durable = recorder.assert_durable(run.root / "2")
    assert recorder.events.index(("rename", str(run.root / "1"), str(run.root / "1.unfinished"))) > durable
    assert recorder.events.index(("delete", str(run.root / "1.unfinished"))) > durable
    assert run.steps() == [2]


def test_folders_that_are_made_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    checkpoint.save(tmp_path / "a" / "b" / "model", TREE, METADATA)
    assert {("sync", str(tmp_path)), ("sync", str(tmp_path / "a")), ("sync", str(tmp_path / "a" / "b"))} <= {
        *recorder.events}


def test_small_files_are_on_the_disk_before_they_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, file = Recorder(monkeypatch), tmp_path / "config.json"
    write_atomically(file, "{}")
    unfinished = str(unfinished_name(file))
    assert recorder.events == [("sync", unfinished), ("rename", unfinished, str(file)), ("sync", str(tmp_path))]


def somebody(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "chapter1.txt").write_text("months of work")


def growth(folder: Path) -> None:
    (folder / "state").mkdir(parents=True)
    (folder / "journal.0.jsonl").write_text(json.dumps({"identity": {}}) + "\n")


def whole_growth(folder: Path) -> None:
    array = ArrayFiles.of(folder / "state", "params/w", (3,), np.dtype(np.float32))
    array.create()
    array.write(0, np.zeros(3, np.float32))
    checkpoint.write_metadata(folder, ["params/w"], {"config": {}, "kind": "grown", "grown_from": {}})


def link(folder: Path) -> None:
    somebody(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def file(folder: Path) -> None:
    folder.write_text("mine")


@pytest.mark.parametrize("what", [somebody, growth, whole_growth, link, file])
@pytest.mark.parametrize("ending", ["", ".orbax-checkpoint-tmp"])
def test_a_save_clears_nothing_that_no_save_has_written(tmp_path: Path, what: Any, ending: str) -> None:
    place = tmp_path / f"model.unfinished{ending}"
    what(place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused, match=r"model\.unfinished.* is .*the save of model needs that name"):
        checkpoint.save(tmp_path / "model", TREE, METADATA)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_clears_what_a_killed_save_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "other", TREE, METADATA)
    shutil.copytree(tmp_path / "other", tmp_path / "model.unfinished.orbax-checkpoint-tmp")
    (tmp_path / "other" / "files.json").unlink()
    (tmp_path / "other").rename(tmp_path / "model.unfinished")
    checkpoint.save(tmp_path / "model", TREE, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_clears_its_own_steps_and_nothing_else(tmp_path: Path) -> None:
    somebody(tmp_path / "thesis.unfinished")
    (tmp_path / "todo.unfinished.md").write_text("a file")
    growth(tmp_path / "6.unfinished")
    (tmp_path / "7.unfinished").mkdir()
    RunCheckpoints(tmp_path).save(8, TREE, METADATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "6.unfinished", "8", "thesis.unfinished", "todo.unfinished.md"]
    assert (tmp_path / "thesis.unfinished" / "chapter1.txt").read_text() == "months of work"


def test_what_has_the_name_of_a_step_that_goes_keeps_it_and_ends_nothing(tmp_path: Path) -> None:
    """8.unfinished of the user is in the way of forgetting step 8: the step stays too, and the run goes on."""
    run = RunCheckpoints(tmp_path, keep=1)
    run.save(8, TREE, METADATA)
    somebody(tmp_path / "8.unfinished")
    run.save(9, TREE, METADATA)
    assert run.steps() == [8, 9] and (tmp_path / "8.unfinished" / "chapter1.txt").exists()


def test_an_old_step_that_cannot_be_removed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that was due next was not saved, nor any after a resume."""
    warned: list[str] = []
    run = RunCheckpoints(tmp_path, keep=1, warn=warned.append)
    run.save(8, TREE, METADATA)
    for killed in ("7.unfinished", "9.unfinished"):  # the second has the name that is needed next
        (tmp_path / killed).mkdir()

    def denied(folder: Any, *rest: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", denied)
        run.save(9, TREE, METADATA)
        run.save(10, TREE, METADATA)
        assert run.steps() == [8, 9, 10], "nothing was removed of it, so it is a step as before"
    assert [line.split(" cannot be removed (")[0] for line in warned] == [
        str(tmp_path / name) for name in ("7.unfinished.damaged", "9.unfinished.damaged", "8")]
    assert f"Permission denied: '{tmp_path / '8.unfinished'}'" in warned[2]
    run.save(11, TREE, METADATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11", "7.unfinished.damaged", "9.unfinished.damaged"]
    assert len(warned) == 3


def test_of_a_step_that_is_a_link_the_link_goes(tmp_path: Path) -> None:
    """It was moved to another disk. Its tokenizer was deleted there, and the run ended."""
    warned: list[str] = []
    run = RunCheckpoints(tmp_path / "run", keep=1, warn=warned.append)
    run.save(8, TREE, METADATA)
    (run.root / "8").rename(tmp_path / "moved")
    (run.root / "8").symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / "tokenizer.json").touch()
    before = sorted(tmp_path.glob("moved/**/*"))
    run.save(9, TREE, METADATA)
    assert [path.name for path in run.root.iterdir()] == ["9"] and not warned
    assert sorted(tmp_path.glob("moved/**/*")) == before


def test_what_a_user_put_into_a_step_stays_when_that_goes(tmp_path: Path) -> None:
    warned: list[str] = []
    run = RunCheckpoints(tmp_path, keep=1, warn=warned.append)
    run.save(8, TREE, METADATA)
    (tmp_path / "8" / "state" / "notes").mkdir()
    (tmp_path / "8" / "state" / "notes" / "a.txt").write_text("mine")
    (tmp_path / "8" / "report.html").write_text("mine too")
    (tmp_path / "8" / "all").symlink_to(tmp_path)
    run.save(9, TREE, METADATA)
    kept = tmp_path / "8.kept"
    said = f"{tmp_path / '8'} is removed, as it is too old; what the run has not saved there is in {kept}"
    assert warned == [said]
    assert {str(path.relative_to(kept)) for path in kept.rglob("*")} == {
        "state", "state/notes", "state/notes/a.txt", "report.html", "all"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8.kept", "9"] and run.steps() == [9]
    RunCheckpoints(tmp_path, keep=2).save(8, TREE, METADATA)
    assert run.steps() == [8, 9], "it is in the way of no save"
    with pytest.raises(Refused):
        resolve(kept)


def test_a_folder_of_the_user_named_by_a_number_is_no_step(tmp_path: Path) -> None:
    """The notes of a year were renamed as a damaged checkpoint."""
    somebody(tmp_path / "2024")
    warned: list[str] = []
    run = RunCheckpoints(tmp_path, keep=1, warn=warned.append)
    assert run.restore_latest(TREE) is None and run.latest() is None
    run.save(8, TREE, METADATA)
    found = run.restore_latest(TREE)
    assert found is not None and found[0] == run.latest() == 8 and not warned
    (tmp_path / "9").mkdir()  # of an interrupted copy
    assert run.latest() == 8 and "step 9 in" in warned[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2024", "8", "9"]


def test_a_copy_of_a_step_under_another_number_is_no_step(tmp_path: Path) -> None:
    """It was taken for the step itself: removed as too old, or the step's own folder was set aside."""
    run = RunCheckpoints(tmp_path, keep=1)
    run.save(8, TREE, METADATA)
    for copy in ("08", "\u0668"):  # the second is 8 in Arabic digits
        shutil.copytree(tmp_path / "8", tmp_path / copy)
    shutil.copytree(tmp_path / "8", tmp_path / "07.unfinished")
    assert step_folders(tmp_path) == {8: tmp_path / "8"}
    run.save(9, TREE, METADATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["07.unfinished", "08", "9", "\u0668"]
    leftovers.refuse_taken_names(tmp_path, 9, 20)
    shutil.rmtree(tmp_path / "9")  # nothing is begun anew beside a step that was renamed
    with pytest.raises(Refused, match=r"08 is a checkpoint, and no step .* name it 8;"):
        leftovers.refuse_taken_names(tmp_path, 0, 20)


def test_a_process_that_an_error_ends_writes_its_save_to_the_end_and_meets_nobody(tmp_path: Path, monkeypatch) -> None:
    """The others may never come: it hung there, and nobody was told."""
    run = RunCheckpoints(tmp_path, keep=1)
    run.save(8, TREE, METADATA)
    run.save_beside(9, TREE, METADATA)
    monkeypatch.setattr(ProcessGroup, "agree", lambda *_: pytest.fail("waits for processes that have left"))
    run.leave()
    monkeypatch.undo()
    assert run.steps() == [8, 9]


def test_names_that_are_taken_are_refused_before_training(tmp_path: Path) -> None:
    somebody(tmp_path / "7.unfinished")
    growth(tmp_path / "6.unfinished")
    (tmp_path / "5.unfinished").mkdir()  # of a killed save
    (tmp_path / "8").write_text("notes of the eighth")
    somebody(tmp_path / "9")
    (tmp_path / "10" / "state").mkdir(parents=True)  # of a step, and would be set aside
    with pytest.raises(Refused) as refused:
        leftovers.refuse_taken_names(tmp_path, 4, 20)
    assert [line.split()[1].rsplit("/", 1)[1] for line in str(refused.value).splitlines()[1:]] == [
        "6.unfinished", "7.unfinished", "8", "9"]
    leftovers.refuse_taken_names(tmp_path, 9, 20)  # steps that are done need no name
    leftovers.refuse_taken_names(tmp_path, 4, 5)


def test_a_damaged_step_is_set_aside_beside_the_earlier_one(tmp_path: Path) -> None:
    for name in ("8", "8.damaged", "8.damaged2"):
        somebody(tmp_path / name)
    assert set_aside(tmp_path / "8") == tmp_path / "8.damaged3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8.damaged", "8.damaged2", "8.damaged3"]


def test_a_run_leaves_a_step_that_another_job_writes(tmp_path: Path) -> None:
    """`calibrate` to RUN/9, or a growth that has just begun there, looks like what a killed save left."""
    with only_writer(tmp_path / "9"):
        (tmp_path / "9.unfinished").mkdir()
        run = RunCheckpoints(tmp_path)
        run.save(8, TREE, METADATA)
        assert (tmp_path / "9.unfinished").is_dir()
        with pytest.raises(Refused, match=r"another process is writing .*9 at this moment"):
            run.save(9, TREE, METADATA)
        assert (tmp_path / "9.unfinished").is_dir() and run.steps() == [8]


@pytest.mark.parametrize("ending", [".unfinished", ".converting", ".orbax-checkpoint-tmp"])
def test_nothing_is_named_as_what_is_not_finished(tmp_path: Path, ending: str) -> None:
    """A save to `model` cleared a whole checkpoint that had been saved as `model.unfinished`."""
    with pytest.raises(Refused, match=f"ends in {ending}, .*choose another name"):
        checkpoint.save(tmp_path / f"model{ending}", TREE, METADATA)
    with pytest.raises(Refused, match=f"ends in {ending}"):
        config_to_train(tmp_path / f"run{ending}", RunConfig(model=presets.tiny()), resume=False)
    assert not any(tmp_path.iterdir())


def test_leftovers_are_told_by_what_is_in_them(tmp_path: Path) -> None:
    for what, kind in ((somebody, None), (growth, leftovers.GROWTH), (whole_growth, leftovers.ARRAYS)):
        what(tmp_path / what.__name__)
        assert leftovers.kind_of(tmp_path / what.__name__) == kind
    checkpoint.save(tmp_path / "saved", TREE, METADATA)
    assert leftovers.kind_of(tmp_path / "saved") == leftovers.SAVE
    for name in NAMES:  # what a save killed late has too, but alone may be anybody's
        (tmp_path / "saved" / name).touch()
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        assert leftovers.kind_of(tmp_path / name) is None
    assert leftovers.kind_of(tmp_path / "saved") == leftovers.SAVE
    shutil.copytree(tmp_path / "saved", tmp_path / "7.unfinished")
    leftovers.refuse_taken_names(tmp_path, 0, 9)
    leftovers.clear_steps(tmp_path, pytest.fail)
    assert not (tmp_path / "7.unfinished").exists()
    (tmp_path / "begun" / "state").mkdir(parents=True)
    assert leftovers.kind_of(tmp_path / "begun") == leftovers.EMPTY


def test_publish_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what is written value by value: conversions."""
    whole_growth(tmp_path / "made.unfinished")
    recorder = Recorder(monkeypatch)
    publish(tmp_path / "made.unfinished", tmp_path / "made")
    recorder.assert_durable(tmp_path / "made")
