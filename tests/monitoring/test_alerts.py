"""Alerts: what is sick is told once and in words, what is healthy is not, and one record at a time says the same."""

from __future__ import annotations

import io
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ExitConfig, MoEConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.configs.thaw import ThawConfig
from gt_jax.monitoring import alerts, layer_alerts
from gt_jax.monitoring.metrics import Recorder, read_metrics
from gt_jax.tasks.rows import rises
from gt_jax.training.price import phase
from tests.support import small_model

STEPS, LAYERS, EXPERTS = 400, 4, 8
RUN = RunConfig(
    model=small_model("DG*2", moe=MoEConfig(experts=EXPERTS, expert_width=16)), train=TrainConfig(steps=STEPS)
)
PLAIN = RUN.replace(model=RUN.model.plain)
COURSE = alerts.Course(RUN)


def healthy(config: RunConfig = RUN, seed: int = 0, noise: float = 0.1, steps: int = STEPS) -> list[dict]:
    """Records as a run of `config` writes them, like those of the presets: noisy batches, a falling loss."""
    random, found, course = np.random.default_rng(seed), [], alerts.Course(config)
    adaptive = config.model.adaptive is not None
    for step in range(1, steps + 1):
        forced = adaptive and course.forced(step)
        loss = (1.5 + 4 * np.exp(-step / 40)) * np.exp(noise * random.normal())
        weight = np.full(LAYERS, 2.0) if forced else 1.05 + 0.4 * random.random(LAYERS)
        passes = weight if forced else weight + 0.8
        depth = {"mean_weight": weight, "passes_run": passes, "passes_computed": np.ceil(passes)}
        found.append({
            "step": step, "loss": loss, "gradient_norm": (1 + 20 * np.exp(-step / 10)) * np.exp(0.5 * random.normal()),
            "price": 1e-4, **{name: (of if adaptive else np.ones(LAYERS)).tolist() for name, of in depth.items()},
            "delta_ratio": [9.9, *(0.2 + 0.5 * random.random(LAYERS - 1))],
            "null_rate": (0.5 + 0.05 * random.normal(size=LAYERS)).tolist(),
            "experts": random.dirichlet(np.full(EXPERTS, 5.0), LAYERS).tolist(),
        })  # fmt: skip
        if adaptive:
            gate = {"mean": 0.5 if forced else 0.2, "std": 0.5 if forced else 0.1, "floored": 0.5 if forced else 0.02}
            found[-1] |= {f"gate_{name}": [value] * LAYERS for name, value in gate.items()}
    return found


def changed(records: list[dict], first: int, last: int, **changes: object) -> list[dict]:
    """The records with other values from step `first` to `last`; a function is given the value that there was."""
    def apply(record: dict) -> dict:
        if not first <= record["step"] <= last:
            return record
        return {**record, **{name: change(record[name]) if callable(change) else change
                             for name, change in changes.items()}}

    return [apply(record) for record in records]


def at(place: int, value: object):
    """A list with one entry replaced."""
    return lambda old: [*old[:place], value, *old[place + 1 :]]


def starved(old: list[list[float]]) -> list[list[float]]:
    row = [0.001, *(0.999 / (EXPERTS - 1) for _ in range(EXPERTS - 1))]
    return [*old[:2], row, *old[3:]]


