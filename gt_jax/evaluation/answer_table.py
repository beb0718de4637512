"""Is depth used? Accuracy and passes by difficulty, and what fewer passes cost: all layers' at once, and each layer's.

- *free*: passes as the halting heads choose. *forced k*: k passes of every layer, each at full strength. *cut i*: layer
  i runs once, the others choose; beside it stands the layer's `k_exec` on the same rows.
- A cost is accuracy free less accuracy forced or cut, of the same answers: its interval is the paired one.
- *hardest* are the hardest third of the difficulties that are asked, rounded up.
- Passes are means over layers: 1 is every layer once. Spearman's correlation is of the passes of each token with its
  difficulty; None where one of them is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.answers import Answers, Asked, answers, asked
from gt_jax.evaluation.confidence_intervals import Interval, ratio_interval
from gt_jax.evaluation.measurement import k_exec
from gt_jax.evaluation.proportions import difference_interval, proportion_interval
from gt_jax.evaluation.rank_correlation import spearman
from gt_jax.models.language_model import fixed_passes, free_passes
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.training.step import Batch
from gt_jax.typing import Tree

CONFIDENCE = 0.95
Say = Callable[[str], None]


class Accuracy(NamedTuple):
    """Shares of right answers: of all, of the hardest third of difficulties, and by difficulty."""

    all: Interval
    hardest: Interval
    by_difficulty: dict[int, Interval]


class Cost(NamedTuple):
    """By how much one accuracy is above another, over all answers and over the hardest: what is lost, or won."""

    all: Interval
    hardest: Interval


class Forced(NamedTuple):
    """Every layer at a number of passes; the cost is against free passes."""

    accuracy: Accuracy
    cost: Cost


class Cut(NamedTuple):
    """One layer forced to a single pass, beside how deep it runs on these rows."""

    layer: int
    kind: str
    k_exec: int
    passes_run: float
    accuracy: Interval
    cost: Cost


@dataclasses.dataclass(frozen=True)
class AnswerTable:
    """What `answer_table` found; the module says what the words mean. `forced` is by number of passes."""

    answers: int
    instances: int
    hardest: tuple[int, ...]
    accuracy: Accuracy
    nats: Interval
    passes: dict[int, Interval]
    passes_by_layer: dict[int, tuple[float, ...]]
    spearman: Interval | None
    forced: dict[int, Forced]
    cuts: tuple[Cut, ...]
    right: Bool[np.ndarray, " n"] = dataclasses.field(repr=False, compare=False)
    where: Asked = dataclasses.field(repr=False, compare=False)

    def gain_over(self, other: AnswerTable) -> Cost:
        """By how much this model's share of right answers is above `other`'s, on the same batches: paired."""
        same = all(map(np.array_equal, self.where, other.where))
        if not same:
            raise ValueError("the tables are of other batches; compare models on the same ones")
        return _Units(self.where).cost(self.right, other.right)

    def to_json(self) -> dict[str, Any]:
        """Plain values: figures by difficulty as {"1": …}, and their limits [low, high] under `intervals`."""
        return {
            "answers": self.answers, "instances": self.instances, "confidence": CONFIDENCE,
            "hardest": list(self.hardest),
            "accuracy": _values(self.accuracy.by_difficulty),
            "accuracy_all": self.accuracy.all.value, "accuracy_hardest": self.accuracy.hardest.value,
            "nats": self.nats.value,
            "passes": _values(self.passes),
            "passes_by_layer": {str(key): list(value) for key, value in self.passes_by_layer.items()},
            "spearman": None if self.spearman is None else self.spearman.value,
            "accuracy_forced": {str(k): _values(one.accuracy.by_difficulty) for k, one in self.forced.items()},
            "forced": {str(k): {"accuracy_all": one.accuracy.all.value,
                                "accuracy_hardest": one.accuracy.hardest.value, **_cost(one.cost)}
                       for k, one in self.forced.items()},
            "cuts": [{"layer": one.layer, "type": one.kind, "k_exec": one.k_exec, "passes_run": one.passes_run,
                      "accuracy_all": one.accuracy.value, **_cost(one.cost)} for one in self.cuts],
            "intervals": {
                "accuracy": _limits(self.accuracy.by_difficulty), "accuracy_all": _pair(self.accuracy.all),
                "accuracy_hardest": _pair(self.accuracy.hardest), "nats": _pair(self.nats),
                "passes": _limits(self.passes),
                "spearman": None if self.spearman is None else _pair(self.spearman),
                "accuracy_forced": {str(k): _limits(one.accuracy.by_difficulty) for k, one in self.forced.items()},
            },
        }  # fmt: skip


def _values(figures: dict[int, Interval]) -> dict[str, float]:
    return {str(key): one.value for key, one in figures.items()}


def _pair(one: Interval) -> list[float | None]:
    return [one.low, one.high]


def _limits(figures: dict[int, Interval]) -> dict[str, list[float | None]]:
    return {str(key): _pair(one) for key, one in figures.items()}


def _cost(cost: Cost) -> dict[str, Any]:
    return {"cost": cost.all.to_json(), "cost_hardest": cost.hardest.to_json()}


def answer_table(
    config: ModelConfig, variables: Tree, batches: Sequence[Batch], control: PassControl | None = None, *,
    forced: Sequence[int] | None = None, cuts: bool = True, rules: Rules | None = None,
    say: Say = lambda line: None,
) -> AnswerTable:  # fmt: skip
    """Evaluate a model in memory on the answers of batches with `difficulty`, as those of a task have.

    Args:
        config: of the model; a plain one has neither forced passes nor cuts.
        variables: its {"params", "statistics"}.
        batches: {"tokens", "targets", "segment_ids", "difficulty"}, int32 [b, t] each; targets -1 and difficulty 0
            where nothing is asked.
        control: passes; None leaves them to the halting heads.
        forced: numbers of passes to compare with; None is 1 to the most where passes are free, else none.
        cuts: whether each layer is cut to one pass too, where passes are free.
        rules: where arrays lie on the current mesh.
        say: hears of each run over the batches.

    Raises ValueError for batches without difficulties, and for those that ask for nothing.
    """
    where, most = asked(batches), 0 if config.adaptive is None else config.adaptive.max_passes
    units, free = _Units(where), control is None and most > 0

    def run(name: str, passes: PassControl) -> Answers:
        say(f"{name}: {len(batches)} batches")
        return answers(config, variables, batches, where, passes, rules)

    base = run("free passes" if free else "answers", control or free_passes())
    counts = (range(1, most + 1) if free else ()) if forced is None else forced
    runs = {k: run(f"{k} forced", fixed_passes(k)).right for k in counts if most}
    tally = base.passes.sum(axis=0)
    return AnswerTable(
        answers=len(where.difficulty), instances=units.count, hardest=units.hardest,
        accuracy=units.accuracy(base.right), nats=units.mean(base.nats, units.everyone),
        passes={d: units.mean(tally / len(base.passes), here) for d, here in units.of.items()},
        passes_by_layer={d: tuple(base.passes[:, here].mean(axis=1).tolist()) for d, here in units.of.items()},
        spearman=spearman(tally, where.difficulty, where.instance, CONFIDENCE),
        forced={k: Forced(units.accuracy(right), units.cost(base.right, right)) for k, right in runs.items()},
        cuts=_cuts(config, base, units, run) if cuts and free else (), right=base.right, where=where,
    )  # fmt: skip


def _cuts(
    config: ModelConfig, base: Answers, units: _Units, run: Callable[[str, PassControl], Answers]
) -> tuple[Cut, ...]:
    """Each layer forced to one pass; where no token runs a second one that changes nothing, and is not run."""
    found = []
    for layer, (kind, ran) in enumerate(zip(config.depth.types, base.ran, strict=True)):
        right = base.right
        if ran[1:].any():
            once = [int(other == layer) for other in range(len(config.depth))]
            right = run(f"layer {layer} cut", fixed_passes(once)).right
        cost, accuracy = units.cost(base.right, right), units.proportion(right, units.everyone)
        found.append(Cut(layer, kind, k_exec(ran), float(ran.sum()), accuracy, cost))
    return tuple(found)


class _Units:
    """Sums by instance, over all answers or some."""

    def __init__(self, where: Asked) -> None:
        self._instance, self.count = where.instance, int(where.instance.max()) + 1
        known = np.unique(where.difficulty).tolist()
        self.of = {d: where.difficulty == d for d in known}
        self.hardest = tuple(known[len(known) * 2 // 3 :])
        self.everyone = np.ones(len(where.difficulty), bool)
        self._hard = np.isin(where.difficulty, self.hardest)

    def _sums(self, values: Any, here: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " units"]:
        return np.bincount(self._instance[here], np.asarray(values, np.float64)[here], self.count)

    def mean(self, values: Any, here: Bool[np.ndarray, " n"]) -> Interval:
        asked_of = self._sums(self.everyone, here)
        there = asked_of > 0
        return ratio_interval(self._sums(values, here)[there], asked_of[there], CONFIDENCE)

    def proportion(self, right: Bool[np.ndarray, " n"], here: Bool[np.ndarray, " n"]) -> Interval:
        return proportion_interval(self._sums(right, here), self._sums(self.everyone, here), CONFIDENCE)

    def accuracy(self, right: Bool[np.ndarray, " n"]) -> Accuracy:
        """Of all, of the hardest, and by difficulty."""
        by_difficulty = {d: self.proportion(right, here) for d, here in self.of.items()}
        return Accuracy(self.proportion(right, self.everyone), self.proportion(right, self._hard), by_difficulty)

    def cost(self, before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"]) -> Cost:
        """Accuracy before less accuracy after, of the same answers."""
        lost = before.astype(np.float64) - after
        everyone, hard = (difference_interval(self._sums(lost, here), self._sums(self.everyone, here), CONFIDENCE)
                          for here in (self.everyone, self._hard))  # fmt: skip
        return Cost(everyone, hard)
