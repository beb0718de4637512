"""Nothing is lost: bad steps change nothing and end a run in time, saves go on beside it, SIGTERM is heard.

Nor by what happens to a run's directory: a damaged checkpoint, a full disk, another text.
"""

import contextlib
import functools
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.configs.data import DataConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import RunConfig, TrainConfig, read_run_config
from gt_jax.configs.standing import longer
from gt_jax.errors import Failed, Refused
from gt_jax.monitoring.metrics import read_metrics
from gt_jax.train import asked_config
from gt_jax.train import parser as train_parser
from gt_jax.training import loop
from gt_jax.training.loop import Diverged, Patience, Trainer, fit, make_trainer, telling, train_run
from gt_jax.training.price import initial_price
from gt_jax.training.run_directory import SameFolder
from gt_jax.training.state import TrainState
from gt_jax.training.stopping import Interrupted, Termination
from tests.support import perturbed, small_model

CONFIG = small_model("D", adaptive=False)
BATCH = {name: np.ones((2, 8), np.int32) for name in ("tokens", "targets", "segment_ids")}


@functools.cache
def trainer():
    return make_trainer(CONFIG, TrainConfig(steps=10))


def start(poison=None):
    variables = jax.tree.map(jnp.copy, perturbed(CONFIG))  # the step donates its state
    if poison is not None:
        variables["params"]["final_norm"]["scale"] = variables["params"]["final_norm"]["scale"].at[0].set(poison)
    return trainer().new_state(variables)


def test_the_first_step_alone_says_that_it_compiles():
    said = []
    step = telling(lambda a, b: a + b, said.append)
    assert [step(1, b) for b in (1, 2, 3)] == [2, 3, 4]
    assert said == ["compiling the first step", "compiled in 0 s"]


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poison):
    state = start(poison)
    before = jax.device_get(state)
    after, metrics = trainer().step(state, BATCH)
    assert metrics["bad"] == 1 and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after._replace(step=jnp.zeros((), jnp.int32))), before)


def test_a_good_step_is_applied():
    state = start()
    before = jax.device_get(state.params)
    after, metrics = trainer().step(state, BATCH)
    assert metrics["bad"] == 0
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before), strict=True))


def test_bad_steps_are_told_with_their_place_and_end_the_run_in_a_row():
    told = []
    patience = Patience(2, told.append, {1: {"row": 8}, 2: None, 3: {"row": 24}, 4: {"row": 32}}.pop)
    bad = {"bad": 1.0, "total_loss": np.float32(np.nan), "gradient_norm": np.float32(1)}
    patience.see(1, bad)
    patience.see(2, {"bad": 0.0})
    patience.see(3, bad)
    with pytest.raises(Diverged, match=r"step 4: total_loss nan, .* the text is at \{'row': 32\} \(2 in a row\)"):
        patience.see(4, bad)
    assert len(told) == 2 and "after which the text is at {'row': 8}" in told[0]


def test_a_loop_without_patience_ends_at_the_first_bad_step():
    seen = []
    with pytest.raises(Diverged, match="step 1: "):
        fit(trainer(), start(np.nan), iter([BATCH] * 3), 3, record=lambda step, metrics: seen.append(step))
    assert seen == [1]