SICK = {
    "a gate shut": ("all tokens halt at once", "layer 2", {"passes_run": at(2, 1.01)}, "at most 1.010 passes"),
    "a gate open": ("no token halts", "layer 1", {"passes_run": at(1, 4.0), "mean_weight": at(1, 3.97)},
                    "at least 4.000 of 4 passes, which weigh at least 3.970 of 4"),
    "NaN in a layer": ("a layer is not finite", "layer 1", {"delta_ratio": lambda old: [old[0], *[np.nan] * 3],
                       "gate_mean": at(1, np.inf)}, "delta_ratio, gate_mean; nor are layer 2, layer 3"),
    "starved": ("an expert starves", "layer 2, expert 0", {"experts": starved}, "its fair share is 12 %"),
    "all null": ("a null rate is at its end", "layer 1", {"null_rate": at(1, 1.0)}, "no token reaches an expert"),
    "no null": ("a null rate is at its end", "layer 3", {"null_rate": at(3, 0.0)}, "every token pays"),
    "floor": ("a gate saturates", "layer 0", {"gate_floored": at(0, 1.0), "gate_mean": at(0, 0.01)}, "at its floor"),
    "top": ("a gate saturates", "layer 2", {"gate_mean": at(2, 0.999), "gate_std": at(2, 0.001)}, "p is 0.999"),
    "gradient": ("the gradient norm spikes", "", {"gradient_norm": 60.0}, "times the median"),
    "gradient not finite": ("the gradient norm spikes", "", {"gradient_norm": np.inf}, "is inf"),
    "loss": ("the loss spikes", "", {"loss": 5.0}, "standard deviations above"),
    "loss not finite": ("the loss spikes", "", {"loss": np.nan}, "is nan"),
    "divergence": ("the loss diverges", "", {"loss": lambda old: 1.4 * old}, "go back to a checkpoint"),
    "explodes": ("an update explodes", "layer 1", {"delta_ratio": at(1, 9.0)}, "lower --learning-rate"),
    "vanishes": ("an update vanishes", "layer 3", {"delta_ratio": at(3, 2e-4)}, "does nothing"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("config", [RUN, PLAIN], ids=["adaptive", "plain"])
def test_a_healthy_run_raises_nothing(config, seed):
    for noise in (0.0, 0.2):
        assert alerts.alerts(healthy(config, seed, noise), config) == []


@pytest.mark.parametrize("name", SICK)
def test_each_sickness_is_told_once_and_ends(name):
    sickness, place, changes, words = SICK[name]
    # a spike is told at once and forgotten when it is what is usual; the others after as many records as must agree
    at_once = "spikes" in sickness or "finite" in sickness
    first, last = (300, 303) if at_once else (250, 310)
    found = alerts.alerts(changed(healthy(), first, last, **changes), RUN)
    assert [(alert.sickness, alert.where) for alert in found] == [(sickness, place)]
    (alert,) = found
    assert words in alert.words and first <= alert.first <= first + 2 * alerts.PATIENCE
    assert alert.last is not None and first <= alert.last <= last + 2 * alerts.PATIENCE
    assert (alert.first == first) == at_once


def test_a_gate_within_a_bound_has_its_top_there():
    """With the logit bound at 5 no p comes near 1."""
    bound = RUN.replace(model=RUN.model.replace(adaptive=RUN.model.adaptive.replace(logit_bound=5.0)))
    stuck = changed(healthy(), 250, 310, gate_mean=at(2, 0.9925), gate_std=at(2, 0.001))
    assert alerts.alerts(stuck, RUN) == []
    (alert,) = alerts.alerts(stuck, bound)
    assert (alert.sickness, alert.where) == ("a gate saturates", "layer 2") and "its top is 0.993" in alert.words


def test_what_is_not_finite_in_one_layer_hides_nothing_in_another():
    sick = changed(healthy(), 250, 310, delta_ratio=lambda old: [old[0], np.nan, 2e-4, old[3]],
                   gate_floored=lambda old: [1.0, np.nan, *old[2:]])  # fmt: skip
    found = {(alert.sickness, alert.where) for alert in alerts.alerts(sick, RUN)}
    assert found == {("a layer is not finite", "layer 1"), ("an update vanishes", "layer 2"),
                     ("a gate saturates", "layer 0")}  # fmt: skip


def test_what_lasts_to_the_end_is_not_over():
    (alert,) = alerts.alerts(changed(healthy(), 300, STEPS, delta_ratio=at(2, 0.0)), RUN)
    assert alert.last is None
    assert next(alerts.texts([alert])).startswith(f"from step {alert.first} on: layer 2 does nothing")


def test_one_pass_is_no_sickness_where_it_is_wanted():
    one = {"passes_run": [1.0] * LAYERS, "mean_weight": [1.0] * LAYERS}
    price = RUN.train.price
    assert alerts.alerts(changed(healthy(), 200, STEPS, **one, price=price.highest), RUN) == []
    wanted = RUN.replace(train=RUN.train.replace(price=price.replace(target=1.0)))
    assert alerts.alerts(changed(healthy(), 200, STEPS, **one), wanted) == []
    assert alerts.alerts(changed(healthy(PLAIN), 1, STEPS, **one), PLAIN) == []


def test_under_batch_halting_passes_are_those_of_the_batch_and_not_what_is_steered():
    every = {"passes_run": [4.0] * LAYERS, "mean_weight": [2.0] * LAYERS}
    price = RUN.train.price.replace(target_of="passes_run")
    by_token = RUN.replace(train=RUN.train.replace(price=price))
    gates = RUN.model.adaptive.replace(halting="batch")
    by_batch = by_token.replace(model=RUN.model.replace(adaptive=gates))
    records = changed(healthy(), 200, STEPS, **every)
    assert {one.sickness for one in alerts.alerts(records, by_token)} == {"no token halts"}
    assert alerts.alerts(records, by_batch) == []


def test_all_passes_under_a_capped_gate_are_all_there_are():
    price = RUN.train.price
    first, last = round(price.forced_until * STEPS) + 1, round(price.clipped_until * STEPS)
    at_cap = sum(price.p_max**k for k in range(4))
    found = alerts.alerts(changed(healthy(), first, last, mean_weight=[at_cap] * LAYERS), RUN)
    assert [(alert.sickness, alert.where) for alert in found] == [("no token halts", f"layer {n}") for n in range(4)]
    assert f"of {at_cap:.3f}" in found[0].words
    below = 1 + 0.9 * (at_cap - 1)
    assert alerts.alerts(changed(healthy(), first, last, mean_weight=[below] * LAYERS), RUN) == []


def test_a_weight_is_not_a_pass():
    """Gates of 0.10 for all tokens weigh 1.10 and run two passes; gates of 0.5 weigh 1.88 and run all four."""
    barely = changed(healthy(), 200, STEPS, mean_weight=[1.01] * LAYERS)
    assert alerts.alerts(barely, RUN) == [], "it was taken for one pass"
    price = RUN.train.price.replace(target=2.0, target_of="passes_run")
    steered = RUN.replace(train=RUN.train.replace(price=price))
    all_run = changed(healthy(), 200, STEPS, mean_weight=[1.88] * LAYERS, passes_run=[4.0] * LAYERS)
    assert alerts.alerts(all_run, RUN) == [] and len(alerts.alerts(all_run, steered)) == LAYERS
    wanted = RUN.replace(train=RUN.train.replace(price=price.replace(target=4.0)))
    assert len(alerts.alerts(all_run, wanted)) == LAYERS, "also where it is wanted: nothing is left to decide"


def test_two_forced_passes_of_two_are_not_that_none_halts():
    two = RUN.replace(model=RUN.model.replace(adaptive=RUN.model.adaptive.replace(alpha=(1.0, 0.7))))
    assert alerts.alerts(healthy(two), two) == []


def test_without_null_experts_no_pick_is_null():
    dense = RUN.replace(model=RUN.model.replace(moe=RUN.model.moe.replace(real_share=1.0)))
    assert alerts.alerts(changed(healthy(), 1, STEPS, null_rate=[0.0] * LAYERS), dense) == []


def test_experts_that_nobody_is_routed_to_are_one_sickness():
    found = alerts.alerts(changed(healthy(), 200, 300, null_rate=at(1, 1.0), experts=at(1, [0.0] * EXPERTS)), RUN)
    assert [(alert.sickness, alert.where) for alert in found] == [("a null rate is at its end", "layer 1")]


def test_tokens_that_leave_the_stack_at_once():
    leaving = PLAIN.replace(model=PLAIN.model.replace(moe=None, exit=ExitConfig()))
    for reached in (1, 3):  # layers; the mean over them is 1 or 2.9, and would hide that the last is never reached
        shares = [1.0] * reached + [0.0] * (LAYERS - reached)
        records = [{"step": step, "loss": 2.0, "passes_run": shares if step > 200 else [1.0] * LAYERS}
                   for step in range(1, 300)]  # fmt: skip
        (alert,) = alerts.alerts(records, leaving)
        assert (alert.sickness, alert.where) == ("a layer is not reached", f"layer {reached}")
        assert 200 < alert.first <= 200 + alerts.PATIENCE


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted))
def test_what_is_advised_is_accepted(phases):
    price = PriceConfig(forced_until=phases[0], price_from=phases[1], clipped_until=phases[2])
    longer = layer_alerts.longer_forced(price)
    said = {name: float(f"{value:g}") for name, value in longer.items()}
    assert longer == {} or price.replace(**said).forced_until > price.forced_until
    assert longer or price.forced_until > 0.8


