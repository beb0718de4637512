"""Where a command meets its surroundings: encodings, closed pipes, streams that are not there; results come first."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gt_jax import report
from gt_jax.errors import Failed, Refused, deliver, run_command, say
from gt_jax.files import write_atomically
from gt_jax.measure import _refuse_not_finite
from gt_jax.monitoring.metrics import Recorder, read_metrics

ROOT = str(Path(__file__).parents[2])
BUFFERED = {**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": ""}  # as a user's streams are, whoever runs the suite


class Gone(io.StringIO):
    """A terminal that has gone, or a pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    for encoding, wanted in (("ascii", b"Zo\\xeb caf\\udce9 \\u2192\n"), ("cp1252", b"Zo\xeb caf\\udce9 \\u2192\n"),
                             ("utf-8", "Zo\u00eb caf\\udce9 \u2192\n".encode())):  # fmt: skip
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
        with pytest.raises(SystemExit) as ended:
            run_command(lambda argv: print("Zo\u00eb caf\udce9 \u2192") or 0, [])
        assert (raw.getvalue(), ended.value.code) == (wanted, 0), encoding


def test_a_file_with_a_name_that_is_no_text(tmp_path):
    write_atomically(tmp_path / "a", "caf\udce9")
    assert (tmp_path / "a").read_bytes() == b"caf\\udce9"


