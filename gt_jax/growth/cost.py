"""What a growth buys, known before a byte is written: layers, parameters, and the price of a token before and after.

    ratio = forward FLOPs of the child / forward FLOPs of the source at the passes a token runs

Both as `models.flops` counts them, for rows of one length. An adaptive source is charged the passes that a token runs,
not the weight of those passes: a pass at weight 0.3 costs as much as one at weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.lineage import trainings
from gt_jax.configs.model import ModelConfig
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.repetition import Repetition
from gt_jax.growth.transform import Abstract, target_abstract, target_config
from gt_jax.models.flops import model_flops


class GrowthCost(NamedTuple):
    """`passes` are those that a token runs in the source, all layers together; FLOPs are of the forward pass a token.

    `counted` is how the passes are known: "passes_run"; or something near an upper bound, "k_exec" where the counts do
    not say them (2 % of the tokens run more), "most passes" where there are no counts.
    """

    source_layers: int
    layers: int
    dead: tuple[int, ...]
    parameters: int
    passes: float
    counted: str
    source_flops: float
    flops: float

    @property
    def ratio(self) -> float:
        """What a token costs in the child, in units of what it costs in the source."""
        return self.flops / self.source_flops

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return {**self._asdict(), "dead": list(self.dead), "ratio": self.ratio}

    def line(self) -> str:
        """One line for a reader."""
        dead = f", {len(self.dead)} of them dead ({', '.join(map(str, self.dead))})" if self.dead else ", none dead"
        ran = "passes that it runs" if self.counted == "passes_run" else "passes that it may run"
        return (f"cost: {self.source_layers} -> {self.layers} layers{dead}; {self.parameters:,} parameters; a token "
                f"costs {_flops(self.flops)} forward, {self.ratio:.2f} times the source's {_flops(self.source_flops)} "
                f"at the {self.passes:.1f} {ran} ({self.counted})")


def growth_cost(source: ModelConfig, tensors: Abstract, plan: Plan, passes_run: Sequence[float] | None, tokens: int,
                gains: Sequence[float] | None = None) -> GrowthCost:
    """The cost of growing `source`, which holds `tensors`, by `plan`, in rows of `tokens` tokens.

    `gains` [l] are the source's own, None for 1: a layer that does next to nothing in the source does so in the child.

    `passes_run` [l] is the mean number of passes that a token runs in each source layer. None takes the plan's k_exec;
    for the identity, which has none, the most passes a layer can run. A source that is not adaptive runs one.
    """
    child = target_config(source, plan)
    if source.adaptive is None:
        counted, passes = "passes_run", [1.0] * len(source.depth)
    elif passes_run is not None:
        counted, passes = "passes_run", list(passes_run)
    elif plan.kind == "identity":
        counted, passes = "most passes", [float(source.adaptive.max_passes)] * len(source.depth)
    else:
        counted, passes = "k_exec", list(map(float, plan.k_exec))
    parameters = sum(math.prod(leaf.shape) for path, leaf in target_abstract(tensors, plan).items()
                     if path.startswith("params/"))
    dead = tuple(sorted({*plan.dead, *plan.stopped(gains or [1.0] * len(source.depth))}))
    return GrowthCost(len(source.depth), len(child.depth), dead, parameters, float(sum(passes)), counted,
                      model_flops(source, tokens).forward(passes), model_flops(child, tokens).forward())


def cost_of_checkpoint(
    source: ModelConfig, tensors: Abstract, metadata: Mapping[str, Any], plan: Plan, counts: Repetition | None,
    gains: Sequence[float] | None = None,
) -> GrowthCost:  # fmt: skip
    """`growth_cost` by the counts that the plan was made from, in rows as the source was trained on."""
    runs = trainings(metadata)
    data = DataConfig.from_json(runs[0]["run"]["data"]) if runs else DataConfig()
    return growth_cost(source, tensors, plan, None if counts is None else counts.passes_run, data.sequence_length,
                       gains)


def stored_gains(folder: Path, config: ModelConfig, tensors: Collection[str]) -> list[float] | None:
    """The gain of each layer of a checkpoint, the only values read before a growth; None where it lacks one."""
    depth = config.depth
    where = [depth.position(layer) for layer in range(len(depth))]
    names = [f"params/segment{segment}/layer{slot}/gain" for segment, _, slot in where]
    if not set(names) <= set(tensors):
        return None  # `transform.match` says what is missing
    values = checkpoint.load_paths(folder, set(names))
    return [float(values[name].reshape(-1)[block]) for name, (_, block, _) in zip(names, where, strict=True)]


def _flops(count: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}FLOP"
    return f"{count:,.0f} FLOP"
