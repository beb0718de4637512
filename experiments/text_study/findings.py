"""What the rows of the study say: means over seeds by model, each model against the plain ones, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.growth_study.inference import mean, read, text_of, verdict
from experiments.pages import markdown_table
from experiments.text_study.study import ADAPTIVE, DEFAULT, EQUAL, PLAIN, PRICED, TARGET

Row = Mapping[str, Any]
MEANS = ("nats", "flops", "steps", "processor_seconds_a_step")
DEPTHS = ("passes_run", "mean_weight", "passes_computed")
PAIRS = ((DEFAULT, PLAIN), (TARGET, PLAIN), (PRICED, PLAIN), (EQUAL, PLAIN), (DEFAULT, EQUAL), (TARGET, EQUAL),
         (PRICED, EQUAL), (TARGET, DEFAULT), (PRICED, DEFAULT))  # fmt: skip
"""Which losses are compared, the first less the second."""


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`models`: means over seeds; `pairs`: differences of losses, seed by seed."""
    by = {model: sorted((row for row in rows if row["model"] == model), key=lambda row: row["seed"])
          for model in (PLAIN, EQUAL, *ADAPTIVE)}  # fmt: skip
    by = {model: found for model, found in by.items() if found}
    pairs = [{"model": one, "other": other, **_less(by[one], by[other])} for one, other in PAIRS
             if one in by and other in by]  # fmt: skip
    return {"models": {model: _of_model(found) for model, found in by.items()}, "pairs": pairs}


def _less(mine: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    return mean([a["nats"] - b["nats"] for a, b in zip(mine, others, strict=True)])


def _of_model(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"rate": rows[0]["rate"]}
    found |= {key: mean([row[key] for row in rows]) for key in MEANS}
    if rows[0]["model"] in ADAPTIVE:
        found |= {key: mean([row[key] for row in rows]) for key in DEPTHS}
        found["once costs"] = mean([100 * (row["nats_once"] / row["nats"] - 1) for row in rows])
    return found


def markdown(stored: Mapping[str, Any]) -> str:
    """The page."""
    config, found = stored["config"], stored["summary"]
    seeds = len(config["seeds"])
    text = ", ".join(Path(name).name for name in config["text"]) or "the Python library's sources"
    rates = config["rates"]
    tuned = f"{rates[0]:g} for all, not tuned"
    if len(rates) > 1:
        tuned = f"the better of {', '.join(f'{rate:g}' for rate in rates)} on the tuning part at the first seed"
    models = [[name, f"{one['rate']:g}", f"{one['steps']['mean']:,.0f}", f"{one['flops']['mean'] / 1e12:.3f}",
               text_of(one["nats"], "{:.4f}"), *_depth(one), f"{1e3 * one['processor_seconds_a_step']['mean']:.0f}"]
              for name, one in found["models"].items()]  # fmt: skip
    head = ["model", "rate", "steps", "FLOPs, 10^12", "held-out loss", "passes run", "mean weight", "passes computed",
            "every layer once costs, %", "processor ms a step"]  # fmt: skip
    told = [f"- {verdict(one['model'], one['other'], read(one))}." for one in found["pairs"]]
    apart = sum(read(one).sign != 0 for one in found["pairs"])
    return "\n".join([
        "# What do gates give on text?", "", f"`{stored['command']}`", "",
        f"{config['layout']} of width {config['width']} on {text}: {config['steps']} steps of {config['rows']} x "
        f"{config['tokens']} tokens; a target of {config['target']:g} passes, a price of {config['pass_price']:g} nats "
        f"a pass. The rate: {tuned}. {seeds} seed{'s' * (seeds != 1)}, {stored['seconds'] / 60:.0f} minutes on "
        f"{stored['machine']['cores']} cores; means over seeds, in brackets the 95 % interval by Student's t; losses "
        f"in nats a byte. `{DEFAULT}` is what `tiny` and `small` have. {_equal(found)} "
        "Passes are means over layers: run by a token, and computed for a batch.", "",
        *markdown_table(models, head), "",
        f"{len(told)} comparisons of losses, {apart} of which leave out 0:", "", *told,
    ]) + "\n"  # fmt: skip


def _equal(found: Mapping[str, Any]) -> str:
    if EQUAL in found["models"]:
        return f"`{EQUAL}` has the steps that cost what it did."
    return "No adaptive model ends below the plain one at equal steps, so the plain one was not given more."


def _depth(one: Mapping[str, Any]) -> list[str]:
    if "passes_run" not in one:
        return ["1", "1", "1", "-"]
    return [*(f"{one[key]['mean']:.2f}" for key in DEPTHS), text_of(one["once costs"], "{:+.2f}")]
