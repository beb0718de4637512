"""What does a loop over the layers cost a CPU forward, where the layers could be laid out one by one?

    python -m experiments.bench_layer_loop [--layers 3 6] [--width 64] [--tokens 96] [--rows 8] [--rounds 15] [--json]

* Models of D layers: dense, and with early exit at a threshold that no token reaches, so that every layer runs. `remat`
  "none" lays few layers out one by one, "layer" makes a loop of them (gt_jax.models.language_model.scan_unroll); what
  is computed is the same.
* Decoding: a row of --tokens given tokens, one at a time in one compiled loop, at batch 1. Reading: --rows rows at
  once, forward pass and loss. Rounds take turns over the cases, and the least processor time counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.exit_study.measure import reading
from experiments.exit_study.study import ExitStudy, Model
from experiments.pages import markdown_table
from gt_jax.configs.model import ExitConfig, ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import run_command
from gt_jax.models.language_model import initialise
from gt_jax.options import at_least
from gt_jax.training.step import make_evaluation

NEVER = ExitConfig(threshold=1.0 - 1e-6, ponder=0.0)
WAYS = {"one by one": "none", "a loop": "layer"}
MODES = ("decoding", "reading")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser().parse_args(argv)
    cases = {(layers, kind, way): model(options.width, layers, kind, way)
             for layers in options.layers for kind in ("dense", "exit") for way in WAYS}  # fmt: skip
    found = measured(cases, options)
    print(json.dumps(found, indent=1) if options.json else "\n".join(table(found)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", nargs="+", type=at_least(1), default=[3, 6])
    p.add_argument("--width", type=at_least(8), default=64)
    p.add_argument("--rows", type=at_least(1), default=8)
    p.add_argument("--tokens", type=at_least(2), default=96, help="of a row (96)")
    p.add_argument("--rounds", type=at_least(1), default=15)
    p.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    return p


def model(width: int, layers: int, kind: str, way: str) -> ModelConfig:
    """A model as the study of early exit has it."""
    dense = ExitStudy(scale="small", width=width).config(Model(layers, None), None)
    return dense.replace(exit=NEVER if kind == "exit" else None, remat=WAYS[way])


def measured(cases: dict[tuple[int, str, str], ModelConfig], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One object a case: the least processor seconds of decoding a row and of reading a batch."""
    rows = jnp.tile(jnp.arange(options.tokens, dtype=jnp.int32) % 256, (options.rows, 1))
    batch = {"tokens": rows, "targets": rows, "segment_ids": jnp.ones_like(rows)}
    work: dict[tuple[int, str, str], dict[str, Callable[[], Any]]] = {}
    for case, config in cases.items():
        variables = initialise(config, 0)
        work[case] = {"decoding": functools.partial(reading(config), variables, rows[:1], batch["segment_ids"][:1]),
                      "reading": functools.partial(make_evaluation(config, Rules()), variables, batch)}  # fmt: skip
    times: dict[tuple[Any, ...], list[float]] = {}
    for _ in range(options.rounds + 1):  # the first one compiles
        for case, modes in work.items():
            for mode, run in modes.items():
                began = time.process_time()
                jax.block_until_ready(run())
                times.setdefault((*case, mode), []).append(time.process_time() - began)
    return [{"layers": layers, "kind": kind, "way": way,
             **{mode: min(times[layers, kind, way, mode][1:]) for mode in MODES}}
            for layers, kind, way in work]  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Microseconds a token, and the loop's time over that of layers one by one."""
    by = {(one["layers"], one["kind"], one["way"]): one for one in found}
    rows = []
    for layers, kind in dict.fromkeys((one["layers"], one["kind"]) for one in found):
        plain, loop = (by[layers, kind, way] for way in WAYS)
        rows.append([str(layers), kind, *(text for mode in MODES for text in (
            f"{1e3 * plain[mode]:.2f}", f"{1e3 * loop[mode]:.2f}", f"{loop[mode] / plain[mode]:.2f}"))])  # fmt: skip
    head = ["layers", "model", *(f"{mode}, {what}" for mode in MODES
                                 for what in ("one by one, ms", "a loop, ms", "ratio"))]  # fmt: skip
    return markdown_table(rows, head)


if __name__ == "__main__":
    run_command(main)
