"""Going on from where a training stood: no rise of the rate, no phase of the price twice, the user's word wins."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gt_jax.configs.lineage import LINEAGE, carried
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.configs.standing import REWARM, going_on, gone_on, longer, plateau_end, standing, stood
from gt_jax.errors import Refused

TRAIN = TrainConfig(steps=400, optimizer=OptimizerConfig(learning_rate=3e-3))  # warm-up to 20, plateau to 320
OPTIMIZER = st.fixed_dictionaries({
    "schedule": st.sampled_from(["wsd", "cosine"]), "warmup": st.floats(0, 0.2), "decay": st.floats(0.05, 0.5),
    "final": st.floats(0.01, 0.5), "learning_rate": st.floats(1e-4, 1e-1)})  # fmt: skip


def rates(train):
    return [train.optimizer.rate(step, train.steps) for step in range(train.steps + 1)]


@given(OPTIMIZER, st.integers(20, 500), st.floats(0, 1), st.integers(1, 500))
def test_a_training_that_goes_on_never_has_a_higher_rate_nor_ends_on_another(optimizer, of, share, steps):
    before, step = TrainConfig(steps=of, optimizer=OptimizerConfig(**optimizer)), round(share * of)
    after, at = gone_on(before, step, steps), stood(before, step)
    here, there = rates(after), rates(before)
    warm, _, down = after.optimizer.boundaries(steps)
    assert max(here) <= max(there[step:]) * (1 + 1e-9)
    assert warm + down > steps or here[-1] == pytest.approx(there[-1]), "the lowest rate is the same"
    assert max(here) == pytest.approx(at.peak if at.phase == "warm-up" else at.learning_rate)
    assert (after.optimizer.decay, after.optimizer.schedule) == (before.optimizer.decay, before.optimizer.schedule)
    if at.phase != "warm-up":
        assert warm == max(1, min(REWARM, steps // 10))


def test_the_phases():
    assert [stood(TRAIN, step).phase for step in (0, 19, 20, 320, 321, 400)] == [
        "warm-up", "warm-up", "plateau", "plateau", "decay", "decay"]
    assert stood(TRAIN, 320).learning_rate == 3e-3 and stood(TRAIN, 400).learning_rate == pytest.approx(3e-4)
    cosine = TRAIN.replace(optimizer=TRAIN.optimizer.replace(schedule="cosine"))
    assert [stood(cosine, step).phase for step in (19, 21)] == ["warm-up", "decay"]
    assert plateau_end(TRAIN) == 320 and plateau_end(cosine) is None
    assert plateau_end(TRAIN.replace(steps=2)) is None, "warm-up and decay fill it"


def test_the_plateau_goes_on_until_the_new_run_decays():
    after = gone_on(TRAIN, 320, 200)
    here = rates(after)
    assert here[10:161] == [3e-3] * 151 and here[-1] == pytest.approx(3e-4)


def test_a_rate_that_is_given_wins_and_a_rate_of_nothing_is_refused():
    given_ = gone_on(TRAIN, 400, 200, learning_rate=2e-3)
    assert max(rates(given_)) == 2e-3 and given_.optimizer.final == TRAIN.optimizer.final
    ended = TRAIN.replace(optimizer=TRAIN.optimizer.replace(final=0.0))
    with pytest.raises(Refused, match="--learning-rate"):
        gone_on(ended, 400, 200)
    with pytest.raises(Refused, match=r"learning_rate is -1\.0"):  # what was given, and is wrong
        gone_on(TRAIN, 400, 200, learning_rate=-1.0)
    with pytest.raises(Refused, match="steps"):
        gone_on(TRAIN, 400, 0)


@given(st.integers(0, 1000), st.integers(1, 3000))
def test_what_is_left_of_the_prices_phases_lasts_as_many_steps_and_lambda_moves_as_fast(done, steps):
    price, of = PriceConfig(), 1000
    after = price.after(done, of, steps)
    for name in ("forced_until", "price_from", "clipped_until"):
        left = max(0.0, getattr(price, name) * of - done)
        assert getattr(after, name) * steps == pytest.approx(left), name
        # and in the run after that, however short this one is
        then = after.after(steps, steps, 100)
        assert getattr(then, name) * 100 == pytest.approx(max(0, left - steps), abs=1e-6), name
    assert after.rate / steps == pytest.approx(price.rate / of)
    assert after.settled_after * steps == pytest.approx(price.settled_after * of)
    assert after.target == price.target


def test_metadata_say_where_the_newest_training_stood(tmp_path):
    trained = {"kind": "train", "step": 320, "run": {"train": TRAIN.to_json()}}
    grown = {"kind": "grown", "step": 0, "grown_from": {}, LINEAGE: carried(trained)}
    assert standing(trained) == standing(grown) == stood(TRAIN, 320) and standing({"kind": "converted"}) is None
    assert "step 320 of 400, on the plateau of its wsd schedule, at a learning rate of 0.003" in standing(grown).line()
    assert standing(grown).warnings(tmp_path / "320") == []
    late, = stood(TRAIN, 400).warnings(tmp_path / "400")
    assert "decay" in late and "a checkpoint of step 320 or earlier" in late
    (tmp_path / "320").mkdir()
    assert f"{tmp_path / '320'} stands at the end of the plateau" in stood(TRAIN, 400).warnings(tmp_path / "400")[0]
    assert "10 % of its peak" in stood(TRAIN, 400).line()


def test_more_steps_leave_the_beginning_where_it_was() -> None:
    """Warm-up, forced passes and the price's phases at the same steps, lambda at the same speed; the decay is later."""
    before = TrainConfig(steps=400, price=PriceConfig(forced_ramp=0.1))
    after = longer(before, 1000)
    assert after.optimizer.boundaries(1000) == (20, 800, 200) and before.optimizer.boundaries(400) == (20, 320, 80)
    for name in ("forced_until", "forced_ramp", "price_from", "clipped_until", "settled_after"):
        assert getattr(after.price, name) * 1000 == pytest.approx(getattr(before.price, name) * 400)
    assert after.price.rate / 1000 == pytest.approx(before.price.rate / 400)
    rates = [one.optimizer.rate(step, one.steps) for one in (before, after) for step in (0, 10, 100, 320)]
    assert rates[:4] == pytest.approx(rates[4:])


def test_what_more_steps_mean_is_said(tmp_path: Path) -> None:
    before = TrainConfig(steps=100)
    assert going_on(before, before, 40, tmp_path) == []
    assert len(going_on(before, longer(before, 200), 40, tmp_path)) == 1  # from the plateau nothing rises
    falls, rises = going_on(before, longer(before, 200), 100, tmp_path)
    assert "falls after step 160, not 80" in falls and "rises again, from 0.0003 to 0.003" in rises
    cosine = before.replace(optimizer=before.optimizer.replace(schedule="cosine"))
    (tmp_path / str(stood(cosine, 100).top)).mkdir()
    ends, rises = going_on(cosine, longer(cosine, 200), 100, tmp_path)
    assert "the cosine of the learning rate ends there" in ends and "plateau" not in rises, "it has none"
