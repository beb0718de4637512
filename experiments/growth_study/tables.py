"""The Markdown report: tables sorted by what they are about, and sentences that follow from the figures by rule.

A difference is called a difference only where it has the same sign at every seed; with one seed nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.growth_study.operators import BLOCK, DEALT, ONCE, OPERATORS, README
from experiments.growth_study.results import Spread, Units, best, of, paired, spread
from experiments.growth_study.run import CONTROLS, LONGER, ON_FLOPS, ON_TOKENS, SCRATCH_FLOPS, SCRATCH_TOKENS, Rates
from experiments.growth_study.study import StudyConfig
from gt_jax.growth import repetition

GAP_WANTED, CALIBRATED_WANTED, SHARE_WANTED = 1.0, 0.3, 0.5
PARTS = ("spread", "tail", "order", "total")
Found = Mapping[str, Any]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return [f"| {' | '.join(row)} |" for row in (headers, rule, *rows)]


def markdown(study: StudyConfig, units: Units, found: Found, rates: Rates, command: str) -> str:
    """The whole report."""
    names = [one.name for one in OPERATORS]
    order = sorted(names, key=lambda name: of(found, name, "final").mean)
    first = order[0]
    tokens, total = (steps * study.tokens_per_step / 1e3
                     for steps in (study.further_steps, study.source_steps + study.further_steps))  # fmt: skip
    lines = [
        "# Ways of growing an adaptive checkpoint, compared", "",
        f"`{command}`", "",
        f"Seeds {', '.join(map(str, study.seeds))}; figures are means over seeds (smallest .. largest). Bytes of "
        f"{', '.join(study.text)}; sources of {len(study.source.depth)} layers, width {study.width}, trained on "
        f"{study.source_steps * study.tokens_per_step / 1e3:.0f} thousand bytes, then every model on the next "
        f"{tokens:.0f} thousand, the same for all. Losses are nats a byte on {study.evaluation_batches} held-out "
        f"batches of {study.tokens_per_step} bytes; passes were measured on other held-out text.", "",
        "## The sources", "", *sources(units), "",
        "## Operators, by their loss after training on", "",
        *table(("operator", "layers", "gap at growth, %", "thousand bytes back to the source's loss",
                f"loss after {tokens:.0f} thousand bytes", f"minus {first}"),
               [(name, layers(found, name), signed(of(found, name, "gap")), of(found, name, "back").text("{:.0f}"),
                 of(found, name, "final").text(), signed(paired(found, name, first), "{:+.4f}"))
                for name in order]),
        "", "## Against the controls, by total training FLOPs", "",
        *controls(study, found, order), "",
        f"From scratch: {study.target_layers} layers, learning rate {rates.scratch:g}, the best of "
        f"{tuned(study, units, SCRATCH_FLOPS)} by the held-out loss of the run at equal FLOPs at seed "
        f"{study.seeds[0]}. {LONGER}: {rates.longer:g}, likewise the best of {tuned(study, units, LONGER)}. "
        "*Thousand bytes to scratch* are those "
        f"after growth until the final loss of the model from scratch on {total:.0f} thousand bytes; the *share* is of "
        "those, in brackets with the source's own training counted too. FLOPs are counted as growth_study/flops.py "
        "says; calibration is in them.", "",
        "## What the gaps are made of", "",
        "In % of the source's loss. *spread*: every pass at its mean weight instead of each token's own. *tail*: "
        "passes that the plan grants no copy. *order*: the order of the plan instead of the recurrence's. *check*: the "
        "unrolled source against the source with its passes fixed.", "", *parts(units), "",
        "## What the figures say", "", *[f"- {line}" for line in findings(study, units, found, first)], "",
        "![](growth_operators.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def signed(value: Spread, pattern: str = "{:+.2f}") -> str:
    """With its sign."""
    return value.text(pattern)


def layers(found: Found, name: str) -> str:
    """The depth, or its range over seeds."""
    depths = sorted(set(found[name]["layers"]))
    return str(depths[0]) if len(depths) == 1 else f"{depths[0]} .. {depths[-1]}"


def sources(units: Units) -> list[str]:
    """One row a seed: loss, depth by its three measures (means over layers), and what fixing the passes costs."""
    rows = []
    for seed, one in units.items():
        source = one["source"]
        own = repetition.from_json(source["measured"]).layers
        depths = ([layer.mean_weight for layer in own], [layer.passes_run for layer in own],
                  source["adaptive"]["passes"])  # fmt: skip
        fixed = one["analysis"]["passes_fixed"]
        rows.append((str(seed), f"{source['loss']:.4f}", *(f"{sum(depth) / len(depth):.2f}" for depth in depths),
                     " ".join(str(layer.k_exec) for layer in own), f"{fixed:+.2f}",
                     f"{100 * source['separation']['windows_seen']:.1f}"))  # fmt: skip
    return table(("seed", "held-out loss", "mean weight", "passes run", "passes computed", "k_exec",
                  "passes fixed at k_exec, %",
                  "held-out windows of 64 bytes also in the training part, %"), rows)  # fmt: skip


def tuned(study: StudyConfig, units: Units, name: str) -> str:
    """The rates that were tried, with their losses."""
    tried = units[study.seeds[0]]["tuning"][name]
    return ", ".join(f"{float(rate):g} ({loss:.4f})" for rate, loss in tried.items())


def controls(study: StudyConfig, found: Found, order: Sequence[str]) -> list[str]:
    """Controls and operators together, by loss."""
    names = sorted([*CONTROLS, *order], key=lambda name: of(found, name, "final").mean)
    rows = []
    for name in names:
        bold = f"**{name}**" if name in CONTROLS else name
        if "there" in found[name]["spread"]:
            there, share, everything = (of(found, name, key) for key in ("there", "share", "share_all"))
            reach = there.text("{:.0f}")
            shares = f"{share.mean:.2f} ({everything.mean:.2f})" if share.reached else "-"
        else:
            reach = shares = "-"
        rows.append((bold, of(found, name, "flops").text("{:.2f}"), of(found, name, "final").text(), reach, shares))
    return table(("model", "training FLOPs, 1e12", "final loss", "thousand bytes to scratch", "share"), rows)


def parts(units: Units) -> list[str]:
    """Spread, tail, order: % of the source's loss, by model and seed and in the mean; they add up to the total."""
    rows = []
    for name in next(iter(units.values()))["analysis"]["models"]:
        figures = [(one["analysis"]["spread"], *(one["analysis"]["models"][name][key] for key in PARTS[1:]))
                   for one in units.values()]  # fmt: skip
        rows += [(name, str(seed), *(f"{figure:+.2f}" for figure in row), f"{one['analysis']['check']:.0e}")
                 for (seed, one), row in zip(units.items(), figures, strict=True)]  # fmt: skip
        rows.append((name, "mean", *(f"{spread(column).mean:+.2f}" for column in zip(*figures, strict=True)), ""))
    return table(("operator", "seed", "spread", "tail", "order", "total gap", "check, nats"), rows)


