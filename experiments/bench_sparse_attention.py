"""What do tiles cost, and save, against the dense path of sparse attention?

    python -m experiments.bench_sparse_attention [--lengths 256 512 1024 2048] [--dtype float32] [--json FILE]

* One row of one document, by default 8 heads of 64 with 2 indexer heads of 32, budgets as in the `8b` model.
* Temporaries are what the compiled program needs beside its arguments and results, forward and backward; no run is
  needed for them, so `--only-memory` gives them for lengths that would take minutes, such as:
      --only-memory --lengths 4096 32768 --heads 16 --width 128 --indexer-heads 4 --indexer-width 64 --dtype bfloat16
* Rounds alternate between the two; of each the fastest counts, and the ratio (dense / tiled, above 1: tiles are
  faster) is also given round by round as smallest .. largest. Both outputs are compared first.
* Nothing is written unless `--json` names a file.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine import keep, machine
from gt_jax.errors import run_command
from gt_jax.files import local_name
from gt_jax.options import at_least
from pallas_kernels.sparse_attention.api import Indexer, Positions, sparse_attention

SIDES = {"dense": "reference", "tiled": "xla"}
BUDGET: dict[str, Any] = {"k_base": 512, "k_min": 32, "k_max": 1024}
Passes = dict[str, Any]  # jitted functions by name


def make_inputs(t: int, sizes: argparse.Namespace) -> tuple[Any, ...]:
    """(q, k, v, indexer, positions) of one row, one document."""
    keys, dtype = jax.random.split(jax.random.key(0), 6), jnp.dtype(sizes.dtype)
    h, n = sizes.heads, sizes.indexer_heads
    q, k, v = (jax.random.normal(key, (1, t, h, sizes.width), dtype) for key in keys[:3])
    query, key = (jax.random.normal(key, (1, t, n, sizes.indexer_width), dtype) for key in keys[3:5])
    weight = jax.random.uniform(keys[5], (1, t, n))
    indexer = Indexer(query, key, weight, jnp.zeros(n), jnp.zeros(h), jnp.zeros(()))
    position = jnp.arange(t, dtype=jnp.int32)[None]
    segment = jnp.ones_like(position)
    return q, k, v, indexer, Positions(position, segment, position, segment)


def passes(implementation: str) -> Passes:
    """Forward, and forward with the gradients of all arguments."""
    attend: Callable[..., Any] = functools.partial(sparse_attention, **BUDGET, implementation=implementation)

    def loss(q: Any, k: Any, v: Any, indexer: Indexer, positions: Positions) -> Any:
        o, seen = attend(q, k, v, indexer, positions)
        return jnp.sum(jnp.square(o.astype(jnp.float32))) + jnp.sum(seen.kl)

    return {"forward": jax.jit(attend), "forward and backward": jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))}


def measure(t: int, sizes: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a pass: megabytes, and milliseconds of each round."""
    make = functools.partial(make_inputs, t, sizes)
    arguments = jax.eval_shape(make) if sizes.only_memory else make()
    sides = {name: passes(implementation) for name, implementation in SIDES.items()}
    rows = []
    for name in sides["dense"]:
        compiled = {side: programs[name].lower(*arguments).compile() for side, programs in sides.items()}
        megabytes = {side: program.memory_analysis().temp_size_in_bytes / 2**20 for side, program in compiled.items()}
        row: dict[str, Any] = {"length": t, "pass": name, "mebibytes": megabytes}
        if not sizes.only_memory:
            compare(name, *(jax.tree.leaves(program(*arguments))[0] for program in compiled.values()))
            calls = {side: functools.partial(program, *arguments) for side, program in compiled.items()}
            row["milliseconds"] = alternate(calls, sizes.rounds)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def compare(name: str, dense: Any, tiled: Any) -> None:
    """End where the two do not compute the same."""
    dense, tiled = (np.asarray(x, np.float64) for x in (dense, tiled))
    difference = np.sqrt(np.mean((dense - tiled) ** 2) / np.mean(dense**2))
    if difference > 0.01:
        raise SystemExit(f"{name}: the two sides do not compute the same: relative difference {difference:.1e}")


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each in every round; one before is not timed."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    size = row["mebibytes"]
    text = f"{row['length']:6} {row['pass']:21} dense {size['dense']:9.1f} MiB   tiled {size['tiled']:7.1f} MiB"
    if "milliseconds" in row:
        times = row["milliseconds"]
        ratios = [a / b for a, b in zip(times["dense"], times["tiled"], strict=True)]
        best = {side: min(values) for side, values in times.items()}
        text += f"   dense {best['dense']:8.1f} ms   tiled {best['tiled']:8.1f} ms"
        text += f"   ratio {best['dense'] / best['tiled']:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=at_least(1), default=[256, 512, 1024, 2048])
    parser.add_argument("--heads", type=at_least(1), default=8)
    parser.add_argument("--width", type=at_least(1), default=64)
    parser.add_argument("--indexer-heads", type=at_least(1), default=2)
    parser.add_argument("--indexer-width", type=at_least(1), default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--only-memory", action="store_true")
    parser.add_argument("--json", type=local_name, metavar="FILE")
    options = parser.parse_args(argv)
    about = machine() | {name: getattr(options, name) for name in ("heads", "width", "indexer_heads", "indexer_width")}
    about["dtype"] = options.dtype
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = [row for t in options.lengths for row in measure(t, options)]
    keep(options.json, about, rows)
    return 0


if __name__ == "__main__":
    run_command(main)
