"""Where does a training step's time go, and is any part of the model dearer than its FLOPs?

    python -m experiments.profile_components [--preset tiny_3b] [--batch 8] [--tokens 128] [--json FILE]

* One process: compile the step, warm it up, time a few steps (the fastest and the median count), then trace three.
* Time: every operation of the compiled program carries the scope it came from (Linen modules and named scopes); the
  profiler's leaf events are summed by it. "other" is what belongs to no part: residual adds, statistics, copies.
* FLOPs: of the matrix products that one token needs in one pass of each layer, from the config. Backward passes
  multiply all parts alike; repeated passes those of the stack, and neither multi-token prediction nor the unembedding.
* The last column is share of time over share of FLOPs: above 3 wants a reason (docs/performance.md). Of an adaptive
  model it is too high for the parts of the stack, and too low for the two that run once.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gt_jax.configs import presets
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.errors import run_command
from gt_jax.files import local_path
from gt_jax.models.language_model import initialise
from gt_jax.monitoring.metrics import table
from gt_jax.options import at_least
from gt_jax.text.batches import open_text
from gt_jax.training.loop import make_trainer
from gt_jax.training.step import DEPTH

PARTS: tuple[tuple[str, str], ...] = (  # first match in the operation's scope wins
    ("multi-token prediction", r"/mtp"),
    ("optimizer", r"optimizer"),
    ("hyper-connections", r"hyper"),
    ("halting", r"halting"),
    ("experts and router", r"/mlp/(experts|router)|MixtureOfExperts"),
    ("shared MLP", r"/mlp(/|$|\.)"),
    ("D mixer", r"layer[012][./].*mixer"),
    ("G mixer", r"layer3[./].*mixer"),
    ("unembedding and loss", r"unembed|logits|logsumexp|cross_entropy"),
    ("embedding and memory", r"/(embedding|memory)"),
)
WRAPPERS = re.compile(r"while|call|cond|conditional|Thunk|Pjit|^\$|tuple|parameter")


def flops(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Forward FLOPs of the matrix products a token, by part; of one pass of each layer."""
    c, d, types = config, config.width, config.depth.types
    delta_net = attention = 0.0
    if c.deltanet is not None:
        keys, values = c.deltanet.heads * c.deltanet.key_width, c.deltanet.value_heads * c.deltanet.value_width
        chunk, heads = c.deltanet.chunk_size, c.deltanet.value_heads
        k, v = c.deltanet.key_width, c.deltanet.value_width
        recurrence = 2 * heads * (2 * chunk * k + chunk * (k + 2 * v) + 3 * k * v)
        delta_net = 2 * d * (2 * keys + 3 * values + 2 * heads) + recurrence
    if c.gsa is not None:
        width = c.gsa.heads * c.gsa.head_width
        index = c.gsa.indexer_heads * c.gsa.indexer_width
        attention = 2 * d * (6 * width + 2 * index) + 2 * tokens * (2 * width + index)
    shared, experts = 6 * d * c.mlp_width, 0.0
    if c.moe is not None:
        experts = 6 * d * c.moe.expert_width * c.moe.top_k + 2 * d * c.moe.experts
    n = 1 if c.hyper is None else c.hyper.streams
    hyper = 0 if c.hyper is None else 2 * 2 * (n * d * (2 * n + n * n) + n * n * d + 2 * n * d)
    layers, unembed = len(types), 2 * d * c.vocab
    result = {
        "D mixer": types.count("D") * delta_net, "G mixer": types.count("G") * attention,
        "shared MLP": layers * shared, "experts and router": layers * experts, "hyper-connections": layers * hyper,
        "unembedding and loss": unembed * (1 if c.adaptive is None else 2),
    }  # fmt: skip
    if c.mtp is not None:
        result["multi-token prediction"] = 4 * d * d + attention + shared + experts + hyper + unembed
    return {part: float(value) for part, value in result.items() if value}


def part_of(scope: str) -> str:
    """The part of the model that an operation's scope names."""
    return next((part for part, pattern in PARTS if re.search(pattern, scope)), "other")


def scopes(compiled: str) -> dict[str, str]:
    """Instruction name -> op_name, of the compiled program's text."""
    found = {}
    for line in compiled.splitlines():
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if name and scope:
            found[name[1]] = scope[1]
    return found


def traced(folder: Path) -> collections.Counter[str]:
    """Microseconds by instruction name, leaves only."""
    file = next(folder.rglob("*.trace.json.gz"))
    total: collections.Counter[str] = collections.Counter()
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X" and not WRAPPERS.search(event["name"]):
            total[event["name"]] += event["dur"]
    return total


def run(config: ModelConfig, batch: int, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds a step and its parts."""
    with jax.set_mesh(mesh_for_rows(1)):
        trainer = make_trainer(config, TrainConfig(steps=1000))
        state = trainer.new_state(initialise(config, 0))
        state = state._replace(step=state.step + 500)  # past the forced passes: the halting heads decide
        stream = open_text(DataConfig(sequence_length=tokens, batch_size=batch)).train()
        start = time.perf_counter()
        step: Any = trainer.step  # jitted
        compiled = step.lower(state, next(stream)).compile()
        compile_seconds = time.perf_counter() - start
        times = []
        for _ in range(steps):
            inputs = next(stream)
            start = time.perf_counter()
            state, metrics = compiled(state, inputs)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(3):
                    state, metrics = compiled(state, next(stream))
                jax.block_until_ready(metrics)
            events = traced(Path(folder))
    where = scopes(compiled.as_text())
    parts: collections.Counter[str] = collections.Counter()
    for name, microseconds in events.items():
        if name in where:
            parts[part_of(where[name])] += microseconds
    total, needed = sum(parts.values()), flops(config, tokens)
    shares = {part: value / total for part, value in parts.most_common()}
    work = {part: value / sum(needed.values()) for part, value in needed.items()}
    return {
        "compile_seconds": compile_seconds, "fastest": min(times), "median": statistics.median(times),
        "tokens_a_second": batch * tokens / statistics.median(times), "time": shares, "flops": work,
        **{name: float(metrics[name].sum()) for name in DEPTH},
    }  # fmt: skip


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    rows = []
    for part, share in result["time"].items():
        work = result["flops"].get(part)
        row = ["", ""] if work is None else [f"{100 * work:.1f} %", f"{share / work:.1f}"]
        rows.append([part, f"{100 * share:.1f} %", *row])
    depth = ", ".join(f"{name} {result[name]:.1f}" for name in DEPTH)
    return [
        f"compile {result['compile_seconds']:.1f} s; step {1e3 * result['median']:.0f} ms (fastest "
        f"{1e3 * result['fastest']:.0f}), {result['tokens_a_second']:.0f} tokens/s; over all layers {depth}",
        table(rows, ["part", "time", "FLOPs of one pass", "ratio"]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny_3b", choices=["tiny", "small", "tiny_3b", "tiny_8b"])
    parser.add_argument("--batch", type=at_least(1), default=8)
    parser.add_argument("--tokens", type=at_least(2), default=128)
    parser.add_argument("--steps", type=at_least(1), default=10)
    parser.add_argument("--json", type=local_path)
    arguments = parser.parse_args(argv)
    result = run(presets.preset(arguments.preset), arguments.batch, arguments.tokens, arguments.steps)
    print("\n".join(lines(result)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
