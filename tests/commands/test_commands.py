"""The commands as a user types them: train, kill, resume, measure, grow, verify, sample, describe; and wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.monitoring.metrics import read_metrics
from gt_jax.text.tokenizers import tokenizer_of

# Two layers that are one program; of kind G, which has statistics of its own to lose (D: test_demo.py).
TRAIN = ["--layout", "G*2", "--steps", "24", "--checkpoint-every", "4", "--evaluate-every", "12", "--batch-size", "2",
         "--sequence-length", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("commands")
    (place / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 400)
    return place


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def environment(folder: Path) -> dict[str, str]:
    """One CPU device, little optimisation, and every program compiled once for all the processes of these tests."""
    root = str(Path(__file__).parents[2])
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    cheap = {"XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **cheap, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *words), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )


def done(folder: Path, *words: str) -> str:
    result = call(folder, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


SEVERAL = """
import contextlib, io, json, sys
from gt_jax.__main__ import main
printed = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0, words
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def in_one_process(folder: Path, *commands: list[str]) -> list[str]:
    """What each command prints, in a fresh process for all of them: starting one takes as long as what some do."""
    words = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
    result = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def run(folder):
    done(folder, "gt_jax.train", "run", "--text", "story.txt", *TRAIN)
    return folder / "run"


def lines_without_time(run: Path) -> list[dict]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith("time_")} for line in lines]


@pytest.mark.slow
def test_a_run_killed_or_stopped_at_any_moment_ends_with_the_bytes_of_an_uninterrupted_one(folder, run):
    """kill -9 leaves the newest checkpoint, SIGTERM saves one more and leaves with 0."""
    killed = folder / "killed"
    words = command(folder, "gt_jax.train", "killed", "--text", "story.txt", *TRAIN)
    rng = np.random.default_rng(0)
    ends = []
    for way in (signal.SIGKILL, signal.SIGTERM):
        resume = ["--resume"] if (killed / "config.json").exists() else []
        before = RunCheckpoints(killed).latest() or 0
        process = subprocess.Popen(words + resume, cwd=folder, env=environment(folder), stderr=subprocess.DEVNULL)
        # kill at once after a new checkpoint begins to appear, or a random while later
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            names = [p.name for p in killed.glob("*")] if killed.exists() else []
            writing = way == signal.SIGKILL and any("unfinished" in name or "tmp" in name for name in names)
            if writing or (RunCheckpoints(killed).latest() or 0) > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        asked = time.monotonic()
        if process.poll() is None:
            process.send_signal(way)
        ends.append(process.wait())
        assert time.monotonic() - asked < 30
    assert ends == [-signal.SIGKILL, 0]
    assert len(RunCheckpoints(killed).steps()) in (2, 3), "the newest two; past the plateau its end stays too"
    done(folder, "gt_jax.train", "killed", "--resume")
    assert checkpoint.content_hash(killed) == checkpoint.content_hash(run)
    assert lines_without_time(killed) == lines_without_time(run)
    assert checkpoint.describe(killed)[1]["data"] == checkpoint.describe(run)[1]["data"]


