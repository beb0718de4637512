"""Make a plain checkpoint adaptive: the same model, with halting heads whose gates are closed.

    python -m gt_jax.retrofit SRC DST
    python -m gt_jax.retrofit SRC DST --strengths 1,1,1 --price-rule budget --pass-price 0.02
    python -m gt_jax.retrofit SRC DST --dry-run

- DST computes what SRC does: no token runs a second pass. `python -m gt_jax.train RUN --start DST` opens the gates: it
  forces all passes while the gates rise; then the price decides.
- SRC is a plain checkpoint or run: a converted, a trained or a grown one. Then measure and grow as always.
- The model is read back at the end, and its logits are compared with the source's; --no-check leaves that out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from gt_jax.configs.adaptive import AdaptiveConfig
from gt_jax.configs.price import PriceConfig, Rule, TargetOf, fits_rule, opening
from gt_jax.devices.precision import add_precision_flag, computing
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Refused, deliver, refuse_all, run_command, say
from gt_jax.files import local_path
from gt_jax.growth.memory_size import memory_size
from gt_jax.options import whole

TARGET = 1.5  # passes a token and layer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.retrofit", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=local_path, metavar="SRC", help="plain checkpoint, or run directory")
    p.add_argument("destination", type=local_path, metavar="DST", help="checkpoint to write; must not exist")
    p.add_argument("--strengths", metavar="LIST", help="strength of each pass, the first one 1: as many passes as it "
                   "has numbers (1,0.7,0.5,0.35)")
    p.add_argument("--gates", choices=("features", "state"), default="state", help="what the halting heads see: "
                   "features of the pass, or the token's state and the number of the pass too (state)")
    p.add_argument("--context", choices=("all", "alive"), default="all", help="whom a token sees in later passes: "
                   "finished tokens too, or those alive; then a pass costs what the living are, in decoding too (all)")
    p.add_argument("--price-rule", choices=get_args(Rule), default="budget",
                   help="what steers the depth once the gates are open (budget)")
    p.add_argument("--target", type=float, help=f"depth of a layer that the price aims at ({TARGET})")
    p.add_argument("--target-of", choices=get_args(TargetOf), help="what that is the mean of: "
                   "the passes that a token runs, or their summed weights (passes_run)")
    p.add_argument("--pass-price", type=float, metavar="NATS", help="instead of a target: what one more pass of a "
                   "token in a layer costs (--price-rule budget)")
    p.add_argument("--seed", type=whole, default=0, help="of what the heads see at first (0)")
    p.add_argument("--memory", default="2GiB", metavar="SIZE", help="memory budget (2GiB)")
    p.add_argument("--dry-run", action="store_true", help="print what would be written; write nothing")
    p.add_argument("--resume", action="store_true", help="finish an interrupted retrofit with the same options")
    p.add_argument("--no-check", action="store_true", help="do not read the model back, nor compare its logits")
    p.add_argument("--no-moments", action="store_true",
                   help="leave out the second moments of the source's optimizer, which training on begins with")
    add_precision_flag(p)
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_cache_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or raises `Refused` with what would be right."""
    args = parser().parse_args(argv)
    adaptive, price, memory = _settings(args)
    options = {"adaptive": adaptive, "price": price, "seed": args.seed, "moments": not args.no_moments}
    if args.dry_run:
        shown = _dry_run(args, options)
        lines = _lines(shown, price)
    else:
        from gt_jax.evaluation.retrofit_check import check_lines, check_retrofit
        from gt_jax.growth.retrofit import retrofit_checkpoint
        keep_programs(args)
        shown = retrofit_checkpoint(args.source, args.destination, **options, memory=memory, resume=args.resume,
                                    progress=say)  # fmt: skip
        lines = _lines(shown, price)
        if not args.no_check:
            with computing(args.matmul_precision):
                shown["check"] = check_retrofit(Path(shown["source"]), args.destination, say)
            lines += check_lines(shown["check"])
    deliver(json.dumps(shown, allow_nan=False) if args.json else "\n".join(lines))
    return 0


