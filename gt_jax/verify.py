"""`python -m gt_jax.verify SRC DST`: did the growth keep what was learned? The same batches through both models.

Reports the source's loss (adaptive, and with its passes fixed at k_exec) and the grown model's, KL divergence, top-1
agreement, logit cosine, and per target layer |dh|/|h| beside the source pass it stands for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gt_jax.chunks import forward_rows
from gt_jax.config import ModelConfig
from gt_jax.errors import Refused, run_command
from gt_jax.growth.plan import Plan
from gt_jax.loading import add_text_arguments, load_for_text, load_model, text_config
from gt_jax.metrics import table
from gt_jax.model import LanguageModel, fixed_passes, free_passes
from gt_jax.sharding import Rules
from gt_jax.training.step import Batch, cross_entropy, place
from gt_jax.typing import Tree

GOOD, USABLE, COSINE = 0.03, 0.10, 0.995


class Agreement(NamedTuple):
    """Sums over the counted positions, in nats where they are losses."""

    source_loss: Array
    source_fixed_loss: Array
    target_loss: Array
    kl: Array
    same_top1: Array
    cosine: Array
    tokens: Array


def agreement(
    source: Float[Array, "b t v"],
    fixed: Float[Array, "b t v"],
    target: Float[Array, "b t v"],
    targets: Int[Array, "b t"],
) -> Agreement:
    """Losses, KL(source || target), equality of the most likely token and cosine of centred logits, summed."""
    counted = targets >= 0
    losses = [cross_entropy(logits, targets) for logits in (source, fixed, target)]
    p, q = jax.nn.log_softmax(source), jax.nn.log_softmax(target)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = jnp.argmax(source, axis=-1) == jnp.argmax(target, axis=-1)
    a = source - jnp.mean(source, axis=-1, keepdims=True)
    b = target - jnp.mean(target, axis=-1, keepdims=True)
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(counted, x.astype(jnp.float32), 0.0))

    source_loss, fixed_loss, target_loss = (loss for loss, _ in losses)
    return Agreement(source_loss, fixed_loss, target_loss, total(kl), total(same), total(cosine), losses[0][1])


def make_comparison(
    source: ModelConfig, target: ModelConfig, k_exec: Sequence[int], rules: Rules
) -> Callable[..., Any]:
    """The jitted compare(source variables, target variables, batch) -> (sums, |dh|/|h| of source passes and target)."""
    passes = 1 if source.adaptive is None else source.adaptive.max_passes
    fixed_control = fixed_passes([min(k, passes) for k in k_exec])
    shallow, deep = LanguageModel(source, rules), LanguageModel(target, rules)

    def compare(source_variables: Tree, target_variables: Tree, batch: Batch) -> tuple[Agreement, Array, Array]:
        placed = place(batch, rules)
        rows = (placed["tokens"], placed["segment_ids"])
        free, _ = forward_rows(shallow, source_variables, *rows, free_passes())
        fixed, source_passes = forward_rows(shallow, source_variables, *rows, fixed_control)
        grown, target_passes = forward_rows(deep, target_variables, *rows, free_passes())
        sums = agreement(free, fixed, grown, placed["targets"])
        return sums, source_passes.delta_ratio, target_passes.delta_ratio[:, 0]

    return jax.jit(compare)


def compare_models(
    source: ModelConfig, source_variables: Tree, target: ModelConfig, target_variables: Tree, plan: Plan,
    batches: Sequence[Batch], rules: Rules,
) -> dict[str, Any]:  # fmt: skip
    """All figures of `verify` for two models in memory."""
    compare = make_comparison(source, target, plan.requested, rules)
    results = [jax.device_get(compare(source_variables, target_variables, batch)) for batch in batches]
    sums = Agreement(*(sum(float(r[0][i]) for r in results) for i in range(len(Agreement._fields))))  # type: ignore[arg-type]
    count = max(float(sums.tokens), 1.0)
    mean = {name: float(value) / count for name, value in sums._asdict().items() if name != "tokens"}
    source_ratio = np.mean([r[1] for r in results], axis=0)
    target_ratio = np.mean([r[2] for r in results], axis=0)
    gap = mean["target_loss"] / mean["source_loss"] - 1
    return {
        **mean,
        "tokens": int(count),
        "gap": gap,
        "verdict": "good" if gap < GOOD else "usable" if gap < USABLE else "poor",
        "layers": _layers(source, source_variables, target, target_variables, plan, source_ratio, target_ratio),
    }


def _gains(config: ModelConfig, variables: Tree) -> list[float]:
    gains = []
    for layer in range(len(config.depth)):
        segment, block, slot = config.depth.position(layer)
        gains.append(float(variables["params"][f"segment{segment}"][f"layer{slot}"]["gain"][block]))
    return gains


def _layers(
    source: ModelConfig, source_variables: Tree, target: ModelConfig, target_variables: Tree, plan: Plan,
    source_ratio: np.ndarray, target_ratio: np.ndarray,
) -> list[dict[str, Any]]:  # fmt: skip
    """Per target layer |dh|/|h| as added to the stream, and that of the source pass at fixed k_exec (None: not run)."""
    alpha = (1.0,) if source.adaptive is None else source.adaptive.alpha
    before, after = _gains(source, source_variables), _gains(target, target_variables)
    layers = []
    for layer, entry in enumerate(plan.entries):
        ran = 0 < entry.copy <= min(plan.requested[entry.source], len(alpha))  # copy 0 is an identity entry
        stood_for = None
        if ran:
            strength = before[entry.source] * alpha[entry.copy - 1]
            stood_for = strength * float(source_ratio[entry.source, entry.copy - 1])
        layers.append({
            "target": layer, "type": target.depth.types[layer], "source": entry.source, "copy": entry.copy,
            "coefficient": entry.coefficient, "delta_ratio": after[layer] * float(target_ratio[layer]),
            "source_delta_ratio": stood_for,
        })  # fmt: skip
    return layers


def plan_of(metadata: dict[str, Any], path: Path) -> Plan:
    """The growth plan that a grown checkpoint carries; raises `Refused` for one that was not grown."""
    grown = metadata.get("grown_from")
    if not isinstance(grown, dict) or "plan" not in grown:
        raise Refused(
            f"{path} was not grown: its metadata has no grown_from; give SRC and the checkpoint grown from it"
        )
    return Plan.from_json(grown["plan"])


def verify(
    source: Path, target: Path, *, text: Sequence[str] = (), tfds: str | None = None, tfds_dir: str | None = None,
    batches: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Compare a source checkpoint with the one grown from it, on held-out text (default: the source's own)."""
    named = {"text": tuple(text), "tfds": tfds, "tfds_dir": tfds_dir}
    shallow = load_for_text(source, named if any(named.values()) else None, batches)
    config, variables, metadata = load_model(target)
    plan = plan_of(metadata, target)
    if str(plan.source_layout) != shallow.config.layout:
        raise Refused(f"{target} was grown from layout {plan.source_layout}; {source} has {shallow.config.layout}")
    result = compare_models(shallow.config, shallow.variables, config, variables, plan, shallow.batches, shallow.rules)
    return {"source": str(source), "target": str(target), "text": shallow.text, **result}


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines for a reader."""
    lines = [
        f"loss of the source: {result['source_loss']:.4f} adaptive, {result['source_fixed_loss']:.4f} at fixed k_exec",
        f"loss of the grown model: {result['target_loss']:.4f}, gap {100 * result['gap']:+.2f} % ({result['verdict']}; "
        f"below {100 * GOOD:.0f} % is good, below {100 * USABLE:.0f} % usable)",
        f"KL {result['kl']:.4f} nats, same top token {100 * result['same_top1']:.1f} %, "
        f"logit cosine {result['cosine']:.4f} (wanted: above {COSINE})",
    ]
    rows = []
    for layer in result["layers"]:
        stood_for = layer["source_delta_ratio"]
        stands_for = f"{layer['source']}, pass {layer['copy']}" if layer["copy"] else "identity"
        rows.append([
            layer["target"], layer["type"], stands_for, f"{layer['coefficient']:.3f}", f"{layer['delta_ratio']:.3f}",
            "did not run" if stood_for is None else f"{stood_for:.3f}",
        ])  # fmt: skip
    return [*lines, "", table(rows, ["layer", "type", "source", "coefficient", "|dh|/|h|", "of the source pass"])]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.verify", description="Compare a grown model with its source.")
    p.add_argument("source", type=Path, help="the adaptive checkpoint")
    p.add_argument("target", type=Path, help="the checkpoint grown from it")
    add_text_arguments(p)
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 0 whatever the verdict."""
    from gt_jax.sharding import mesh_for_rows

    arguments = parser().parse_args(argv)
    with jax.set_mesh(mesh_for_rows(1)):
        named = text_config(arguments) or {}
        result = verify(arguments.source, arguments.target, batches=arguments.batches, **named)
    print(json.dumps(result) if arguments.json else "\n".join(report_lines(result)))
    return 0


if __name__ == "__main__":
    run_command(main)