def clear(difference: Spread) -> bool:
    """Whether a difference has one sign at every seed, of several."""
    return difference.seeds > 1 and difference.reached == difference.seeds and difference.low * difference.high > 0


def verdict(mine: str, other: str, difference: Spread) -> str:
    """mine against other, by their paired difference (negative: mine is lower)."""
    figure = difference.text("{:+.4f}")
    if difference.seeds == 1:
        return f"{mine} minus {other}: {figure}"
    if not clear(difference):
        return f"{mine} and {other} cannot be told apart ({figure})"
    return f"{mine} ends {'below' if difference.mean < 0 else 'above'} {other} at every seed ({figure})"


def findings(study: StudyConfig, units: Units, found: Found, first: str) -> list[str]:
    """Sentences by rule."""
    names = [one.name for one in OPERATORS]
    plain = [one.name for one in OPERATORS if not one.calibrated and one.plan != "once"]
    lines = [f"Lowest loss after training on: {first}, {of(found, first, 'final').text()}."]
    close = [name for name in names if name != first and not clear(paired(found, name, first))]
    if len(study.seeds) == 1:
        lines.append("One seed: differences are shown, but none is claimed.")
    elif close:
        lines.append(f"Not to be told apart from it on these seeds: {', '.join(close)}.")
    nearest = best(found, "gap", plain, abs)
    lines.append(f"Smallest gap at growth without training: {nearest}, {signed(of(found, nearest, 'gap'))} %.")
    lines += [target(found, name, GAP_WANTED) for name in (README, BLOCK, DEALT)]
    lines += [target(found, one.name, CALIBRATED_WANTED) for one in OPERATORS if one.calibrated]
    errors = {name: max(found[name]["seeds"]["gap_error"]) for name in names}
    lines.append(f"The standard error of one seed's gap on the held-out batches (paired), %: "
                 f"{errors[BLOCK]:.2f} {BLOCK}, {errors[DEALT]:.2f} {DEALT}, at most {max(errors.values()):.2f}.")
    others = (README, ONCE, "random new layers", ON_TOKENS, ON_FLOPS, SCRATCH_FLOPS, SCRATCH_TOKENS)
    pairs = ((DEALT, BLOCK), (BLOCK, README), *((DEALT, other) for other in others))
    lines += [verdict(mine, other, paired(found, mine, other)) + "." for mine, other in pairs]
    lines += [reach(found, name) for name in (BLOCK, DEALT, LONGER)]
    for name, tried in units[study.seeds[0]]["tuning"].items():
        if len(tried) > 1 and min(tried, key=tried.__getitem__) in (min(tried, key=float), max(tried, key=float)):
            lines.append(f"{name} did best at the end of the rates that were tried; a rate beyond it may be better "
                         "still.")  # fmt: skip
    lines += [largest(units, name) for name in (BLOCK, DEALT)]
    if diverged := [name for name in found if any(found[name]["diverged"])]:
        lines.append(f"Diverged at one seed or more: {', '.join(diverged)}.")
    return lines