@pytest.mark.slow
def test_measure_grow_verify_sample_describe(folder, run, capsys, monkeypatch):
    from gt_jax import describe
    from gt_jax.grow import main as grow

    monkeypatch.chdir(folder)
    growth = ["--repetition", "counts.json", "--round", "balance", "--target-layers", "6"]
    prompt, more = ["--prompt", "Once", "--length", "20"], ["--text", "story.txt", "--steps", "2", "--batch-size", "2"]
    *_, one, verified, _ = in_one_process(
        folder,
        ["measure", "run", "-o", "counts.json", "--batches", "2"],
        ["grow", "run", "grown", *growth],
        ["sample", "grown", *prompt],
        ["verify", "run", "grown", "--json", "--batches", "2", "--jacobian-rows", "0"],
        ["train", "on", "--start", "grown", *more, "--sequence-length", "32"],
    )
    counts = json.loads((folder / "counts.json").read_text())
    assert set(counts) == {"_meta", "layer0", "layer1"} and counts["_meta"]["tokens"] > 0
    for layer in ("layer0", "layer1"):
        assert counts[layer]["mean_weight"] == pytest.approx(sum(counts[layer]["survival"]))
        assert counts[layer]["passes_run"] == pytest.approx(sum(counts[layer]["alive"]))
        assert counts[layer]["passes_run"] <= counts[layer]["passes_computed"] + 1e-6
        assert 1 <= counts[layer]["k_exec"] <= 4
    assert grow(["run", "again", *growth, "--no-check"]) == 0  # in this process: what is compared are two processes
    capsys.readouterr()
    assert checkpoint.content_hash(folder / "grown") == checkpoint.content_hash(folder / "again")
    grown = checkpoint.describe(folder / "grown")[1]
    assert grown["grown_from"]["step"] == 24 and tokenizer_of(grown) == "bytes"

    result = json.loads(verified)
    assert result["gap"] < 0.1 and len(result["layers"]) == 6
    assert done(folder, "gt_jax.sample", "grown", *prompt) == one and one.startswith("Once")
    assert describe.main(["grown", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["layout"] == "G*6" and described["lineage"][-1]["grown_from"]["source"]
    assert checkpoint.describe(folder / "on")[1]["config"] == described["config"]


def test_a_run_says_how_its_gates_stand_and_is_reported(folder, run, capsys, monkeypatch):
    from gt_jax import report
    from gt_jax.configs.run import read_run_config
    from gt_jax.monitoring.alerts import Course, alerts

    config, lines = read_run_config(run), read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 24 and alerts(lines, config) == []
    for line in steps:
        gate = [line[f"gate_{name}"] for name in ("mean", "std", "floored")]
        assert all(len(values) == 2 for values in gate)
        if Course(config).forced(line["step"]):
            assert gate == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]  # of the first of two forced passes
        else:
            assert all(0 < mean < 1 for mean in gate[0]) and all(0 <= share <= 1 for share in gate[2])
    monkeypatch.chdir(folder)
    assert report.main(["run", "-o", "run.html"]) == 0
    assert capsys.readouterr().out == "1 run, 0 alerts: run.html\n"
    assert "24 of 24" in (folder / "run.html").read_text()


def test_describe_a_preset(folder):
    result = json.loads(done(folder, "gt_jax.describe", "tiny", "--json"))
    assert result["preset"] == "tiny" and result["layout"] == "DDDG*2" and result["parameters"] == 1_582_908
    trained = [t for t in result["tensors"] if t["path"].startswith("params/")]
    assert sum(t["parameters"] for t in trained) == result["parameters"]
    assert all(np.prod(t["shape"], dtype=int) == t["parameters"] for t in trained)


def refused(capsys, main, *words: str) -> str:
    """The message of a command that must refuse; run in this process, which is quicker than one of its own."""
    from gt_jax.errors import Refused

    with pytest.raises(Refused) as error:
        main([str(word) for word in words])
    assert capsys.readouterr().out == ""
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--preset", "huge"), "unknown preset 'huge'"),
        (("--layout", "DDXG"), "'X'"),
        (("--layout", "DDDG*0"), "at least 1"),
        (("--sequence-length", "1"), "sequence_length is 1"),
        (("--text", "missing.txt"), "missing.txt"),
        (("--text", "empty.txt"), "empty"),
        (("--text", "short.txt"), "too short"),
        (("--resume",), "no run directory"),
        (("--start", "missing"), "does not exist"),
        (("--start", "story.txt"), "is a file"),
        (("--steps", "0"), "steps is 0"),
        (("--learning-rate", "-1"), "learning_rate"),
        (("--tensor", "3"), "8 devices"),
        (("--tensor", "0"), "tensor is 0; it must be at least 1"),
        (("--tensor", "8"), "key/w and 3 like it: axis 2 of [2, 128, 4, 32] is 4; the mesh cuts it in 8 (tensor)"),
        (("--batch-size", "7"), "batch (rows that run together) is 7; the mesh cuts it in 8 (data x fsdp)"),
    ],
)
def test_train_refuses_and_leaves_nothing(folder, capsys, monkeypatch, words, says):
    from gt_jax import train

    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_bytes(b"too short")
    assert says in refused(capsys, train.main, "new", *words)
    assert not list((folder / "new").glob("[0-9]*")) and not (folder / "new" / "metrics.jsonl").exists()
    assert not (folder / "new").exists()


