"""Does bfloat16 compute cost loss? States, gates, norms, Sinkhorn, softmax and router stay float32.

    python -m experiments.bfloat16_training [--preset tiny_3b] [--steps 200] [--json FILE]

* Two runs in one process from the same weights on the same batches, one in float32, one in bfloat16 compute; both keep
  float32 weights. The held-out loss of each, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax

from gt_jax.configs import presets
from gt_jax.configs.data import DataConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.errors import run_command
from gt_jax.files import local_path
from gt_jax.models.language_model import initialise
from gt_jax.options import at_least
from gt_jax.text.batches import open_text
from gt_jax.training.loop import make_trainer
from gt_jax.training.step import evaluate


def train(preset: str, compute_dtype: str, steps: int, seed: int) -> tuple[float, float]:
    """(held-out loss in nats a byte, seconds) of one run."""
    config = presets.preset(preset).replace(compute_dtype=compute_dtype, param_dtype="float32")
    text = open_text(DataConfig(sequence_length=128, batch_size=8, seed=seed))
    with jax.set_mesh(mesh_for_rows(1)):
        trainer = make_trainer(config, TrainConfig(steps=steps, seed=seed))
        state, stream, start = trainer.new_state(initialise(config, seed)), text.train(), time.perf_counter()
        for _ in range(steps):
            state, metrics = trainer.step(state, next(stream))
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - start
        variables = {"params": state.params, "statistics": state.statistics}
        return evaluate(trainer.evaluation, variables, text.held_out(8)), seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Train twice and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny_3b", choices=["tiny", "small", "tiny_3b", "tiny_8b"])
    parser.add_argument("--steps", type=at_least(1), default=200)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=local_path)
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        loss, seconds = train(arguments.preset, dtype, arguments.steps, arguments.seed)
        result[dtype] = {"loss": loss, "seconds": seconds}
        print(f"{dtype}: held-out loss {loss:.4f} after {arguments.steps} steps, {seconds:.0f} s with compilation",
              flush=True)
    result["ratio"] = result["bfloat16"]["loss"] / result["float32"]["loss"]
    print(f"bfloat16 over float32: {result['ratio']:.4f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