def test_forced_passes_for_longer_are_advised_with_all_that_they_move():
    found = alerts.alerts(changed(healthy(), 200, 300, passes_run=at(0, 1.0)), RUN)
    assert "initial_bias (now -1)" in found[0].words
    assert "forced_until 0.4, price_from 0.45, clipped_until 0.45" in found[0].words


def test_the_end_of_a_thaw_is_no_spike():
    thawing = PLAIN.replace(train=TrainConfig(steps=STEPS, thaw=ThawConfig(layers=(0,), steps=200)))
    records = changed(healthy(PLAIN), 1, 200, gradient_norm=lambda old: old / 100)
    assert alerts.alerts(records, thawing) == [] and alerts.alerts(records, PLAIN) != []


def test_harder_questions_are_no_divergence_and_a_solved_task_no_noise():
    data = DataConfig(tasks=("pointer_jumps:hardest=3,symbols=8,queries=4",), batch_size=4, curriculum_rows=4 * 200)
    run = PLAIN.replace(data=data)
    assert rises(data.tasks, data.curriculum_rows, data.batch_size) == {101, 201}
    solved = changed(healthy(PLAIN), 1, STEPS, loss=lambda loss: 1e-5 * loss, gradient_norm=lambda norm: 1e-4 * norm)
    harder = changed(changed(solved, 101, 130, loss=2.0, gradient_norm=3.0), 201, 240, loss=2.0, gradient_norm=3.0)
    assert alerts.alerts(harder, run) == []
    assert {one.sickness for one in alerts.alerts(harder, PLAIN)} >= {"the loss spikes", "the loss diverges"}
    before = [{**record, "step": record["step"] - 60} for record in harder if record["step"] > 60]
    started = run.replace(start="run/60")  # goes on in the rows of another run
    assert alerts.alerts(before, started, 60) == [] != alerts.alerts(before, started)
    lost = changed(harder, 300, STEPS, loss=2.0)
    assert [one.first for one in alerts.alerts(lost, run)][:1] == [300], "what was learned and is lost is told"


