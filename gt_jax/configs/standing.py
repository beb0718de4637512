"""Where in its schedule a training stood, as the metadata of a checkpoint say, and how another one goes on from there.

- It goes on at the rate at which the earlier one stood, and falls as far as that one would have: from the plateau of a
  WSD schedule the rate neither rises nor falls, until the new run's own decay. From within a decay it goes on lower:
  a higher rate would lose at once what the decay has won.
- Where the optimizer's moments are fresh, the rate warms up again in a few steps.
- The price's phases that are over do not come again (`PriceConfig.after`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gt_jax.configs.lineage import chain, trainings
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import MomentsOf, TrainConfig
from gt_jax.errors import Refused

REWARM = 10
"""Steps of the warm-up where a training goes on with fresh moments; at most a tenth of its steps."""

Phase = Literal["warm-up", "plateau", "decay"]


class Standing(NamedTuple):
    """A training after `step` of `steps` steps: phase of the schedule, rate of its next step, its peak, and `top`, the
    step after which the rate falls."""

    step: int
    steps: int
    schedule: str
    phase: Phase
    learning_rate: float
    peak: float
    top: int

    def to_json(self) -> dict[str, Any]:
        """What a grown checkpoint keeps of its source."""
        return self._asdict()

    def line(self) -> str:
        """Step, phase and rate in words."""
        where = {"warm-up": "in the warm-up", "plateau": "on the plateau"}.get(self.phase, "in the decay")
        where += f" (since step {self.top})" if self.phase == "decay" else ""
        share = "" if self.learning_rate == self.peak else f", {100 * self.learning_rate / self.peak:.0f} % of its peak"
        return (f"at step {self.step} of {self.steps}, {where} of its {self.schedule} schedule, at a learning rate of "
                f"{self.learning_rate:.3g}{share}")

    def warnings(self, source: Path) -> list[str]:
        """What to know before more is made of the checkpoint `source`: nothing, unless its rate was falling."""
        if self.phase != "decay":
            return []
        better = source.parent / str(self.top)
        if self.schedule == "cosine":
            instead = "a cosine has no plateau to start from: train the source with --schedule wsd"
        elif better.is_dir():
            instead = f"{better} stands at the end of the plateau: take that"
        else:
            instead = f"take a checkpoint of step {self.top} or earlier"
        return ["the source stood in the decay of its schedule: what the decay won is lost where the rate rises again, "
                f"and at {self.learning_rate:.3g} a child learns slowly; {instead}"]


def standing(metadata: Mapping[str, Any]) -> Standing | None:
    """Where the newest training in a checkpoint's lineage stood; None where there is none, or it does not say."""
    run = next(iter(trainings(metadata)), None)
    if run is None or not isinstance(run.get("step"), int):
        return None
    return stood(TrainConfig.from_json(run["run"].get("train", {})), run["step"])


def stood(train: TrainConfig, step: int) -> Standing:
    """Where a training stands after `step` steps; the step that ends the plateau still has its rate."""
    optimizer, steps = train.optimizer, train.steps
    warm, top, _ = optimizer.boundaries(steps)
    phase: Phase = "warm-up" if step < warm else "plateau" if step <= top else "decay"
    return Standing(step, steps, optimizer.schedule, phase, optimizer.rate(step, steps), optimizer.learning_rate, top)


def plateau_end(train: TrainConfig) -> int | None:
    """The step after which a WSD rate falls, where there is a plateau before it."""
    warm, top, _ = train.optimizer.boundaries(train.steps)
    return top if train.optimizer.schedule == "wsd" and warm < top < train.steps else None


def gone_on(
    before: TrainConfig, step: int, steps: int, learning_rate: float | None = None, moments: MomentsOf = "fresh",
) -> TrainConfig:  # fmt: skip
    """A training of `steps` steps that follows step `step` of `before`: its optimizer and price, gone on with.

    rate = that of the next step of `before` (its peak, where it was warming up, after a warm-up of the steps that were
    left), with fresh moments after a short warm-up; lowest rate = that of `before`; the share of the decay is kept. A
    `learning_rate` that is given is the peak instead, and the lowest rate the same share of it as in `before`. Parts of
    a batch and the precision of products are those of `before`; all else is at its default. Raises `Refused` where
    `before` stood at 0.
    """
    plain, at, optimizer = TrainConfig(steps=steps), stood(before, step), before.optimizer
    left = optimizer.boundaries(before.steps)[0] - step if at.phase == "warm-up" else 0
    own = at.peak if at.phase == "warm-up" else at.learning_rate
    rate = own if learning_rate is None else learning_rate
    if rate <= 0 and learning_rate is None:
        raise Refused(f"the training that this goes on from stood {at.line()}; give --learning-rate")
    warm = min(steps, max(left, 1, min(REWARM, steps // 10) if moments == "fresh" else 1))
    lowest = optimizer.final * (at.peak / rate if learning_rate is None else 1.0)
    return plain.replace(
        optimizer=optimizer.replace(learning_rate=rate, warmup=warm / steps, final=min(1.0, lowest)),
        price=before.price.after(step, before.steps, steps),
        moments=moments, accumulate=before.accumulate, matmul_precision=before.matmul_precision,
    )  # fmt: skip


def with_opening(train: TrainConfig, metadata: Mapping[str, Any]) -> TrainConfig:
    """`train` with the schedule that opens the gates of a checkpoint that was retrofitted last.

    It may have been written out and read back since.
    """
    steps = [step for step in chain(metadata) if step["kind"] not in ("exported", "converted")]
    made = steps[-1].get("retrofitted_from") if steps else None
    if made is None:
        return train
    price = PriceConfig.from_json(made["price"])
    scale = 10.0 if price.rule == "budget" else 1.0
    return train.replace(price=price, optimizer=train.optimizer.replace(halting_scale=scale))


def longer(train: TrainConfig, steps: int) -> TrainConfig:
    """The training with more `steps`: what its fractions said of the beginning stays at the steps where it was.

    That is the warm-up, and the phases and the speed of the price. The decay is the same share of the new number of
    steps, so it comes later.
    """
    warm = train.optimizer.boundaries(train.steps)[0]
    optimizer = train.optimizer.replace(warmup=warm / steps)
    return train.replace(steps=steps, optimizer=optimizer, price=train.price.after(0, train.steps, steps))


def going_on(before: TrainConfig, train: TrainConfig, step: int, run: Path) -> list[str]:
    """What to say of a run that is resumed after `step` steps, its config then and now: nothing, where it just goes on.

    Of one that is done, how it goes on; of one with more steps what they do to its learning rate.
    """
    if train.steps == before.steps:
        return [f"all {step} steps are done; --resume --steps {2 * step} goes on"] if step >= train.steps else []
    old, new = stood(before, step), stood(train, step)
    falls = ("the cosine of the learning rate ends there" if train.optimizer.schedule == "cosine" else
             f"the learning rate falls after step {new.top}" + (f", not {old.top}" if new.top != old.top else ""))
    told = [f"{train.steps} steps instead of {before.steps}: {falls}; warm-up and the phases of the price "
            "stay where they were"]
    if new.learning_rate > 1.01 * old.learning_rate:
        plateau = run / str(old.top)
        better = f"; a new run with --start {plateau} goes on from the end of the plateau instead"
        told.append(f"the rate rises again, from {old.learning_rate:.3g} to {new.learning_rate:.3g}: what the decay "
                    f"had won is lost first{better if plateau_end(before) is not None and plateau.is_dir() else ''}")
    return told
