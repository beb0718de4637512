"""A checkpoint of random values, of any preset, written slice by slice: something to grow that nobody had to train.

    python -m experiments.write_random_checkpoint PATH --preset 3b [--seed 0] [--scale 0.5]

* Every float tensor is the library's positional noise, a bell of standard deviation init_std keyed by (seed, path);
  gains and scales stand around 1, variances at 1. The same seed gives the same bytes, whatever the machine.
* `--scale 0.5` gives about half the parameters: width, heads, experts' width, MLP width and vocabulary times its root.
* Some 200 MB of memory beside the program, whatever the size.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.checksums import Written, note_checksums, sums_of_arrays
from gt_jax.checkpoints.folders import UNFINISHED, prepare_parent, publish, remove
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused, run_command
from gt_jax.files import local_path
from gt_jax.growth import noise
from gt_jax.growth.bounded_work import BoundedExecutor
from gt_jax.growth.pipeline import pieces, throttled
from gt_jax.models import language_model
from gt_jax.options import at_least, positive
from gt_jax.text.token_bytes import default_texts, token_table

WAITING = 2**26  # bytes
WRITERS = 3
PIECE = 2**20  # values drawn at a time


def scaled(config: ModelConfig, scale: float) -> ModelConfig:
    """About `scale` times as many parameters, by the root of it in width and in all that lies inside."""
    if scale == 1:
        return config
    if scale <= 0:
        raise Refused(f"--scale {scale}: a number above 0 is needed")
    root = math.sqrt(scale)

    def times(value: int, step: int = 1) -> int:
        return max(round(value * root / step), 1) * step

    changes: dict[str, object] = {"width": times(config.width, 8), "mlp_width": times(config.mlp_width, 8),
                                  "vocab": max(times(config.vocab, 8), 264)}
    if config.deltanet is not None:
        heads = times(config.deltanet.heads)
        changes["deltanet"] = config.deltanet.replace(
            heads=heads, value_heads=heads * config.deltanet.value_heads // config.deltanet.heads)
    if config.gsa is not None:
        changes["gsa"] = config.gsa.replace(heads=times(config.gsa.heads, config.gsa.indexer_heads))
    if config.moe is not None:
        changes["moe"] = config.moe.replace(expert_width=times(config.moe.expert_width, 8))
    return config.replace(**changes)


def values(config: ModelConfig, path: str, leaf: jax.ShapeDtypeStruct, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """(flat position, values there) of one tensor, in order."""
    name = path.rsplit("/", 1)[-1]
    if not jax.dtypes.issubdtype(leaf.dtype, np.floating):
        table = token_table(default_texts(config.vocab), config.embedding.token_bytes)
        yield 0, np.asarray(table[("token_bytes", "token_length").index(name)], leaf.dtype).reshape(-1)
        return
    middle = 1.0 if name in ("scale", "gain", "residual_scale", "variance_ema") else 0.0
    step = noise.step(0.0 if name == "variance_ema" else config.init_std)
    key, count = noise.key_of(seed, path, 0), math.prod(leaf.shape)
    for start, end in pieces(0, count, count, PIECE):
        made = noise.at(key, start, end - start, step)
        made += np.float32(middle)
        yield start, made.astype(leaf.dtype)


def write(path: Path, config: ModelConfig, seed: int) -> int:
    """Write the checkpoint of a config at `path`, which must not exist; returns its bytes."""
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        raise Refused(f"{target} exists; nothing is ever overwritten, choose another path")
    prepare_parent(target)
    unfinished = target.with_name(target.name + UNFINISHED)
    remove(unfinished)
    written, arrays = Written(unfinished), dict[str, ArrayFiles]()
    leaves, total, started = flatten(language_model.abstract(config)), 0, time.monotonic()

    def line() -> str:
        return f"{total / 1e9:.2f} GB, {total / 1e9 / (time.monotonic() - started):.2f} GB/s"

    say = throttled(line, lambda text: print(text, file=sys.stderr, flush=True), 5.0)
    with BoundedExecutor(WAITING, WRITERS) as writer:
        for name, leaf in leaves.items():
            files = ArrayFiles.of(unfinished / "state", name, tuple(leaf.shape), np.dtype(leaf.dtype))
            files.create()
            arrays[name] = files
            for start, part in values(config, name, leaf, seed):
                writer.submit(part.nbytes, functools.partial(files.write, start, part, written))
                total += part.nbytes
            say()
        writer.wait()
    metadata = {"config": config.to_json(), "kind": "random", "step": 0, "seed": seed}
    checkpoint.write_metadata(unfinished, list(leaves), metadata)
    note_checksums(unfinished, *sums_of_arrays(unfinished, arrays, written.pieces()))
    publish(unfinished, target)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Write one checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=local_path)
    parser.add_argument("--preset", default="3b", choices=sorted(presets.PRESETS))
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--scale", type=positive, default=1.0, help="parameters times about this (1)")
    arguments = parser.parse_args(argv)
    config = scaled(presets.preset(arguments.preset), arguments.scale)
    size = write(arguments.path, config, arguments.seed)
    print(f"{arguments.path}: layout {config.layout}, width {config.width}, {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    run_command(main)