def test_a_loss_that_begins_by_rising_diverges():
    rising = changed(healthy(), 2, 40, loss=lambda old: old + 5)
    (alert,) = alerts.alerts(rising, RUN)
    assert alert.sickness == "the loss diverges" and alert.first == alerts.PATIENCE
    # the first batch of a model that was trained before may be an easy one
    easy = changed(healthy(), 1, 1, loss=0.9)
    assert alerts.alerts(easy, RUN.replace(start="grown")) == []


def test_fresh_routers_are_left_to_find_their_null_experts():
    begun = round(alerts.ROUTERS_FROM * STEPS)
    assert alerts.alerts(changed(healthy(), 1, begun, null_rate=[0.0] * LAYERS), RUN) == []
    later = alerts.alerts(changed(healthy(), 1, begun + 40, null_rate=[0.0] * LAYERS), RUN)
    assert [alert.where for alert in later] == [f"layer {layer}" for layer in range(LAYERS)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_records_without_some_values_are_read(data):
    names = data.draw(st.sets(st.sampled_from(sorted(set(healthy(steps=1)[0]) - {"step"}))))
    records = [{name: value for name, value in record.items() if name not in names} for record in healthy(steps=150)]
    assert alerts.alerts([{"step": 0, "held_out_loss": 9.0}, *records], RUN) == []


@pytest.mark.parametrize(("steps", "price"), [(400, PriceConfig()), (37, PriceConfig(audit_every=3, forced_until=0.1))])
def test_the_course_is_the_schedule_of_the_training_step(steps, price):
    course = alerts.Course(RUN.replace(train=TrainConfig(steps=steps, price=price)))
    for step in range(1, steps + 1):
        control = phase(price, jnp.asarray(step - 1), steps, 4).control
        assert course.forced(step) == (int(control.forced) > 0)
        assert course.cap(step) == pytest.approx(float(control.p_max))


def test_a_recorder_tells_once_also_across_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = changed(healthy(steps=150), 60, 150, delta_ratio=at(2, 0.0))

    def log(records: list[dict], resume_step: int | None = None) -> list[str]:
        stream = io.StringIO()
        with Recorder(path, stream=stream, resume_step=resume_step, watch=alerts.Watch(RUN)) as recorder:
            for record in records:
                recorder.log(**record)
        return [line for line in stream.getvalue().splitlines() if not line.startswith("step ")]

    (told,) = log(records[:120])
    assert told.startswith("alert, step 79: ") and "layer 2 does nothing" in told
    assert log(records[100:], resume_step=100) == []
    assert [a.first for a in alerts.alerts(read_metrics(path), RUN)] == [int(told.split()[2].rstrip(":"))]
    assert log(records[70:], resume_step=70) == [told]


def test_messages_come_with_the_record_that_shows_it():
    records = changed(healthy(), 300, 300, loss=9.0)
    watch = alerts.Watch(RUN)
    said = list(itertools.chain.from_iterable((record["step"], text) for record in records for text in watch(record)))
    assert said[0] == 300 and said[1].startswith("alert, step 300: the loss is 9")
    assert said[2:] == [300 + alerts.CALM, f"over, step {300 + alerts.CALM}: the loss spikes"]
