"""Growth from the plateau, and training on: the held-out loss rises no more than the source's own does."""

import numpy as np
import pytest

from gt_jax import train
from gt_jax.checkpoints.opened import open_checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.lineage import LINEAGE
from gt_jax.configs.model import AdaptiveConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig, budget
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.evaluation.measurement import measure_checkpoint
from gt_jax.growth import repetition
from gt_jax.growth.plan import make_plan
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.monitoring.metrics import read_metrics
from gt_jax.training import loop
from gt_jax.training.loop import train_run
from gt_jax.training.price import initial_price
from tests.support import small_model

STEPS, TOP, MORE = 125, 100, 25
MODEL = small_model("D", init_std=0.1).replace(adaptive=AdaptiveConfig(alpha=(1.0, 0.7), initial_bias=1.0))


def source(place, seed=0):
    """An adaptive model trained on the library's sources to the end of its decay; the plateau ended at TOP."""
    optimizer = OptimizerConfig(learning_rate=5e-3)
    training = TrainConfig(steps=STEPS, seed=seed, evaluate_every=0, checkpoint_every=STEPS, keep=1,
                           optimizer=optimizer, price=PriceConfig(target=1.6))  # fmt: skip
    data = DataConfig(sequence_length=64, batch_size=4, seed=seed)
    train_run(place, RunConfig(model=MODEL, data=data, train=training), show=False)
    return place


def goes_on(place, start, *words):
    """The metrics of MORE steps from `start`, by the command's own rules: the held-out loss after each."""
    flags = ["--start", str(start), "--steps", str(MORE), "--evaluate-every", "1", "--checkpoint-every", "0"]
    arguments = train.parser().parse_args([str(place), *flags, *words])
    train_run(place, train.run_config(arguments, train.default_config(arguments)), show=False)
    return read_metrics(place / "metrics.jsonl")


def held_out(lines):
    return np.array([line["held_out_loss"] for line in lines if "held_out_loss" in line])


def steps_of(lines):
    return [line for line in lines if "loss" in line]


def rise(losses):
    """By how much the loss was above the least before, at most."""
    return float(np.max(losses - np.minimum.accumulate(losses)))


def grown(place, run):
    """Twice as deep, by the passes that the source uses."""
    counts = repetition.from_json(measure_checkpoint(run, None, 8))
    plan = make_plan("dealt", counts, open_checkpoint(run).config.depth, round="balance", target_layers=2)
    grow_checkpoint(run, place, plan=plan, noise_std=1e-4)
    return place


@pytest.mark.slow
def test_no_rise_after_growth_beyond_that_of_the_source_trained_on(tmp_path):
    """By two seeds the source's rises were 0.002 and 0.008 nats, the child's 0.001 and 0.006; with fresh moments 0.019.

    The source trained on begins where it stood in all that can be seen in its first step.
    """
    run = source(tmp_path / "source")
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [str(TOP), str(STEPS)]
    alone = goes_on(tmp_path / "alone", run / str(TOP))
    deep = goes_on(tmp_path / "deep", grown(tmp_path / "grown", run / str(TOP)))
    assert rise(held_out(deep)) <= rise(held_out(alone)) + 0.006
    assert held_out(deep)[-1] < held_out(deep)[0] - 0.05, "and it learns"
    begun, before = steps_of(alone), steps_of(read_metrics(run / "metrics.jsonl"))[TOP:]
    for step in (0, 1):  # the second says that moments and rate are those of then
        for name in ("loss", "price", "gradient_norm", "passes_run"):
            np.testing.assert_allclose(begun[step][name], before[step][name], rtol=1e-3, err_msg=f"{name} {step}")


def test_the_price_of_a_model_made_from_another_goes_on_where_that_stood():
    """As of an adaptive child: it has no training of its own, its lineage knows the price."""
    fresh = initial_price(PriceConfig())
    trained = {"kind": "train", "run": {}, "price": 0.02}
    price, words = loop._price_of("there", {}, {"kind": "grown", "grown_from": {}, LINEAGE: [trained]}, fresh,
                                  PriceConfig())  # fmt: skip
    assert float(price.value) == pytest.approx(0.02) and "0.02" in words
    price, words = loop._price_of("there", {}, {"kind": "converted"}, fresh, PriceConfig())
    assert price is fresh and "anew" in words
    run = RunConfig(model=small_model(), train=TrainConfig(price=budget(None, value=0.02))).to_json()
    price, words = loop._price_of("there", {}, {"kind": "grown", LINEAGE: [{**trained, "run": run}]}, fresh,
                                  PriceConfig())  # fmt: skip
    assert price is fresh and words.endswith("that of there is of rule 'budget'"), "nats a pass are no lambda"
