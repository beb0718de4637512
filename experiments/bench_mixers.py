"""What a token mixer costs beside D: forward, and forward with all gradients, the layer types in turns.

    python -m experiments.bench_mixers [--mixers D G A B] [--length 2048] [--width 256] [--json FILE]

* One row of one document, float32, the mixer alone: no MLP, no norm, no residual. Heads of 64 with a state of 64 by 64
  for D, heads of 64 for A and G, which keeps 512 to 1,024 keys a query; for B a head every four channels.
* Rounds alternate between them; of each the fastest counts, and the ratio to the first mixer is also given round by
  round as smallest .. largest.
* Nothing is written unless `--json` names a file.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench_sparse_attention import alternate
from experiments.machine import keep, machine
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import Refused, run_command
from gt_jax.files import local_name
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.primitives import WeightSpec
from gt_jax.models.layers.residual import make_mixer
from gt_jax.options import at_least

MIXERS = "DGAB"
"""Layer types that stand alone; an S layer reads the D layer before it."""
HEAD = 64


def config(kind: str, width: int) -> ModelConfig:
    """A model of one such layer; raises `Refused` for a width without whole heads."""
    heads, rest = divmod(width, HEAD)
    if rest or not heads:
        raise Refused(f"--width {width} must be a multiple of {HEAD}, which a head is wide")
    return ModelConfig(
        kind, width, 264, width, deltanet=DeltaNetConfig(heads, heads, HEAD, HEAD),
        gsa=GSAConfig(heads, HEAD, 2 - heads % 2, 32, k_base=512, k_min=32, k_max=1024),
        attention=AttentionConfig(heads, heads, HEAD), resolvent=ResolventConfig(heads=width // 4),
    )  # fmt: skip


def programs(kind: str, length: int, width: int) -> dict[str, Callable[[], Any]]:
    """Calls by pass: forward, and the gradients of the sum of squares by weights and input."""
    mixer = make_mixer(kind, config(kind, width), Rules(), WeightSpec())
    x = jax.random.normal(jax.random.key(0), (1, length, width))
    place = place_rows(jnp.ones((1, length), jnp.int32))
    weights = jax.jit(mixer.init)(jax.random.key(1), x[:, :2], place_rows(place.segment_ids[:, :2]))

    def forward(weights: Any, x: Any) -> Any:
        return mixer.apply(weights, x, place).y

    def loss(weights: Any, x: Any) -> Any:
        return jnp.sum(jnp.square(forward(weights, x)))

    both = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return {"forward": functools.partial(jax.jit(forward), weights, x),
            "forward and backward": functools.partial(both, weights, x)}  # fmt: skip


def lines(name: str, times: Mapping[str, Sequence[float]]) -> list[str]:
    """A line a mixer: its least time, and over that of the first."""
    first, *_ = times
    found = []
    for kind, each in times.items():
        ratios = [a / b for a, b in zip(each, times[first], strict=True)]
        found.append(f"{name:21} {kind}   {min(each):9.1f} ms   over {first}: {min(each) / min(times[first]):6.2f} "
                     f"({min(ratios):.2f} .. {max(ratios):.2f})")  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the times where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=tuple(MIXERS), default=list(MIXERS))
    parser.add_argument("--length", type=at_least(2), default=2048)
    parser.add_argument("--width", type=at_least(1), default=256)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--json", type=local_name, metavar="FILE")
    options = parser.parse_args(argv)
    about = machine() | {"length": options.length, "width": options.width}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    calls = {kind: programs(kind, options.length, options.width) for kind in dict.fromkeys(options.mixers)}
    rows = []
    for name in ("forward", "forward and backward"):
        times = alternate({kind: each[name] for kind, each in calls.items()}, options.rounds)
        rows.append({"pass": name, "milliseconds": times})
        print("\n".join(lines(name, times)), flush=True)
    keep(options.json, about, rows)
    return 0


if __name__ == "__main__":
    run_command(main)
