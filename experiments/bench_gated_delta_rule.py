"""How fast is the gated delta rule here, and against PyTorch's chunk form in the same process?

    python -m experiments.bench_gated_delta_rule [--chunks 16 32 64] [--rounds 10] [--json FILE]

* Two shapes: a long sequence (b1 t2048 h8, k = v = 64) and a training batch of the demo (b8 t256 h4, k = v = 32).
* The other side is `torch_chunk_gated_delta_rule` of transformers (Qwen3-Next), at its own chunk of 64, when torch and
  transformers can be imported; both use all cores and float32, and their outputs are compared first.
* Rounds alternate between the two sides; a round's first call of each is not timed, so neither waits for the threads
  of the other, and of the rest the fastest counts. The ratio (theirs / ours, above 1 is faster) is given for the
  fastest rounds and, round by round, as smallest .. largest. Run it on an idle machine: PyTorch's threads wait for each
  other at every operation and suffer far more from a busy one, which would flatter us.
* Nothing is written unless `--json` names a file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine import keep, machine
from gt_jax.errors import run_command
from gt_jax.files import local_name
from gt_jax.options import at_least
from pallas_kernels.gated_delta_rule.api import gated_delta_rule

SHAPES = {"long": (1, 2048, 8, 64), "demo": (8, 256, 4, 32)}
TORCH_CHUNK = 64
CALLS_A_ROUND = 3

Passes = dict[str, Callable[[], Any]]


def make_inputs(b: int, t: int, h: int, width: int) -> list[np.ndarray]:
    """Unit queries and keys, normal values, g, beta, and the gradient that comes in, float32."""
    rng = np.random.default_rng(0)
    q, k, v, d_output = rng.normal(size=(4, b, t, h, width))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = -0.1 * rng.exponential(size=(b, t, h)), rng.uniform(size=(b, t, h))
    return [x.astype(np.float32) for x in (q, k, v, g, beta, d_output)]


def jax_passes(inputs: Sequence[np.ndarray], chunk: int) -> Passes:
    """Forward, and forward with the gradients of all five arguments."""
    *arguments, d_output = map(jnp.asarray, inputs)
    rule = functools.partial(gated_delta_rule, chunk_size=chunk, implementation="xla")
    forward = jax.jit(rule)
    both = jax.jit(lambda d, *x: jax.vjp(rule, *x)[1](d))
    return {
        "forward": lambda: jax.block_until_ready(forward(*arguments)),
        "forward and backward": lambda: jax.block_until_ready(both(d_output, *arguments)),
    }


def torch_passes(inputs: Sequence[np.ndarray]) -> Passes | None:
    """The same two in PyTorch, or None where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    *arguments, d_output = (torch.tensor(x) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in arguments]

    def rule(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, chunk_size=TORCH_CHUNK)[0]

    def forward() -> Any:
        with torch.no_grad():
            return rule(*arguments)

    return {"forward": forward, "forward and backward": lambda: torch.autograd.grad(rule(*leaves), leaves, d_output)}


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any] | None, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the fastest call of each round, side by side."""
    sides = {"ours": ours} | ({} if theirs is None else {"theirs": theirs})
    fastest: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            call()
            times = []
            for _ in range(CALLS_A_ROUND):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            fastest[name].append(min(times))
    return fastest


def measure(shape: str, chunks: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row a chunk size and pass."""
    inputs = make_inputs(*SHAPES[shape])
    theirs = torch_passes(inputs)
    rows = []
    for chunk in chunks:
        ours = jax_passes(inputs, chunk)
        if theirs is not None:
            mine, other = np.asarray(ours["forward"]()), theirs["forward"]().numpy()
            difference = float(np.sqrt(np.mean((mine - other) ** 2) / np.mean(other**2)))
            if difference > 1e-4:
                raise SystemExit(f"the two sides do not compute the same: relative difference {difference:.1e}")
        for name, call in ours.items():
            times = alternate(call, None if theirs is None else theirs[name], rounds)
            rows.append({"shape": shape, "chunk": chunk, "pass": name, "milliseconds": times})
            print(line(rows[-1]), flush=True)
    return rows


def spread(values: Sequence[float]) -> str:
    """The fastest round, and the median and slowest."""
    return f"{min(values):6.2f} (median {statistics.median(values):.2f}, slowest {max(values):.2f})"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    times = row["milliseconds"]
    text = f"{row['shape']:5} chunk {row['chunk']:3}  {row['pass']:21} {spread(times['ours'])} ms"
    if "theirs" in times:
        ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
        best = min(times["theirs"]) / min(times["ours"])
        text += f"   PyTorch {spread(times['theirs'])} ms   ratio {best:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the rows where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--chunks", nargs="+", type=at_least(1), default=[16, 32, 64])
    parser.add_argument("--rounds", type=at_least(1), default=10)
    parser.add_argument("--json", type=local_name, metavar="FILE")
    options = parser.parse_args(argv)
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if torch_passes(make_inputs(1, 64, 1, 8)) is None:
        print("torch and transformers are not installed: no comparison, only our own times")
    for name in options.shapes:
        print(f"{name}: b{{}} t{{}} h{{}} k = v = {{}}".format(*SHAPES[name]))
    rows = [row for name in options.shapes for row in measure(name, options.chunks, options.rounds)]
    keep(options.json, about, rows)
    return 0


if __name__ == "__main__":
    run_command(main)