def test_a_save_beside_the_caller_holds_the_values_of_its_moment(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.device_put(np.zeros((256, 256), np.float32))
    waits = []
    for step in range(3):
        waits.append(checkpoint.save_async(tmp_path / str(step), {"x": x}, {"config": {}}))
        x = add(x)
    for step, wait in enumerate(waits):
        wait()
        assert np.all(checkpoint.load(tmp_path / str(step))["x"] == step)


def test_sigterm_is_a_wish_while_it_is_awaited_and_what_it_was_after():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.asked(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked(2)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def keyboard():
    """SIGINT and SIGHUP as at a terminal: in the background, or under nohup, one of them is ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_is_a_wish_and_the_second_leaves_at_once(keyboard, monkeypatch):
    before, sent = signal.getsignal(signal.SIGINT), []
    with Termination() as termination:
        assert not termination.asked(1) and not termination.interrupted
        os.kill(os.getpid(), signal.SIGINT)
        assert termination.asked(2) and termination.interrupted
        heard = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(os, "kill", lambda *to: sent.append((to, signal.getsignal(signal.SIGINT))))
        heard(signal.SIGINT, None)
    assert sent == [((os.getpid(), signal.SIGINT), signal.SIG_DFL)] and signal.getsignal(signal.SIGINT) == before


def test_a_signal_that_is_ignored_stays_so():
    """nohup, and what a shell script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Termination() as termination:
            assert not termination.asked(1)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loop_that_is_asked_to_stop_hands_its_state_over_once():
    calls = []
    state = fit(
        trainer(), start(), iter([BATCH] * 9), 9, record=lambda *_: None, stop=lambda step: step == 2,
        after=lambda step, state, last: calls.append((step, int(state.step), last)),
    )  # fmt: skip
    assert calls == [(2, 2, True)] and int(state.step) == 2


STORY = b"Once upon a time a small net grew deep and was glad of it.\n" * 20


def toy_state(variables):
    """A model of one matrix, with a moment: what a run does with its files asks for no more."""
    w = variables["params"]["w"]
    return TrainState({"w": w}, {}, {"mean": 0 * w}, initial_price(PriceConfig()), jnp.zeros((), jnp.int32))


@jax.jit
def toy_step(state, batch):
    mean = 0.9 * state.optimizer["mean"] + jnp.mean(batch["tokens"]) * state.params["w"]
    loss = jnp.mean(mean)
    after = state._replace(params={"w": state.params["w"] - 1e-3 * mean}, optimizer={"mean": mean}, step=state.step + 1)
    return after, {"loss": loss, "total_loss": loss, "gradient_norm": loss, "bad": 0.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, the directory of an uninterrupted run of ten steps of a toy, every second one saved)."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "story.txt").write_bytes(STORY)
    data = DataConfig(text=(str(folder / "story.txt"),), sequence_length=8, batch_size=2)
    train = TrainConfig(steps=10, evaluate_every=0, evaluation_batches=1, checkpoint_every=2, keep=5)
    config = RunConfig(model=CONFIG, train=train, data=data)
    weight = jax.ShapeDtypeStruct((128, 128), np.float32)
    toy = Trainer(toy_step, lambda variables, batch, control: (variables["params"]["w"].sum(), 1, None), toy_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_trainer", lambda *_: toy)
        patch.setattr(loop, "abstract", lambda *_: {"params": {"w": weight}})
        patch.setattr(loop, "initialise", lambda *_: {"params": {"w": jnp.ones(weight.shape)}})
        train_run(folder / "whole", config, show=False)
        yield config, folder / "whole"


def cut(whole, run):
    """`run` as `whole` was when step 6 was saved and step 7 recorded."""
    shutil.copytree(whole, run)
    for step in ("8", "10"):
        shutil.rmtree(run / step)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:7]))
    return run


def assert_as_whole(run, whole):
    """The bytes of every checkpoint, the text's position there, and the metrics but for their times."""
    assert RunCheckpoints(run).steps() == RunCheckpoints(whole).steps() == [2, 4, 6, 8, 10]
    for step in ("2", "4", "6", "8", "10"):
        assert checkpoint.content_hash(run / step) == checkpoint.content_hash(whole / step)
        assert checkpoint.describe(run / step) == checkpoint.describe(whole / step)
    lines = [[{name: value for name, value in line.items() if not name.startswith("time_")}
              for line in read_metrics(place / "metrics.jsonl")] for place in (run, whole)]  # fmt: skip
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [*range(1, 11), 10]


def values_of(step):
    """The file with most of a checkpoint's values."""
    return max((step / "state").rglob("d/*"), key=lambda file: file.stat().st_size)


def truncate(step):
    os.truncate(values_of(step), 100)


def delete(step):
    values_of(step).unlink()