def test_a_run_is_not_overwritten_nor_resumed_as_another(folder, run, capsys, monkeypatch):
    from gt_jax import train
    from gt_jax.calibrate import main as calibrate
    from gt_jax.grow import main as grow
    from gt_jax.measure import main as measure
    from gt_jax.report import main as report
    from gt_jax.retrofit import main as retrofit

    monkeypatch.chdir(folder)
    before = checkpoint.content_hash(run)
    assert "exists" in refused(capsys, train.main, "run", *TRAIN)
    message = refused(capsys, train.main, "run", "--resume", "--steps", "99", "--batch-size", "4")
    assert "data.batch_size: 2 and 4" in message and "train.steps:" not in message  # more steps a run takes
    assert "exists" in refused(capsys, grow, "run", "run/24", "--plan", "identity")
    assert "would be taken for a step of the run" in refused(capsys, train.main, "run/500", *TRAIN)
    (folder / "counts2.json").write_text("{}")
    assert "exists" in refused(capsys, measure, "run", "-o", "counts2.json")
    for name in ("link", "link.png"):  # names that are taken, too
        os.symlink("nowhere", name)
    for main, *words in ((train.main, "link", *TRAIN), (grow, "run", "link", "--plan", "identity"),
                         (grow, "run", "new", "--plan", "identity", "--picture", "link.png"),
                         (measure, "run", "-o", "link"), (retrofit, "run", "link"), (report, "run", "-o", "link"),
                         (calibrate, "run", "run", "link", "--text", "story.txt")):  # fmt: skip
        message = refused(capsys, main, *words)
        assert "exists" in message and "link" in message, message
    assert checkpoint.content_hash(run) == before


def test_exit_codes_and_streams(folder):
    wrong = call(folder, "gt_jax.describe", "nothing")
    assert wrong.returncode == 2 and wrong.stdout == "" and "neither a preset" in wrong.stderr
    assert call(folder, "gt_jax.describe").returncode == 2


def test_a_json_file_changes_the_model(tmp_path):
    from gt_jax import train
    from gt_jax.errors import Refused

    file = tmp_path / "changes.json"

    def trained(changes):
        file.write_text(json.dumps(changes))
        arguments = train.parser().parse_args(["run", "--preset", "tiny_3b", "--model", str(file), "--expert", "2"])
        return train.run_config(arguments, train.default_config(arguments)).model

    model = trained({"adaptive": None, "stack": {"kind": "midpoint", "mixing": 1.0}, "hyper": {"streams": 2},
                     "memory": None})  # fmt: skip
    assert model.adaptive is None and model.stack.kind == "midpoint" and model.hyper.streams == 2
    assert model.moe.experts == 8 and model.stack.step == 0.25
    with pytest.raises(Refused, match=r"(?s)changes.json.*unknown field 'colour'.*'hyper'.*'two' is not int"):
        trained({"colour": 1, "hyper": {"streams": "two"}})
    with pytest.raises(Refused, match="no JSON object, but list"):
        trained([])


def test_describe_reports_what_a_lambda_stack_hands_on(tmp_path):
    from gt_jax.configs.model import StackConfig
    from gt_jax.describe import describe, report_lines
    from tests.support import perturbed, small_model

    config = small_model("DG*2", False, stack=StackConfig("lambda", skips=((0, 2),)))
    variables = perturbed(config)
    checkpoint.save(tmp_path / "lambda", variables, {"config": config.to_json(), "kind": "train", "step": 0})
    result = describe(str(tmp_path / "lambda"))
    layers = variables["params"]["segment0"]
    a = [float(layers[f"layer{slot}"]["residual_scale"][block]) for block in range(2) for slot in range(2)]
    skip = float(variables["params"]["skips"][0])
    np.testing.assert_allclose(result["contributions"], [a[1] * a[2] * a[3] + skip * a[2] * a[3], a[2] * a[3], a[3], 1],
                               rtol=1e-5)  # fmt: skip
    assert any(line.startswith("contribution of each layer") for line in report_lines(result))
