"""Units of a study: found again, refused to another, made by workers that may die; the stored file's form."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import (
    contract,
    early_exit,
    growth_context,
    growth_operators,
    growth_pays,
    mixed_depth,
    recall_hybrids,
    residual_lambdas,
    study_command,
    text_gates,
    workers,
)
from experiments.exit_study import run
from experiments.exit_study.study import at_scale
from experiments.exit_study.train import content
from experiments.lambda_study.study import LambdaStudy
from experiments.recall_study import machine
from experiments.units import Units, check_same
from experiments.workers import Workers
from gt_jax.checkpoints.lock import only_writer
from gt_jax.configs.json_config import Config
from gt_jax.errors import Failed, Refused
from gt_jax.files import unfinished_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Config):
    text: tuple[str, ...] = ("a/stories.txt",)
    seeds: tuple[int, ...] = (0, 1)
    width: int = 8


def unit(folder: Path, argument: tuple[str, int]) -> dict[str, object]:
    """What a worker makes: its process and its cores; some die at their first try, some fail."""
    fate, number = argument
    tried = folder / f"{fate}{number}"
    if fate == "dies" and not tried.exists():
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "fails":
        raise ValueError(f"number {number} is odd")
    return {"number": number, "process": os.getpid(), "cores": len(os.sched_getaffinity(0))}


def test_a_unit_is_made_once_and_found_by_the_same_study_alone(tmp_path):
    made = []

    def make() -> dict[str, object]:
        made.append(1)
        return {"loss": (1, 2)}

    (tmp_path / "work").mkdir()
    unfinished_name(tmp_path / "work" / "study.json").touch()  # what a kill leaves
    units = Units(tmp_path / "work", Study(), "hash")
    assert units.found("seed0/Dense at 0.003") is None
    assert units.unit("seed0/Dense at 0.003", make) == ({"loss": [1, 2]}, False)
    moved = Units(tmp_path / "work", Study(text=("b/stories.txt",)), "hash")  # the same text, elsewhere
    assert moved.unit("seed0/Dense at 0.003", make) == ({"loss": [1, 2]}, True) and made == [1]
    assert (tmp_path / "work" / "seed0" / "dense-at-0.003.json").exists()
    (tmp_path / "work" / "seconds.json").write_text('{"seconds": 60.0}')
    assert 60 <= Units(tmp_path / "work", Study(), "hash").seconds < 70  # of the calls before, too
    with pytest.raises(Refused, match=r"(?s)seeds: \(0, 1\) and \(2,\).*width: 8 and 16"):
        Units(tmp_path / "work", Study(seeds=(2,), width=16), "hash")
    with pytest.raises(Refused, match="the text's content: 'hash' and 'other'"):
        Units(tmp_path / "work", Study(), "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(Refused, match="exists and is not this study's"):
        Units(tmp_path / "mine", Study(), "hash")


def test_workers_make_what_is_missing_on_a_core_each_also_after_one_was_killed(tmp_path):
    units, said = Units(tmp_path / "work", Study(), "hash"), []
    units.keep("unit 0", {"number": 0, "process": 0})
    make = functools.partial(unit, tmp_path)
    with Workers(units, make, jobs=2, say=said.append) as pool:
        found = pool.all({f"unit {n}": ("dies" if n == 2 else "lives", n) for n in range(4)})
        assert [one["number"] for one in found.values()] == [0, 1, 2, 3] and found["unit 0"]["process"] == 0
        assert os.getpid() not in {one["process"] for one in found.values()}
        assert {one["cores"] for one in found.values() if one["process"]} == {1}
        assert sum("unit 2: its worker ended with -9; the unit is made again" in line for line in said) == 1
        with pytest.raises(Failed, match=r"unit 5: ValueError: number 5 is odd"):
            pool.all({"unit 5": ("fails", 5)})
    assert Units(tmp_path / "work", Study(), "hash").found("unit 2") == found["unit 2"]


def test_a_worker_goes_on_with_what_is_like_what_it_made(tmp_path):
    """Whatever the order asked for, and however the two share out the time, both kinds are not made by both."""
    units = Units(tmp_path / "work", Study(), "hash")
    with Workers(units, functools.partial(unit, tmp_path), jobs=2) as pool:
        found = pool.all({f"{kind} {n}": ("lives", n) for kind in "ab" for n in range(3)}, alike=lambda name: name[0])
        makers = [{found[f"{kind} {n}"]["process"] for n in range(3)} for kind in "ab"]
    assert min(map(len, makers)) == 1


def test_one_job_is_this_process(tmp_path):
    with Workers(Units(tmp_path / "work", Study(), "hash"), functools.partial(unit, tmp_path)) as pool:
        assert pool.all({"unit": ("lives", 1)})["unit"]["process"] == os.getpid()


def test_a_unit_that_kills_every_worker_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "TRIES", 1)
    with (
        Workers(Units(tmp_path / "work", Study(), "hash"), functools.partial(unit, tmp_path), jobs=2) as pool,
        pytest.raises(Failed, match="unit: 1 workers died of it, the last with -9"),
    ):
        pool.all({"unit": ("dies", 1)})


def test_a_worker_does_not_outlive_a_study_that_was_killed(tmp_path):
    told = tmp_path / "worker"
    words = ["sh", "-c", f"echo $PPID > {told}.tmp; mv {told}.tmp {told}; exec sleep 20"]
    script = (
        "import subprocess\n"
        "from experiments.workers import Workers\n"
        "class Nothing:\n"
        "    found = staticmethod(lambda name: None)\n"
        "if __name__ == '__main__':\n"
        f"    Workers(Nothing(), subprocess.check_call, jobs=2).all({{'unit': {words}}})\n"
    )
    (tmp_path / "study.py").write_text(script)
    root = str(Path(workers.__file__).parents[1])
    study = subprocess.Popen([sys.executable, str(tmp_path / "study.py")], env={**os.environ, "PYTHONPATH": root})
    try:
        assert soon(told.exists)
    finally:
        study.kill()
        study.wait()
    assert soon(lambda: not alive(int(told.read_text())))


def soon(true: Callable[[], bool]) -> bool:
    """Whether it is so within some seconds."""
    return any(true() or time.sleep(0.05) for _ in range(300))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # ended, but nobody asked how, is not alive either
    return not (state.exists() and ") Z" in state.read_text())


def test_the_stored_file_is_the_same_for_the_same_units(tmp_path):
    rows = [{"task": "text", "model": model, "seed": seed, "loss": seed / 3} for model in "ba" for seed in (10, 2)]
    how = {"command": "python -m experiments.any", "config": Study(), "machine": {"cores": 2}, "summary": {"best": 1.5},
           "content": "hash"}  # fmt: skip
    files = [tmp_path / "new" / "one.json", tmp_path / "new" / "other.json"]
    for file, these in zip(files, (rows, rows[::-1]), strict=True):
        contract.write(file, contract.stored(rows=these, seconds=1.23, **how))
    assert files[0].read_bytes() == files[1].read_bytes()
    found = contract.read(files[0])
    assert set(found) == {"command", "config", "machine", "seconds", "rows", "summary", "content"}
    assert [(row["model"], row["seed"]) for row in found["rows"]] == [("a", 2), ("a", 10), ("b", 2), ("b", 10)]
    assert Study.from_json(found["config"]) == Study() and found == contract.stored(rows=rows, seconds=1.2, **how)
    with pytest.raises(ValueError, match="not JSON compliant"):
        contract.stored(rows=[{"loss": float("nan")}], seconds=0.0, **how)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "any.json").write_text(json.dumps({"config": Study().to_json(), "content": "hash"}))
    with pytest.raises(Refused, match="it has no command, machine, seconds, rows, summary"):
        contract.read(tmp_path / "any.json")
    contract.check_output(tmp_path, "any", Study(text=("elsewhere/stories.txt",)), "hash")
    contract.check_output(tmp_path / "new", "any", Study(), "hash")
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"--output .*below cannot be made: Not a directory"):  # before hours of work
        contract.prepare(tmp_path / "file" / "below")
    with pytest.raises(Refused, match="width: 8 and 9"):
        contract.check_output(tmp_path, "any", Study(width=9), "hash")
    with pytest.raises(Refused, match="is a file; name a folder"):
        contract.check_output(tmp_path / "any.json", "any", Study(), "hash")


def test_a_command_says_nothing_of_folders():
    words = ["--text", "texts/far/my stories.txt", "--work", "far/work", "--jobs", "2", "--output=far"]
    assert contract.command_line("experiments.any", words, words[1:2]) == (
        "python -m experiments.any --text 'my stories.txt' --jobs 2")  # fmt: skip


def test_programs_are_dropped_where_they_hold_half_of_the_memory_maps(tmp_path, monkeypatch):
    dropped: list[bool] = []
    monkeypatch.setattr("jax.clear_caches", lambda: dropped.append(True))  # the suite's own programs stay
    maps, limit = tmp_path / "maps", tmp_path / "max_map_count"
    assert not workers.drop_programs(maps, limit)  # a system without
    limit.write_text("10\n")
    maps.write_text("one\n" * 5)
    assert not workers.drop_programs(maps, limit)
    maps.write_text("one\n" * 6)
    assert workers.drop_programs(maps, limit) and dropped == [True]


def test_nobody_elses_page_is_written_over_and_an_edited_file_is_refused(tmp_path):
    def stored(*rows):
        return contract.stored(command="c", config=Study(), machine={}, seconds=1.0, rows=rows, summary={}, content="")

    (tmp_path / "gates.md").write_text("my notes")
    with pytest.raises(Refused, match=r"gates\.md is there without gates\.json"):
        contract.check_output(tmp_path, "gates", Study(), "")
    file, row = tmp_path / "gates.json", {"task": "text", "model": "a", "seed": 0}
    before = contract.standing(tmp_path, "gates")
    contract.write(file, stored(row))
    contract.check_output(tmp_path, "gates", Study(), "")
    assert before is None and contract.standing(tmp_path, "gates") == file.read_bytes()
    assert contract.rendered(file, lambda rows: {"n": len(rows)}, lambda found: str(found["summary"])) == "{'n': 1}"
    with pytest.raises(Refused, match=r"not those of a whole study \(KeyError: 'nats'\)"):
        contract.rendered(file, lambda rows: {"nats": rows[0]["nats"]}, str)
    for rows, why in (((row, row), "1 rows twice"), ((), "each with a task"), (({"model": "a"},), "each with a task")):
        contract.write(file, stored(*rows))
        with pytest.raises(Refused, match=why):
            contract.read(file)


def test_a_study_of_text_reads_plain_text_and_enough_of_it(tmp_path, capsys):
    lines = tmp_path / "stories.jsonl"
    lines.write_text('{"text": "once"}\n')
    for command in (growth_pays, text_gates, mixed_depth, growth_context, early_exit, recall_hybrids, residual_lambdas,
                    growth_operators):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            command.main(["--text", str(lines)])
        assert left.value.code == 2 and "has JSON lines, and studies read plain text" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("a line of text\n" * 4000)
    for command, scale in ((growth_pays, "hours"), (text_gates, "small"), (mixed_depth, "small"),
                           (growth_context, "small"), (early_exit, "small"), (recall_hybrids, "small"),
                           (residual_lambdas, "small")):  # fmt: skip
        with pytest.raises(Refused, match=r"rows, the study needs \d+; give more text with --text"):
            command.main(["--text", str(short), "--scale", scale, "--output", str(tmp_path / "out")])
    with pytest.raises(Refused, match="--text is of settings of text; these are pointer_jumps, variable_chains"):
        growth_pays.main(["--text", str(short)])
    assert not (tmp_path / "out").exists()


def test_a_stored_config_names_text_and_tokenizer_each_by_its_own_name(tmp_path):
    study = LambdaStudy(text=("/data/a.txt", "b.txt"), tokenizer="/data/words.model")
    assert study_command.named(study) == LambdaStudy(text=("a.txt", "b.txt"), tokenizer="words.model")
    assert study_command.named(Study()) == Study(text=("stories.txt",))
    assert study_command.named(machine.MachineStudy()) == machine.MachineStudy()
    file = tmp_path / "there.json"
    file.write_text(json.dumps({"config": study_command.named(study).to_json(), "content": "hash"}))
    check_same(file, study, "hash")
    with pytest.raises(Refused, match=r"(?s)text:.*tokenizer:"):
        check_same(file, study, "another")


def test_two_studies_do_not_share_a_folder_and_words_that_are_not_looked_at_are_refused(tmp_path, monkeypatch):
    for words, why in ((["--seeds", "0,0"], "must be different"), (["--render", "--seeds=1"], "--seeds is of a study"),
                       (["--render", "--jobs", "2"], "--jobs is of a study that is run")):  # fmt: skip
        with pytest.raises(Refused, match=why):
            recall_hybrids.main(["--part", "machine", "--output", str(tmp_path), *words])
    words = ["--part", "machine", "--scale", "minutes", "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    Units(tmp_path / "work", machine.scaled("minutes", (0, 1)), "")
    with only_writer(tmp_path / "work" / "study"), pytest.raises(Refused, match="another process is writing"):
        recall_hybrids.main(words)
    study = at_scale("minutes", (), None, (0,))
    others = tmp_path / "early_exit.json"

    def everything(*arguments):  # while it trains, another writes the same results
        others.write_text("{}")
        return [], {}

    monkeypatch.setattr(run, "everything", everything)
    for work in (tmp_path / "exit", tmp_path / "other exit"):
        Units(work, study, content(study))
    with only_writer(tmp_path / "exit" / "study"), pytest.raises(Refused, match="another process is writing"):
        early_exit.study_and_report(study, tmp_path / "exit", tmp_path, 1, "c")
    with pytest.raises(Refused, match=r"another has written it; what was trained is kept in .*other exit"):
        early_exit.study_and_report(study, tmp_path / "other exit", tmp_path, 1, "c")
    assert others.read_text() == "{}"
    units = Units(tmp_path / "other", Study(), "")
    assert units.keep("a", {"loss": float("nan")}) == units.found("a") == {"loss": "NaN"}
