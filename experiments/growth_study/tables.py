"""The Markdown report: tables sorted by what they are about, each with the compute that it took and its seeds.

What may be called a difference, and how a time that was not reached is written, is in inference.py; the sentences that
follow from the figures by rule are in findings.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.growth_study.findings import cannot_tell, findings
from experiments.growth_study.inference import interval
from experiments.growth_study.operators import DEALT, OPERATORS
from experiments.growth_study.results import Units, of, paired, times
from experiments.growth_study.run import CONTROLS, LONGER, SCRATCH_FLOPS, Rates
from experiments.growth_study.study import StudyConfig

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
    further, before = (steps * study.tokens_per_step / 1e3 for steps in (study.further_steps, study.source_steps))
    seeds = f"{len(study.seeds)} seed{'s' * (len(study.seeds) != 1)}"
    lines = [
        "# Ways of growing an adaptive checkpoint, compared", "",
        f"`{command}`", "",
        f"Seeds {', '.join(map(str, study.seeds))}. Every figure is a mean over {seeds}; in brackets its 95 % "
        "interval, which is over seeds and says nothing of other text. A difference is of pairs, seed by seed, and is "
        "called one where its interval leaves out 0. A time that a run had not reached when it ended is written as *> "
        "its end*. "
        "FLOPs are all that led to a model, in 10^12, counted as growth_study/flops.py says: the source's training, "
        "measuring and calibration, the training after growth.", "",
        f"Bytes of {', '.join(study.text)}; sources of {len(study.source.depth)} layers, width {study.width}, trained "
        f"on {before:.0f} thousand bytes, then every model on the next {further:.0f} thousand, the same for all. "
        f"Losses are nats a byte on {study.evaluation_batches} held-out batches of {study.tokens_per_step} bytes, on "
        "which no model trained and no passes were measured.", "",
        "## The sources", "", *sources(units), "",
        "*Mean weight* is the mean over tokens of the summed weights of a layer's passes; the price of this study "
        "steers it. *Passes run* are those that a token runs, since a pass runs while its weight is at least 0.10; "
        "*passes computed* those that run for a batch, when any of its tokens is alive. Weight and passes run are of "
        "the batches measured on, passes computed of the held-out ones.", "",
        f"## Operators, by their loss after training on ({seeds})", "",
        *operators(found, order, further), "",
        f"## Against the controls ({seeds})", "",
        *controls(study, found, order), "",
        *learning_rates(study, units, found, rates), "",
        f"*Thousand bytes to scratch* are those after growth until the final loss of the model from scratch on "
        f"{before + further:.0f} thousand bytes; the *share* is the median's of those, in brackets with the source's "
        "own training counted too.", "",
        "## What the gaps are made of", "",
        "In % of the source's loss. *spread*: every pass at its mean weight instead of each token's own. *tail*: "
        "passes that the plan grants no copy. *order*: the order of the plan instead of the recurrence's. *check*: the "
        "unrolled source against the source with its passes fixed. Nothing is trained here; the FLOPs are those up to "
        "growth.", "",
        *parts(units, found), "",
        "## What the figures say", "", *[f"- {line}" for line in findings(study, units, found, order[0])], "",
        "## What they cannot tell", "", *[f"- {line}" for line in cannot_tell(study, found)], "",
        "![](growth_operators.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def layers(found: Found, name: str) -> str:
    """The depth, or its range over seeds."""
    depths = sorted(set(found[name]["layers"]))
    return str(depths[0]) if len(depths) == 1 else f"{depths[0]} to {depths[-1]}"


def sources(units: Units) -> list[str]:
    """One row a seed: loss, compute, weight and passes, and what fixing the passes costs."""
    rows = []
    for seed, one in units.items():
        source = one["source"]
        own = [layer for key, layer in source["measured"].items() if key.startswith("layer")]
        weight, run = (sum(sum(layer[key]) for layer in own) / len(own) for key in ("survival", "alive"))
        computed = source["adaptive"]["passes"]
        fixed = one["analysis"]["passes_fixed"]
        rows.append((str(seed), f"{source['loss']:.4f}", f"{source['flops'] / 1e12:.2f}", f"{weight:.2f}", f"{run:.2f}",
                     f"{sum(computed) / len(computed):.2f}", " ".join(str(a["k_exec"]) for a in own), f"{fixed:+.2f}",
                     f"{100 * source['separation']['windows_seen']:.1f}"))  # fmt: skip
    return table(("seed", "held-out loss", "training FLOPs, 1e12", "mean weight", "passes run", "passes computed",
                  "k_exec", "passes fixed at k_exec, %",
                  "held-out windows of 64 bytes also in the training part, %"), rows)  # fmt: skip


def final(found: Found, name: str) -> tuple[str, str]:
    """The loss after training and its difference from the default's; no mean where a seed diverged."""
    if diverged := sum(found[name]["diverged"]):
        return f"diverged at {diverged} of {len(found[name]['diverged'])} seeds", "-"
    if name == DEALT or any(found[DEALT]["diverged"]):
        return of(found, name, "final").text(), "-"
    return of(found, name, "final").text(), paired(found, name, DEALT).text("{:+.4f}")


