"""Grow an adaptive checkpoint into a deep feed-forward one, or print the plan with --dry-run.

    python -m gt_jax.grow SRC DST --repetition layer_repetition_factor.json
    python -m gt_jax.grow --dry-run --json

- Without --repetition the reference counts 2,1,2,3,2,3,4,3 stand in. A plain model has no counts: it is grown by
  --plan stack, or by a --repetition or --plan-file that is given.
- Defaults: --plan dealt --from k_exec --round up --coefficient expected --correct none --carry gain, the recipe that
  the table of ways of growing in docs/studies.md supports. --recipe readme is the growth README's rule: block,
  schedule, none, weights.
- --keep-gates: the copies keep halting gates, so that each token has its own weight in each of them; --plan layer by
  default.
- --plan-file FILE.json takes a plan that --plan-out, or a dry run with --json, wrote; it may be edited by hand.
- Several processes share the work: the same command with --coordinator HOST:PORT --processes N --process I in each.
- One line says what the growth costs before anything is written. At the end the child is read back, and a few held-out
  batches of the source's own text go through both models; --no-check leaves that out.
- A dry run without SRC reads no checkpoint and loads no array library.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gt_jax.checkpoints.folders import damage
from gt_jax.configs.layout import Layout
from gt_jax.configs.standing import standing
from gt_jax.devices.flags import add_process_flags, is_distributed, wrong_process_flags
from gt_jax.devices.precision import add_precision_flag, computing, products
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Failed, Refused, deliver, first_line, refuse_all, run_command, say
from gt_jax.files import local_name, local_path
from gt_jax.growth import plan_table
from gt_jax.growth.coefficients import COEFFICIENTS, CORRECTIONS
from gt_jax.growth.kept_gates import flags_without_gates, keeping_gates, wrong_order
from gt_jax.growth.layer_map import EXAMPLE, read_map
from gt_jax.growth.memory_size import memory_size
from gt_jax.growth.plan import PASSES_FROM, default_layout, fitted, identity_plan, make_plan
from gt_jax.growth.plan_entries import Plan, depth_of
from gt_jax.growth.plan_file import plan_for, plan_json, unread
from gt_jax.growth.plan_options import RECIPES, coefficients_of, kind_of, layout_of, wrong_plan
from gt_jax.growth.repetition import (
    ALPHA,
    MOST_PASSES,
    REFERENCE_COUNTS,
    Repetition,
    read,
    reference,
    whole_passes,
)
from gt_jax.growth.rounding import ROUNDS
from gt_jax.growth.rules import CARRIES, check_noise
from gt_jax.growth.spread import spread_line
from gt_jax.options import whole

if TYPE_CHECKING:
    import jax

    from gt_jax.configs.model import ModelConfig
    from gt_jax.growth.cost import GrowthCost

def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m gt_jax.grow", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", nargs="?", type=local_path, metavar="SRC",
                      help="checkpoint or run directory to grow from")
    made.add_argument("target", nargs="?", type=local_path, metavar="DST", help="checkpoint to write; must not exist")
    made.add_argument("--repetition", type=local_path, metavar="FILE", help="pass counts written by gt_jax.measure")
    made.add_argument("--plan", metavar="KIND",
                      help="block: whole blocks as often as their passes ask; dealt (default): such groups of layers, "
                      "given to the strongest passes in the recurrence's order; layer: each layer as often as it asks, "
                      "in a row; split: the same, dealt into groups of the pattern; map: the list of --map; stack: the "
                      "whole stack; identity: every layer once")
    made.add_argument("--plan-file", type=local_path, metavar="FILE.json", help="a plan that --plan-out wrote")
    made.add_argument("--map", type=local_name, metavar="LIST|FILE.csv",
                      help=f"source layers from 1, for example {EXAMPLE}")
    made.add_argument("--from", dest="passes_from", choices=PASSES_FROM,
                      help="what a layer asks for: k_exec, the passes that nearly all tokens need, passes_run, their "
                      "mean over tokens, or mean_weight, what they weigh together (k_exec)")
    made.add_argument("--round", choices=ROUNDS, help="when the passes make no whole copies (up)")
    made.add_argument("--target-layers", type=whole, metavar="N", help="the depth that must come out")
    made.add_argument("--target-layout", metavar="LAYOUT", help="the layout that must come out, for example DDDG*5")
    made.add_argument("--coefficient", choices=COEFFICIENTS,
                      help="schedule: alpha of the pass; expected: alpha times the pass's mean survival (expected)")
    made.add_argument("--correct", choices=CORRECTIONS, help="correction of the coefficients (none)")
    made.add_argument("--carry", choices=CARRIES, help="how a coefficient enters the child (gain)")
    made.add_argument("--keep-gates", action="store_true",
                      help="copies keep their halting gates: each token's own weight, not the mean (--plan layer)")
    made.add_argument("--recipe", choices=sorted(RECIPES), help="readme: block, schedule, none, weights")
    made.add_argument("--noise-std", type=float, default=1e-4, metavar="SIGMA", help="noise for diversity (1e-4)")
    made.add_argument("--seed", type=whole, default=0, help="seed of the noise (0)")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the child's weights (the source's)")
    made.add_argument("--memory", default="2GiB", metavar="SIZE", help="memory budget (2GiB)")
    add_process_flags(made)
    add_cache_flag(made)
    made.add_argument("--dry-run", action="store_true", help="print the plan, with SRC every tensor; write nothing")
    made.add_argument("--resume", action="store_true", help="finish an interrupted growth of the same plan")
    made.add_argument("--verify-text", type=local_path, action="append", metavar="FILE",
                      help="compare source and grown model on this text afterwards; may be repeated")
    made.add_argument("--tokenizer", type=local_name, metavar="NAME", help="of --verify-text: bytes, a file or "
                      "a folder (default: what the source was trained with)")
    made.add_argument("--no-check", action="store_true",
                      help="do not read the child back, nor compare it with its source on the source's own text")
    made.add_argument("--no-moments", action="store_true",
                      help="leave out the second moments of the source's optimizer, which training on begins with")
    add_precision_flag(made)
    made.add_argument("--plan-out", type=local_path, metavar="FILE", help="write the plan as JSON")
    made.add_argument("--picture", type=local_path, metavar="FILE.png",
                      help="draw the plan: its order, passes asked for and granted, coefficient mass kept")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or raises `Refused` with what would be right."""
    args = parser().parse_intermixed_args(argv)
    refuse_all(_wrong_processes(args), "these arguments do not go together:")
    if not args.dry_run:
        keep_programs(args)
    if not is_distributed(args):
        return _run(args, lambda work: work())
    from gt_jax.checkpoints.folders import resolve
    from gt_jax.devices.processes import process_group

    with process_group(args) as group:
        if args.source is not None:  # one step for all: a run that goes on may save another meanwhile
            args.source = Path(group.gather(group.agree(lambda: str(resolve(args.source))))[0])
        return _run(args, group.agree, group.first)