@pytest.mark.parametrize("stream", [None, Gone(), sys.__stdin__])
def test_what_is_said_along_the_way_ends_nothing(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    say("half done")
    assert capsys.readouterr().out == ""  # without standard error `print` would write among the results


def test_results_come_first_and_no_failure_keeps_another_from_being_written(monkeypatch, capsys):
    written = []

    def fails() -> None:
        raise ValueError("\n$x_{$\n^\nParseException")

    files = {"--picture a.png": fails, "--plan-out b.json": lambda: written.append("b")}
    with pytest.raises(Failed, match=r"--picture a.png could not be written \(ValueError: \$x_\{\$\)"):
        deliver("the result", files)
    assert capsys.readouterr().out == "the result\n" and written == ["b"]
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        deliver("the result", {"--plan-out b.json": lambda: written.append("c")})
    assert written == ["b", "c"]
    with pytest.raises(Failed, match="nor standard output"):
        deliver("the result", files)


def test_the_report_is_written_without_a_picture_that_fails(tmp_path, monkeypatch):
    from gt_jax.configs.presets import preset
    from gt_jax.configs.run import RunConfig

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(RunConfig(model=preset("tiny")).to_json()))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("gt_jax.monitoring.run_page.plot_runs", fails)
    with pytest.raises(Failed, match=r"is written, without curves: .*no font"):
        report.main([str(tmp_path / "run"), "-o", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "could not be drawn: RuntimeError: no font" in text and "2.5" in text


def test_a_run_goes_on_when_its_terminal_has_gone(tmp_path):
    with Recorder(tmp_path / "metrics.jsonl", total_steps=3, every=1, stream=Gone()) as recorder:
        for step in (1, 2, 3):
            recorder.log(step, loss=1.0)
            recorder.message("a layer is dead")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("where", ["loss", "alive", "survival"])
def test_counts_of_a_model_that_gives_nan_are_refused(where):
    """`k_exec` of NaN would be all passes."""
    layer = {"k_exec": 4, "alive": [1.0, 0.5], "survival": [1.0, 0.25]}
    counts = {"_meta": {"loss": 2.0}, "layer0": layer, "layer1": dict(layer)}
    _refuse_not_finite(Path("runs/a"), counts)
    broken = {"_meta": {"loss": math.nan}} if where == "loss" else {"layer1": layer | {where: [1.0, math.inf]}}
    with pytest.raises(Refused, match=r"runs.a: .*not finite"):
        _refuse_not_finite(Path("runs/a"), counts | broken)


def test_counts_that_cannot_be_written_go_to_standard_output(tmp_path, monkeypatch, capsys):
    means = {"mean_weight": 1.5, "passes_run": 2.0, "passes_computed": 2.0}
    layer = {"k_exec": 2, "alive": [1.0], "survival": [1.0], **means}
    counts = {"_meta": {"loss": 2.0, "notes": []}, "layer0": layer}

    def full(path: Path, text: str, replace: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gt_jax.evaluation.measurement.measure_checkpoint", lambda *_: counts)
    measure = importlib.import_module("gt_jax.measure")  # the name is also that of a function
    monkeypatch.setattr(measure, "write_atomically", full)
    with pytest.raises(Failed, match=r"-o .*No space left on device.*standard output"):
        measure.main(["run", "-o", str(tmp_path / "counts.json")])
    assert json.loads(capsys.readouterr().out) == counts
    for loss, words in ((None, "nothing is asked in these held-out rows"), (float("nan"), "not finite")):
        found = {"_meta": {"loss": loss, "notes": []}, "layer0": layer}
        monkeypatch.setattr("gt_jax.evaluation.measurement.measure_checkpoint", lambda *_, found=found: found)
        with pytest.raises(Refused, match=words):
            measure.main(["run", "-o", str(tmp_path / "new" / "deep" / "counts.json")])
    assert not (tmp_path / "new").exists(), "what is refused leaves no folder"


def test_too_little_memory_and_a_jax_that_cannot_be_set_up_are_said_in_a_line(capsys, monkeypatch):
    class XlaRuntimeError(RuntimeError):
        pass

    for error in (MemoryError(), XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBacktrace"),
                  ImportError("library.so: failed to map segment from shared object")):  # fmt: skip
        def main(argv: object, error: Exception = error) -> int:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_command(main)
        said = capsys.readouterr().err
        assert ended.value.code == 1 and said.startswith("failed: not enough memory") and said.count("\n") == 1

    for error in (RuntimeError("Unable to initialize backend 'foo': it is not known"),
                  ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
                  ValueError('Invalid value "abc" for JAX flag jax_compilation_cache_max_size')):  # fmt: skip
        def unset(argv: object, error: Exception = error) -> int:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_command(unset)
        assert ended.value.code == 2 and capsys.readouterr().err == (
            f"refused: JAX cannot be set up as the environment says: {error}\n")  # fmt: skip

    def mistaken(argv: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("resource.getrlimit", lambda kind: (3 << 29, -1))  # ulimit -v
    with pytest.raises(SystemExit):
        run_command(lambda argv: 0)
    assert "may have 1.5 GiB of address space (ulimit -v)" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(mistaken)


def test_ctrl_c_is_not_lost_where_python_ignores_what_is_raised(capsys, monkeypatch):
    """JAX has a callback in each collection of garbage; what it raises is printed, and the command went on."""
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
    hook = sys.unraisablehook

    class Collected:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def main(argv):
        Collected()
        for _ in range(1000):
            time.sleep(0.001)
        return 0

    try:
        with pytest.raises(SystemExit) as ended:
            run_command(main, [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n") and sys.unraisablehook is hook


def test_a_full_disk_behind_standard_output_is_named(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            run_command(lambda argv: print("a result") or 0, [])
    assert ended.value.code == 1 and "No space left on device: 'standard output'" in capsys.readouterr().err


def test_a_full_disk_behind_a_result_is_named(capsys, monkeypatch):
    with open("/dev/full", "w") as full, pytest.raises(OSError, match="No space left on device: 'standard output'"):
        monkeypatch.setattr(sys, "stdout", full)
        deliver("the result")


def test_no_file_is_opened_where_a_stream_was_closed(tmp_path):
    """A lock at descriptor 2 would hold what a library has to say, and be none from then on."""
    program = ("from gt_jax.errors import run_command\n"
               "run_command(lambda argv: open('a', 'w').write(str(open('lock', 'w').fileno())) and 0, [])")  # fmt: skip
    for closed in ("2>&-", ">&-", ">&- 2>&- <&-"):
        done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], cwd=tmp_path,
                              env=BUFFERED, timeout=60)  # fmt: skip
        assert done.returncode == 0 and int((tmp_path / "a").read_text()) > 2, closed


def test_a_folder_that_was_deleted_under_a_command_is_named(capsys, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: os.stat("no such folder"))
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: open("relative.json").close() or 0, [])
    assert ended.value.code == 1 and "is gone: change to one that exists" in capsys.readouterr().err


@pytest.mark.parametrize("leaves", [ImportError, RuntimeError, KeyboardInterrupt])
def test_ctrl_c_is_told_as_that_whatever_a_library_makes_of_it(capsys, monkeypatch, leaves):
    """While jaxlib is being loaded, and where XLA calls back, the interrupt becomes an error of theirs.

    After an interrupted compilation the interpreter's shutdown ends in a segmentation fault: there is to be none.
    """
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"at once, {code}"))

    def main(argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise leaves("Encountered an error while initializing the extension.") from error

    with pytest.raises(SystemExit) as ended:
        run_command(main, [])
    assert (ended.value.code, capsys.readouterr().err) == ("at once, 130", "interrupted\n")
    with pytest.raises(ImportError):
        run_command(lambda argv: __import__("no_such_module"), [])


def test_what_a_command_says_to_a_closed_pipe_changes_no_exit_code():
    """It stayed in the stream, where the interpreter found it at its end, and made the code 120."""
    read, write = os.pipe()
    os.close(read)
    code = "from gt_jax.errors import run_command, say; run_command(lambda argv: say('line') or 0, [])"
    done = subprocess.run([sys.executable, "-c", code], env=BUFFERED, stderr=write)
    os.close(write)
    assert done.returncode == 0


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_pipe_leaves_no_trace_of_python(closed, tmp_path):
    """`describe tiny | head -0`: the output is larger than a buffer, so it fails while it is printed and at the end."""
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: write}
    done = subprocess.run([sys.executable, "-m", "gt_jax.grow", "--dry-run", "--json", "--plan-out", "plan.json"],
                          cwd=tmp_path, env=BUFFERED, **streams)  # fmt: skip
    os.close(write)
    assert done.returncode == (1 if closed != "stderr" else 0)
    assert not done.stderr or (b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr), done.stderr
    assert (tmp_path / "plan.json").exists(), "what was asked for is written though nobody reads standard output"