def compute(found: Found, name: str) -> str:
    """All FLOPs, and what measuring and calibrating are of them."""
    whole, growth = of(found, name, "flops").mean, of(found, name, "growth").mean
    return f"{whole:.2f} ({growth:.2f})"


def operators(found: Found, order: Sequence[str], further: float) -> list[str]:
    """All operators, by loss."""
    rows = [(name, layers(found, name), compute(found, name), of(found, name, "gap").text("{:+.2f}"),
             times(found, name, "back").text(), *final(found, name)) for name in order]  # fmt: skip
    return table(("operator", "layers", "FLOPs, 1e12 (of them measuring and calibration)", "gap at growth, %",
                  "thousand bytes back to the source's loss, by seed", f"loss after {further:.0f} thousand bytes",
                  f"minus {DEALT}"), rows)  # fmt: skip


def controls(study: StudyConfig, found: Found, order: Sequence[str]) -> list[str]:
    """Controls and operators together, by loss."""
    names = sorted([*CONTROLS, *order], key=lambda name: of(found, name, "final").mean)
    before, after = (steps * study.tokens_per_step / 1e3 for steps in (study.source_steps, study.further_steps))
    rows = []
    for name in names:
        reach = shares = "-"
        if "there" in found[name]["seeds"]:
            there = times(found, name, "there")
            reach = there.text()
            if there.median is not None:
                shares = f"{there.median / (before + after):.2f} ({(before + there.median) / (before + after):.2f})"
        rows.append((f"**{name}**" if name in CONTROLS else name, compute(found, name), *final(found, name), reach,
                     shares))  # fmt: skip
    return table(("model", "FLOPs, 1e12 (of them measuring and calibration)", "final loss", f"minus {DEALT}",
                  "thousand bytes to scratch, by seed", "share"), rows)  # fmt: skip


def learning_rates(study: StudyConfig, units: Units, found: Found, rates: Rates) -> list[str]:
    """Which rates were tuned, by what, and what the tries cost."""
    by = ("the loss on the tuning text" if study.tuning_batches else
          "the held-out loss, the text that they are judged by,")  # fmt: skip
    lines = [f"Learning rates, the best of those tried by {by} at seed {study.seeds[0]}; the tries that were not taken "
             "are not in the FLOPs above:", ""]  # fmt: skip
    for name, rate in ((SCRATCH_FLOPS, rates.scratch), (LONGER, rates.longer)):
        tried = units[study.seeds[0]]["tuning"][name]
        losses = ", ".join(f"{float(one):g} ({loss:.4f})" for one, loss in tried.items())
        more = (len(tried) - 1) * units[study.seeds[0]][name]["flops"] / 1e12
        lines.append(f"- {name}: {rate:g} of {losses}; the tries not taken cost {more:.2f} more.")
    return [*lines, f"- All others: {study.further_rate:g}, not tuned."]


def parts(units: Units, found: Found) -> list[str]:
    """Spread, tail, order: % of the source's loss, by model and seed and in the mean; they add up to the total."""
    rows = []
    for name in next(iter(units.values()))["analysis"]["models"]:
        figures = [(one["analysis"]["spread"], *(one["analysis"]["models"][name][key] for key in PARTS[1:]))
                   for one in units.values()]  # fmt: skip
        spent = [one["source"]["flops"] / 1e12 + growth
                 for one, growth in zip(units.values(), found[name]["seeds"]["growth"], strict=True)]  # fmt: skip
        rows += [(name, str(seed), f"{flops:.2f}", *(f"{figure:+.2f}" for figure in row),
                  f"{one['analysis']['check']:.0e}")
                 for (seed, one), flops, row in zip(units.items(), spent, figures, strict=True)]  # fmt: skip
        means = (interval(column).text("{:+.2f}") for column in zip(*figures, strict=True))
        rows.append((name, f"mean of {len(figures)}", f"{sum(spent) / len(spent):.2f}", *means, ""))
    return table(("operator", "seed", "FLOPs, 1e12", "spread", "tail", "order", "total gap", "check, nats"), rows)
