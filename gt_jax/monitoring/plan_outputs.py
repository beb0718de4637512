"""The files that a plan of growth is written to beside the result: the plan itself, and its picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from gt_jax.files import write_atomically, wrong_place
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.plan_file import plan_json
from gt_jax.growth.repetition import Repetition


def wrong_outputs(target: Path | None, plan_out: Path | None, picture: Path | None) -> list[str]:
    """What keeps --plan-out and --picture from being written; they come last, when everything else is done."""
    wrong, taken = [], {target.resolve()} if target else set()
    for flag, path in (("--plan-out", plan_out), ("--picture", picture)):
        if path is None:
            continue
        if os.path.lexists(path):
            wrong.append(f"{flag} {path} exists; name a new file")
        elif problem := wrong_place(path):
            wrong.append(f"{flag} {path}: {problem}")
        elif path.resolve() in taken:
            wrong.append(f"{flag} {path} is also the name of another output")
        elif flag == "--picture" and path.suffix.lower() != ".png":
            wrong.append(f"--picture {path}: pictures are PNG; name it {path.with_suffix('.png').name}")
        taken.add(path.resolve())
    return wrong


def plan_writers(
    plan: Plan, counts: Repetition | None, plan_out: Path | None, picture: Path | None
) -> dict[str, Callable[[], None]]:
    """By their flags, what writes the plan and its picture where they are asked for."""

    def write() -> None:
        assert plan_out is not None
        text = json.dumps(plan_json(plan, counts), indent=1, allow_nan=False)
        write_atomically(plan_out, text + "\n", replace=False)

    def draw() -> None:
        from gt_jax.monitoring.picture_file import write_picture
        from gt_jax.monitoring.plots import plot_plan

        assert picture is not None
        write_picture(lambda image: plot_plan(plan, image), picture)

    asked = {f"--plan-out {plan_out}": write} if plan_out is not None else {}
    return {**asked, f"--picture {picture}": draw} if picture is not None else asked