def flip(step):
    data = bytearray(values_of(step).read_bytes())
    data[len(data) // 2] ^= 1
    values_of(step).write_bytes(data)


def leave_unfinished(step):
    shutil.copytree(step, step.with_name("8.unfinished.orbax-checkpoint-tmp"))
    (step / "files.json").unlink()
    step.rename(step.with_name("6.unfinished"))


@pytest.mark.parametrize(("harm", "says"), [
    (truncate, "has 100 bytes instead of"), (delete, "is missing"), (flip, "holds other bytes than were written"),
    (leave_unfinished, None),
])  # fmt: skip
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(whole, harm, says, tmp_path, capsys):
    config, place = whole
    run = cut(place, tmp_path / "run")
    harm(run / "6")
    train_run(run, config, resume=True)
    said = capsys.readouterr().err
    assert says is None or (f"{run / '6'} " in said and says in said and "step 4 is used" in said)
    assert [path.name for path in run.glob("*[!0-9]*") if path.is_dir()] == ([] if says is None else ["6.damaged"])
    assert_as_whole(run, place)


@pytest.mark.parametrize(("every", "left", "final"), [(3, [8, 10], 0.1), (0, [10], 0.1), (3, [8, 10], 1.0)])
def test_the_checkpoint_that_ends_the_plateau_stays(whole, every, left, final, tmp_path, capsys):
    """It is what a run is grown from: whatever is saved and kept otherwise. Of a rate that stays none says it falls."""
    optimizer = whole[0].train.optimizer.replace(final=final)
    config = whole[0].replace(train=whole[0].train.replace(checkpoint_every=every, keep=1, optimizer=optimizer))
    train_run(tmp_path / "run", config)
    assert RunCheckpoints(tmp_path / "run").steps() == left
    said = capsys.readouterr().err
    assert (f"{tmp_path / 'run' / '8'} stays" in said) == (every > 0)
    assert ("from here on the learning rate falls" in said) == (every > 0 and final < 1)


@pytest.mark.parametrize("harm", ["moved", "removed"])
def test_a_run_whose_folder_goes_ends_and_makes_no_other(whole, harm, tmp_path, monkeypatch):
    """A save would make it anew, without its config and metrics."""
    run, log = tmp_path / "run", loop.Recorder.log

    def and_harm(self, step, **values):
        log(self, step, **values)
        if step == 5:
            run.rename(tmp_path / "elsewhere") if harm == "moved" else shutil.rmtree(run)

    monkeypatch.setattr(loop.Recorder, "log", and_harm)
    with pytest.raises(Failed, match="it was moved or removed"):
        train_run(run, whole[0].replace(train=whole[0].train.replace(checkpoint_every=0)), show=False)
    assert not run.exists()
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    with pytest.raises(Failed, match="moved or removed"), SameFolder(tmp_path / "other"):  # and a save under way fails
        (tmp_path / "other").rmdir()
        raise ValueError("NOT_FOUND: of the library that writes")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_is_asked_to_stop_saves_the_step_and_whoever_called_does_not_go_on(
    keyboard, whole, tmp_path, monkeypatch, capsys, number
):
    run, log = tmp_path / "run", loop.Recorder.log

    def and_signal(self, step, **values):
        log(self, step, **values)
        if step == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Recorder, "log", and_signal)
    with pytest.raises(Interrupted):
        train_run(run, whole[0])
    assert RunCheckpoints(run).latest() in (6, 7) and "goes on from there (train --resume)" in capsys.readouterr().err
    monkeypatch.undo()


