"""Training steps of `small` on one card, ours beside transformers with flash-linear-attention, in turns."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from experiments.training_measured import sizes
from experiments.training_measured.turns import Contestant, Job
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import say

STEPS = 5  # of a turn
WARM_UP = 3  # compiling, and tuning of Triton's kernels


def models(tokens: int) -> dict[str, ModelConfig]:
    """The plain form that both have, all keys attended to, and `small` as it is; bfloat16 products."""
    plain = sizes.plain_form("small", 0).replace(compute_dtype="bfloat16")
    assert plain.gsa is not None
    every_key = plain.gsa.replace(k_base=tokens, k_min=tokens, k_max=tokens)
    return {"plain": plain.replace(gsa=every_key), "as it is": sizes.SIZES["small"]()}


def jobs(rows: int, tokens: int, ours_alone: bool) -> dict[str, dict[str, Job]]:
    """Of each model who trains it, by the names of the table's columns."""
    threads = os.cpu_count() or 1
    made = {name: {"xla": Job("ours", config, rows, tokens, threads)} for name, config in models(tokens).items()}
    if not ours_alone:
        made["plain"]["fla"] = Job("fla", models(tokens)["plain"], rows, tokens, threads)
    return made


def training_rows(rows: int, tokens: int, count: int, ours_alone: bool) -> list[dict[str, Any]]:
    """A row a model; milliseconds a step."""
    return [one_model(name, sides, count) for name, sides in jobs(rows, tokens, ours_alone).items()]


def one_model(name: str, sides: dict[str, Job], count: int, steps: int = STEPS) -> dict[str, Any]:
    """The contestants of one model in turns, `count` rounds."""
    job = next(iter(sides.values()))
    shape = {"rows": job.rows, "tokens": job.tokens}
    with contextlib.ExitStack() as stack:
        who = {side: stack.enter_context(Contestant(job)) for side, job in sides.items()}
        for side, contestant in who.items():
            say(f"small, {name}: {side} compiles")
            contestant.turn(WARM_UP)
        turns = {side: list[Any]() for side in who}
        for _ in range(count):
            for side, contestant in who.items():
                turns[side].append(contestant.turn(steps))
        about = {side: contestant.about() for side, contestant in who.items()}
    return {
        "part": "training", "shape": shape, "name": f"small {name}, {job.rows} x {job.tokens}", "pass": "step",
        "milliseconds": {side: [1e3 * one.seconds / steps for one in found] for side, found in turns.items()},
        "losses": {side: [one.losses[-1] for one in found] for side, found in turns.items()}, "about": about,
        "tokens_per_second": {side: [job.rows * job.tokens * steps / one.seconds for one in found]
                              for side, found in turns.items()},
    }  # fmt: skip
