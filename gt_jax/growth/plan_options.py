"""What `gt_jax.grow`'s options say of a plan: its kind, its coefficients, its layout, and which do not go together."""

from __future__ import annotations

import argparse
from pathlib import Path

from gt_jax.configs.layout import Layout, parse
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.layer_map import EXAMPLE
from gt_jax.growth.plan import PLANS

DEFAULT_PLAN = "dealt"
DEFAULTS = {"coefficient": "expected", "correct": "none", "carry": "gain"}
RECIPES = {"readme": {"coefficient": "schedule", "correct": "none", "carry": "weights"}}
KINDS = (*PLANS, "identity")


def wrong_plan(args: argparse.Namespace) -> list[str]:
    """What is wrong with --plan itself, and the flags that its kind has no use for."""
    kind, wrong = kind_of(args), []
    if args.plan is not None and args.plan not in KINDS:
        is_file = args.plan.endswith(".json") or Path(args.plan).exists()
        return [f"--plan {args.plan} is none of {', '.join(KINDS)}"
                + (f"; a plan file is named by --plan-file {args.plan}" if is_file else "")]
    if kind == "map" and args.map is None:
        wrong.append(f"--plan map needs its list: --map {EXAMPLE}, or --map FILE.csv")
    all_made = ("map", "repetition", "passes_from", "round", "target_layers", "coefficient", "correct", "recipe")
    without = {"file": ("plan", *all_made), "identity": all_made, "map": ("round",)}.get(kind, ("map",))
    named = f"--plan-file {args.plan_file}" if kind == "file" else f"--plan {kind}"
    return wrong + [f"--{'from' if flag == 'passes_from' else flag.replace('_', '-')} has no meaning for {named}"
                    for flag in without if getattr(args, flag) is not None]


def kind_of(args: argparse.Namespace) -> str:
    """The kind of plan, `file` for one that is read from a file."""
    if args.plan_file is not None:
        return "file"
    if args.keep_gates and args.plan is None and args.map is None:
        return "layer"
    if args.plan is None:
        return "map" if args.map is not None else DEFAULT_PLAN if args.recipe is None else "block"
    return str(args.plan)


def coefficients_of(args: argparse.Namespace) -> dict[str, str]:
    """Coefficient, correction and carry: the recipe's, else the flags', else the defaults."""
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if args.recipe is None:
        return DEFAULTS | given
    fixed = RECIPES[args.recipe]
    refuse_all([f"--{name} {value} contradicts it, it means --{name} {fixed[name]}" for name, value in given.items()
                if value != fixed[name]], f"--recipe {args.recipe} is a fixed rule:")
    return dict(fixed)


def layout_of(text: str | None) -> Layout | None:
    """The layout of --target-layout, where it is given; raises `Refused` for what is none."""
    if text is None:
        return None
    try:
        return parse(text)
    except Refused as error:
        raise Refused(f"--target-layout: {error}") from None