def test_a_finished_run_takes_more_steps_and_says_what_they_mean(whole, tmp_path, capsys):
    config, place = whole
    run = tmp_path / "run"
    shutil.copytree(place, run)
    more = config.replace(train=config.train.replace(steps=20, checkpoint_every=2, keep=5))
    with pytest.raises(Refused, match=r"(?s)more --steps than there are.*train\.steps: 10 and 5"):
        train_run(run, config.replace(train=config.train.replace(steps=5)), resume=True, show=False)
    with pytest.raises(Refused, match=r"train\.seed: 0 and 3") as told:  # what follows from more steps nobody asked for
        train_run(run, more.replace(train=more.train.replace(seed=3)), resume=True, show=False)
    assert "price" not in str(told.value) and "warmup" not in str(told.value)
    train_run(run, config, resume=True)
    assert "all 10 steps are done; --resume --steps 20 goes on" in capsys.readouterr().err
    state = train_run(run, more, resume=True)
    said = capsys.readouterr().err
    assert int(state.step) == 20 and [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [
        *range(1, 11), 10, *range(11, 21), 20]
    assert "the learning rate falls after step 16, not 8" in said and f"--start {run / '8'} goes on" in said
    assert RunCheckpoints(run).steps() == [8, 12, 14, 16, 18, 20]  # 8 ended the plateau as it was
    assert read_run_config(run).train == longer(config.train, 20)
    train_run(run, read_run_config(run), resume=True, show=False)
    # the same words once more, as of a job that is queued again after a kill; also when no step is left from before
    shutil.rmtree(run / "8")
    train_run(run, more, resume=True, show=False)
    now, rate = read_run_config(run), config.train.price.rate
    again = now.replace(train=now.train.replace(price=now.train.price.replace(rate=rate)))  # as by one flag
    assert now.train.price.rate != rate
    train_run(run, again, resume=True, show=False)
    assert read_run_config(run) == now and checkpoint.describe(run / "20")[1]["shorter"] == [config.train.to_json()]
    # and as a command, with the fraction that the run began with, whatever it is of more steps
    words, began = ("--resume", "--steps", "20", "--warmup"), config.train.optimizer.warmup
    for there, of in ((place, config.replace(train=config.train.replace(steps=20))), (run, now)):
        same, other = (asked_config(train_parser().parse_args([str(there), *words, f"{one}"])) for one in (began, 0.9))
        assert same == of and other.train.optimizer.warmup == 0.9
    warmer = now.train.optimizer.replace(warmup=0.9)
    for other in (config, again.replace(train=again.train.replace(optimizer=warmer))):
        with pytest.raises(Refused, match=r"train\.(steps: 20 and 10|optimizer\.warmup: .* and 0\.9)"):
            train_run(run, other, resume=True, show=False)


def test_what_cannot_be_removed_is_said_while_the_run_goes_on(whole, tmp_path, monkeypatch, capsys):
    def denied(folder, *rest, **options):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", denied)
    train_run(tmp_path / "run", whole[0].replace(train=whole[0].train.replace(keep=1)))
    assert RunCheckpoints(tmp_path / "run").steps() == [2, 4, 6, 8, 10]
    assert capsys.readouterr().err.count(f"{tmp_path / 'run' / '2'} cannot be removed") == 1


def test_a_run_that_is_being_trained_is_not_resumed_a_second_time(whole, tmp_path):
    """A job is queued again while the old one still runs: nothing of the run may change."""
    config, place = whole
    run = cut(place, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with only_writer(run / "run"):
        with pytest.raises(Refused, match="another process is writing"):
            train_run(run, config, resume=True, show=False)
        assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "new").mkdir()
    with only_writer(tmp_path / "new" / "run"), pytest.raises(Refused, match="another process is writing"):
        train_run(tmp_path / "new", config, show=False)  # two that begin one run
    assert not any((tmp_path / "new").iterdir())


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process may grow beyond `size`, which stands in for a full disk; what is written fails so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 2**16], ids=["nothing", "metrics but no checkpoint"])
def test_a_full_disk_ends_a_run_in_words_and_costs_it_nothing(whole, room, tmp_path, monkeypatch):
    """The save is under way beside the training when it fails: the next save, or the end, hears of it."""
    config, place = whole
    run, full = tmp_path / "run", contextlib.ExitStack()
    save = RunCheckpoints.save_beside

    def and_then_no_room(self, step, *rest):
        if step == 6:
            self.wait()
            full.enter_context(files_up_to(room))
        save(self, step, *rest)

    monkeypatch.setattr(RunCheckpoints, "save_beside", and_then_no_room)
    with pytest.raises(OSError, match=f"while writing {run}; raise the limit .*, then finish with --resume"), full:
        train_run(run, config, show=False)
    assert RunCheckpoints(run).steps() == [2, 4] and not any(run.glob("*.unfinished*"))
    for step in ("2", "4"):
        assert checkpoint.content_hash(run / step) == checkpoint.content_hash(place / step)
    with pytest.raises(OSError, match="raise the limit"), files_up_to(0):  # still none
        train_run(run, config, resume=True, show=False)
    monkeypatch.undo()
    train_run(run, config, resume=True, show=False)
    assert_as_whole(run, place)


def test_another_config_or_text_is_refused_by_what_differs(whole, tmp_path):
    config, place = whole
    run = cut(place, tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    story = tmp_path / "story.txt"
    story.write_bytes(STORY.replace(b"glad", b"sad!"))
    optimizer = config.train.optimizer.replace(learning_rate=1.0)
    data = config.data.replace(text=(str(story),), tokenizer=str(tmp_path / "tokenizer.json"))
    other = config.replace(train=config.train.replace(optimizer=optimizer), data=data)
    with pytest.raises(Refused, match=r"(?s)another config.*train.optimizer.learning_rate"):
        train_run(run, other, resume=True, show=False)
    text = whole[1].parent / "story.txt"
    try:
        text.write_bytes(story.read_bytes())  # the same names, other bytes
        with pytest.raises(Refused, match="the saved position in the data does not fit this text:\n  - content is"):
            train_run(run, config, resume=True, show=False)
    finally:
        text.write_bytes(STORY)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