def largest(units: Units, name: str) -> str:
    """Which part of an operator's gap is the largest."""
    means = {"spread": spread([one["analysis"]["spread"] for one in units.values()])}
    means |= {key: spread([one["analysis"]["models"][name][key] for one in units.values()]) for key in PARTS[1:3]}
    most = max(means, key=lambda key: abs(means[key].mean))
    return f"The largest part of the gap of {name} is the {most}, {signed(means[most])} %."


def target(found: Found, name: str, wanted: float) -> str:
    """An operator's gap, and whether the figure wanted of its mean is met."""
    gap = of(found, name, "gap")
    met = "met" if abs(gap.mean) <= wanted else "not met"
    return f"Gap at growth of {name}: {signed(gap)} %; wanted: within {wanted:g} %, {met}."


def reach(found: Found, name: str) -> str:
    """Bytes to the model from scratch's final loss."""
    there, share, everything = (of(found, name, key) for key in ("there", "share", "share_all"))
    if there.reached < there.seeds:
        return (f"{name} reaches the final loss of the model from scratch at {there.reached} of {there.seeds} seeds "
                "within its further training.")  # fmt: skip
    met = "met" if share.mean <= SHARE_WANTED else "not met"
    return (f"{name} needs {there.text('{:.0f}')} thousand bytes after growth to reach the final loss of the model "
            f"from scratch, {share.mean:.2f} of that model's (wanted: at most {SHARE_WANTED:g}, {met}); with the "
            f"source's own training counted, {everything.mean:.2f}.")  # fmt: skip