def _settings(args: argparse.Namespace) -> tuple[AdaptiveConfig, PriceConfig, int]:
    """What the flags ask for; raises `Refused` that lists all that is wrong with them."""
    wrong = fits_rule(args.price_rule, args.target, args.pass_price)
    priced = args.pass_price is not None
    if priced and args.target_of is not None:
        wrong.append(f"target-of {args.target_of} says what a target is the mean of; a pass price has none")
    if args.resume and args.dry_run:
        wrong.append("--resume has no meaning in a --dry-run")
    if not 0 <= args.seed < 2**32:
        wrong.append(f"--seed is {args.seed}; it must lie in 0 … {2**32 - 1}")
    try:
        alpha = AdaptiveConfig.alpha if args.strengths is None else tuple(map(float, args.strengths.split(",")))
    except ValueError:
        wrong.append(f"--strengths {args.strengths!r} is no list of numbers such as 1,0.7,0.5,0.35")
        alpha = AdaptiveConfig.alpha
    refuse_all(wrong, "these arguments do not go together:")
    base = AdaptiveConfig(alpha=alpha, context=args.context)
    from gt_jax.growth.retrofit import closed
    adaptive = closed(base.seeing_state if args.gates == "state" else base)
    more = {"value": args.pass_price} if priced else {"target_of": args.target_of or "passes_run"}
    target = None if priced else TARGET if args.target is None else args.target
    if target is not None and target > len(adaptive.alpha):
        raise Refused(f"--target is {target:g}; with --strengths {','.join(f'{one:g}' for one in adaptive.alpha)} a "
                      f"layer runs {len(adaptive.alpha)} times at most")
    price = opening(adaptive.initial_bias, len(adaptive.alpha), args.price_rule, target, **more)
    return adaptive, price, memory_size(args.memory)


def _dry_run(args: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a retrofit that is not done."""
    from gt_jax.checkpoints.opened import open_checkpoint
    from gt_jax.growth.retrofit import target_of
    if os.path.lexists(args.destination):
        raise Refused(f"DST {args.destination} exists; name a new folder, or move it away")
    opened = open_checkpoint(args.source)
    made = target_of(opened.folder, opened, **options)
    sizes = [*(leaf.nbytes for leaf in (*made.leaves, *made.moments)), *(one.nbytes for one in made.new.values())]
    return {"source": str(opened.folder), "target": str(args.destination), "tensors": len(sizes), "bytes": sum(sizes),
            "moments": sum(leaf.nbytes for leaf in made.moments), "dropped": list(made.dropped),
            "new": {path: list(one.shape) for path, one in made.new.items()}, "config": made.config.to_json(),
            "retrofitted_from": made.record}  # fmt: skip


def _lines(shown: Mapping[str, Any], price: PriceConfig) -> list[str]:
    """The report for a reader."""
    from gt_jax.growth.plan_table import size
    alpha = shown["config"]["adaptive"]["alpha"]
    aim = (f"a pass costs {price.value:g} nats" if price.target is None
           else f"{price.target_of} is held at {price.target:g}")
    took = f", {shown['seconds']:.1f} s" if "seconds" in shown else ", not written"
    carried = f" ({size(shown['moments'])} of it second moments)" if shown["moments"] else ""
    return [f"{shown['target']}: layout {shown['config']['layout']}, up to {len(alpha)} passes a layer at strengths "
            f"{', '.join(f'{one:g}' for one in alpha)}, all gates closed",
            f"{shown['tensors']} tensors, {size(shown['bytes'])}{carried}{took}",
            f"train --start {shown['target']} opens the gates over the first {100 * price.forced_until:.0f} % of its "
            f"steps, with all passes forced; then rule {price.rule}: {aim}"]  # fmt: skip


if __name__ == "__main__":
    run_command(main)
