"""What `verify` found, as lines for a reader: losses, agreement, and a table of the figures by layer."""

from __future__ import annotations

import math
from typing import Any

from gt_jax.evaluation.predictions import COSINE, GOOD, USABLE
from gt_jax.models.layers.adaptive_depth import RATIO_CLIP
from gt_jax.monitoring.metrics import table


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines for a reader."""
    fixed = result["source_fixed_loss"]
    beside = "" if fixed is None else f", {float(fixed):.4f} at fixed k_exec"
    between = result["intervals"]
    lines = [
        *(f"note: {note}" for note in result.get("notes", ())),
        f"loss of the source: {float(result['source_loss']):.4f} as it runs{beside}",
        f"loss of the {'grown model' if fixed is not None else 'target'}: {float(result['target_loss']):.4f}, "
        f"gap {100 * float(result['gap']):+.2f} %{_limits(between['gap'], 100.0, '+.2f')} ({result['verdict']}; "
        f"below {100 * GOOD:.0f} % is good, below {100 * USABLE:.0f} % usable)",
        f"KL {float(result['kl']):.4f} nats{_limits(between['kl'], 1.0, '.4f')}, same top token "
        f"{100 * float(result['same_top1']):.1f} %{_limits(between['same_top1'], 100.0, '.1f')}, "
        f"logit cosine {float(result['cosine']):.4f}{_limits(between['cosine'], 1.0, '.4f')} "
        f"({result['cosine_verdict']}; above {COSINE} is good)",
        f"in brackets: {100 * result['confidence']:g} % intervals over {result['units']['count']} "
        f"{result['units']['kind']}{'s' * (result['units']['count'] != 1)}",
    ]
    if result["spread"] is not None:
        lines.append(f"spread: {100 * float(result['spread']['whole']):.2g} % of what the source's passes add differs "
                     "between tokens; " + ("the grown model's gates keep it" if result["spread"]["kept"] else
                                           "layers of mean strength cannot give it"))  # fmt: skip
    if (how := result["jacobian"]) is not None:
        most = float(how["at_most_times"])
        lines.append(f"singular values: {how['rows']} row{'s' * (how['rows'] != 1)} of {how['tokens']} tokens, "
                     f"{how['iterations']} iterations; the largest is at least what is shown, and "
                     + ("may be far above it: too few iterations" if math.isinf(most) else
                        f"each with probability {100 * how['probability']:g} % at most {most:.3f} times that")
                     + f"; one is within {float(how['distance']):.2g} of it")  # fmt: skip
    if "curve" in result:
        curve = result["curve"]
        lines.append(f"trained on for {curve['steps']} steps: training loss {float(curve['loss'][0][1]):.4f} to "
                     f"{float(curve['loss'][-1][1]):.4f}, held out {float(curve['held_out_loss']):.4f}")  # fmt: skip
    if any(one.get(f"{key}_cut") for one in result["layers"] for key in ("delta_ratio", "source_delta_ratio")):
        lines.append(_CUT)
    return [*lines, "", _layer_table(result)]


def _limits(interval: dict[str, Any], scale: float, form: str) -> str:
    if interval["low"] is None:
        return ""
    return f" [{scale * float(interval['low']):{form}} to {scale * float(interval['high']):{form}}]"


_CUT = (f">= before |dh|/|h|: at the cut, for a token counts as {RATIO_CLIP:g} at most, before gain and strength; the "
        "true figure is larger, and equal ones do not say that the layers move alike")

FIGURES = (("delta_ratio", "|dh|/|h|"), ("spread", "spread"), ("jacobian", "singular v."),
           ("router_entropy", "entropy"), ("router_kl", "KL"), ("null_rate", "nulls"))  # fmt: skip


def _layer_table(result: dict[str, Any]) -> str:
    """One line a target layer: each figure that the pair has, then that of the source's pass.

    |dh|/|h| at its cut has ">=" before it: two such figures that are equal do not say that the layers move alike.
    """
    layers = result["layers"]
    headers = ["layer", "type", "source", "coefficient"]
    rows = [[one["target"], one["type"], _stands_for(one),
             None if one["coefficient"] is None else f"{one['coefficient']:.3f}"] for one in layers]  # fmt: skip
    for name, header in FIGURES:
        for key, title in ((name, header), (f"source_{name}", "of the source"),
                           (f"source_fixed_{name}", "at k_exec")):  # fmt: skip
            if all(one.get(name) is None for one in layers) or key not in layers[0] or key == "source_router_kl":
                continue
            headers.append(title)
            for row, one in zip(rows, layers, strict=True):
                at_cut = ">=" if one.get(f"{key.replace('_fixed', '')}_cut") else ""
                row.append(None if one[key] is None else f"{at_cut}{float(one[key]):.3f}")
    return table(rows, headers)


def _stands_for(layer: dict[str, Any]) -> str | None:
    if layer["source"] is None:
        return None
    if not layer["copy"]:
        return "identity"
    ran = "" if layer["source_delta_ratio"] is not None else ", did not run"
    return f"{layer['source']}, pass {layer['copy']}{ran}"