def _wrong_processes(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags for several processes."""
    alone = (("--dry-run", args.dry_run, "run it in one"),
             ("--verify-text", args.verify_text, "run gt_jax.verify afterwards"))  # fmt: skip
    return wrong_process_flags(args) + [f"{flag} has no meaning for several processes; {instead}"
                                        for flag, value, instead in alone if is_distributed(args) and value]


def _run(args: argparse.Namespace, agree: Callable[[Callable[[], Any]], Any], first: bool = True) -> int:
    """Everything after the command line; `first` is whether this process prints and keeps results."""
    from gt_jax.monitoring.plan_outputs import plan_writers

    source, plan, counts, warnings, options = agree(lambda: _prepare(args))
    cost = None if source is None else source.cost(plan, counts)
    at = None if source is None else source.stood
    whole = source is not None and source.config.adaptive is not None and source.config.adaptive.weights == "hard"
    told = [*(f"warning: {line}" for line in warnings), *([] if at is None else [f"the source stood {at.line()}"]),
            *([] if cost is None else [cost.line()]),
            *([] if (between := spread_line(counts, plan, whole)) is None else [between])]
    for line in told if first else ():
        say(line)
    settings = {"carry": options["carry"], "recipe": args.recipe, "noise_std": args.noise_std, "seed": args.seed,
                "dtype": args.dtype}
    if args.dry_run:
        shown, lines = _dry_run(plan, counts, settings, source, warnings, not args.no_moments)
    else:
        assert source is not None  # `_check` refuses a growth without one
        shown, lines = _grow(args, source.folder, plan, counts, settings, agree, first)
    unverified = None
    if source is not None and args.verify_text:
        from gt_jax.evaluation.growth_check import verify_growth
        with products(args.matmul_precision):
            shown["verify"], more, unverified = verify_growth(source.folder, args.target, args.verify_text,
                                                              args.tokenizer)
        lines += ["", *more] if more else []
    if cost is not None:
        shown["cost"] = cost.to_json()
    if at is not None:
        shown["stood"] = at.to_json()
    if first:
        deliver(json.dumps(shown, allow_nan=False) if args.json else "\n".join(lines),
                plan_writers(plan, counts, args.plan_out, args.picture))
    if unverified is not None:
        raise Failed(f"{args.target} is whole, and was not verified ({first_line(unverified)})") from unverified
    return 0


def _prepare(
    args: argparse.Namespace,
) -> tuple[_Source | None, Plan, Repetition | None, tuple[str, ...], dict[str, str]]:
    """Everything that can be refused before anything is written: source, plan and its counts, warnings, how
    coefficients enter."""
    _check(args)
    options = coefficients_of(args)
    source = _Source(args.source) if args.source else None
    plan, counts, warnings = _plan(args, options, source)
    if source is not None and source.stood is not None:
        warnings = (*warnings, *source.stood.warnings(source.folder))
    if args.verify_text and source is not None:
        source.refuse_text(args.verify_text, args.tokenizer)
    return source, plan, counts, warnings, options


class _Source:
    """What a checkpoint says before it is read: config, shape and dtype of the model's `tensors` and of all that are
    `stored`, by path; gains."""

    config: ModelConfig
    folder: Path
    tensors: dict[str, jax.ShapeDtypeStruct]
    stored: dict[str, jax.ShapeDtypeStruct]
    metadata: dict[str, Any]

    def __init__(self, path: Path) -> None:
        from gt_jax.checkpoints.opened import open_checkpoint
        found = open_checkpoint(path)
        self.folder = found.folder  # for all that follows: a run that goes on may save another step meanwhile
        self.config, self.tensors, self.metadata = found.config, found.model, found.metadata
        self.stored = found.tensors
        self.path, self.stood = path, standing(found.metadata)
        from gt_jax.growth.cost import stored_gains
        from gt_jax.growth.transform import by_no_plan
        refuse_all(by_no_plan(self.config), "the source cannot be grown:")  # before what is said of a plan
        self.gains = stored_gains(self.folder, self.config, self.tensors)

    def cost(self, plan: Plan, counts: Repetition | None) -> GrowthCost:
        """What growing this source buys and costs."""
        from gt_jax.growth.cost import cost_of_checkpoint
        return cost_of_checkpoint(self.config, self.tensors, self.metadata, plan, counts, self.gains)

    def refuse_text(self, files: Sequence[Path], tokenizer: str | None) -> None:
        """Refuse, before anything is written, text that cannot be verified on."""
        from gt_jax.evaluation.loading import data_config
        from gt_jax.text.data import open_data
        from gt_jax.text.flags import file_fields
        open_data(data_config(self.metadata, {**file_fields([*map(str, files)]), "tokenizer": tokenizer}, self.path))


def _check(args: argparse.Namespace) -> None:
    """Refuse, before anything is read, arguments that contradict each other or have impossible values."""
    wrong = []
    if args.dry_run:
        wrong += [f"{flag} has no meaning in a --dry-run" for flag, value in
                  (("--resume", args.resume), ("--verify-text", args.verify_text), ("--no-check", args.no_check))
                  if value]
    elif args.target is None:
        wrong.append("SRC and DST are needed; to see the plan alone use --dry-run")
    if args.target is not None and args.source.resolve() == args.target.resolve():
        wrong.append(f"DST {args.target} is the source itself; name a new folder")
    elif args.target is not None and os.path.lexists(args.target):
        then = "name a new folder, or move it away"
        if args.resume and damage(args.target) is None:
            then = f"it is whole, nothing is left to finish: describe {args.target} --check and verify look at it"
        wrong.append(f"DST {args.target} exists; {then}")
    if args.target_layers is not None and args.target_layers < 1:
        wrong.append(f"--target-layers {args.target_layers}: at least 1 is needed")
    from gt_jax.text.token_folder import is_token_folder  # here: --help needs no numpy

    for path in args.verify_text or []:
        if not is_token_folder(str(path)) and (not path.is_file() or path.stat().st_size == 0):
            wrong.append(f"--verify-text {path} is {'empty' if path.is_file() else 'not a file'}")
    if args.tokenizer is not None and not args.verify_text:
        wrong.append("--tokenizer reads --verify-text; there is none")
    from gt_jax.monitoring.plan_outputs import wrong_outputs

    wrong += wrong_plan(args) + (flags_without_gates(vars(args)) if args.keep_gates else [])
    wrong += wrong_outputs(args.target, args.plan_out, args.picture)
    refuse_all(wrong, "these arguments do not go together:")
    check_noise(args.noise_std, args.seed)
    memory_size(args.memory)


def _plan(args: argparse.Namespace, options: Mapping[str, str],
          source: _Source | None) -> tuple[Plan, Repetition | None, tuple[str, ...]]:
    """The plan, the counts behind it, and what the user should know about them."""
    kind, warnings, counts = kind_of(args), list[str](), None
    wanted = layout_of(args.target_layout)
    if kind == "file":
        plan, counts, there = plan_for(args.plan_file, source.config.depth if source else None)
        used = {name: getattr(args, name) for name in ("noise_std", "seed", "dtype", "recipe")}
        used["carry"] = options["carry"]
        warnings += [*_assumed(plan, counts, source), *unread(args.plan_file, there, used)]
    elif kind == "identity":
        plan = identity_plan(source.config.depth if source else default_layout(reference()))
    else:
        counts, warnings = _counts(args, source, kind, wanted)
        depth = source.config.depth if source else default_layout(counts)
        layers = read_map(args.map, len(depth)) if kind == "map" else ()
        plan = make_plan(kind, counts, depth, round=args.round or "up", target_layers=args.target_layers,
                         coefficient=options["coefficient"], correct=options["correct"],
                         passes_from=args.passes_from or "k_exec", layers=layers, target_layout=wanted)
    if wanted is not None and kind in ("file", "identity"):
        plan = fitted(plan, wanted)
    if args.keep_gates:
        plan = keeping_gates(plan, (_alpha(source) or ()) if source else (counts or reference()).alpha)
    if source is None and plan.keeps_gates:  # with one `target_config` says all that is in the way
        refuse_all(wrong_order(plan, len(plan.options["alpha"])), "the gates cannot be kept:")
    gains, streams = (None, False) if source is None else (source.gains, source.config.hyper is not None)
    return plan, counts, (*warnings, *plan_table.warnings(plan, options["carry"], gains, streams))


def _assumed(plan: Plan, counts: Repetition | None, source: _Source | None) -> list[str]:
    """What had to be assumed of a plan from a file; raises `Refused` where its counts are of another model."""
    if source is None or plan.kind == "identity":
        return []
    if counts is None:
        return ["the plan file carries no counts (an earlier version wrote it): whether they were of this source is "
                "not checked"]  # fmt: skip
    return [*counts.warnings, *counts.unsaid(source.config.depth, _alpha(source))]


def _alpha(source: _Source) -> tuple[float, ...] | None:
    return source.config.adaptive.alpha if source.config.adaptive else None


def _counts(args: argparse.Namespace, source: _Source | None, kind: str,
            wanted: Layout | None) -> tuple[Repetition, list[str]]:
    """The pass counts, and what had to be assumed; raises `Refused` for counts measured at other strengths.

    A plain source is stacked whole, as often as the depth that is asked for has its layers, else twice. For another
    plan of it counts must be given: the reference ones are of a recurrence that it does not have.
    """
    if source and source.config.adaptive is None and not args.repetition:
        if kind != "stack":
            raise Refused(f"{args.source} is a plain model, which has no pass counts: --plan stack repeats it whole "
                          "(--plan identity as it is), --repetition FILE or --plan-file FILE says what to copy and how "
                          "strongly, or `python -m gt_jax retrofit` makes it adaptive first, and its passes countable")
        depth = len(source.config.depth)
        asked = args.target_layers or (depth_of(wanted) if wanted else 2 * depth)
        return whole_passes(depth, min(MOST_PASSES, -(-asked // depth))), []
    alpha = (_alpha(source) if source else None) or ALPHA
    counts = read(args.repetition, alpha) if args.repetition else reference(alpha)
    warnings = list(counts.warnings)
    if source and not args.repetition:
        warnings.append(f"no --repetition: the reference counts {','.join(map(str, REFERENCE_COUNTS))} are used, not "
                        "this source's own; `python -m gt_jax.measure` writes those")
    return counts, warnings + (counts.unsaid(source.config.depth, _alpha(source)) if source else [])


def _dry_run(plan: Plan, counts: Repetition | None, settings: Mapping[str, Any], source: _Source | None,
             warnings: Sequence[str], moments: bool) -> tuple[dict[str, Any], list[str]]:
    """The dry run's JSON object, and its lines; of a growth with `moments` or without."""
    shown = {**plan_json(plan, counts), **settings, "warnings": list(warnings)}
    lines = [*plan_table.plan_lines(plan), f"carry {settings['carry']}, noise {settings['noise_std']:g} with seed "
             f"{settings['seed']}, recipe {settings['recipe'] or 'none'}"]
    if source is not None:
        from gt_jax.growth.moments import moment_leaves
        from gt_jax.growth.transform import child_abstract, match
        child = child_abstract(source.config, plan, settings["dtype"])
        leaves, dropped = match(source.tensors, child, plan, settings["carry"])
        tensors = [leaf.to_json() for leaf in leaves]
        carried = sum(leaf.nbytes for leaf in moment_leaves(source.stored, leaves)) if moments else 0
        shown |= {"tensors": tensors, "dropped": list(dropped), "moments": carried,
                  "bytes": carried + sum(row["bytes"] for row in tensors)}
        lines += ["", *plan_table.tensor_lines(tensors, dropped, carried)]
    return shown, lines


def _grow(args: argparse.Namespace, source: Path, plan: Plan, counts: Repetition | None, settings: Mapping[str, Any],
          agree: Callable[[Callable[[], Any]], Any], first: bool) -> tuple[dict[str, Any], list[str]]:
    """Grow, and look at the child; the JSON object and the lines that show both.

    `source` is the checkpoint that SRC names.
    """
    from gt_jax.growth import stream

    result = stream.grow_checkpoint(
        source, args.target, plan=plan, carry=settings["carry"], noise_std=settings["noise_std"],
        seed=settings["seed"], dtype=settings["dtype"], memory=memory_size(args.memory), resume=args.resume,
        counts=counts, moments=not args.no_moments, progress=say if first else None)
    shown: dict[str, Any] = {"source": str(args.source), "target": str(args.target), "plan": plan.to_json(),
                             **settings, "report": result}
    size = plan_table.with_moments(result["bytes"], result["moments"])
    lines = [*plan_table.plan_lines(plan), "", f"{args.target}: {result['tensors']} tensors, {size}, "
             f"{result['seconds']:.1f} s; {len(result['dropped'])} tensors dropped"]
    if not args.no_check:
        from gt_jax.evaluation.growth_check import check_growth, check_lines
        alone = not is_distributed(args)
        with computing(args.matmul_precision, first):
            found = agree(lambda: check_growth(source, args.target, say, alone=alone) if first else None)
        shown["check"], more = (found, check_lines(found)) if first else (None, [])
        lines += ["", *more]
    return shown, lines


if __name__ == "__main__":
    run_command(main)
