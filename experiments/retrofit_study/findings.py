"""What the rows of the study say: means over seeds by model, and the retrofitted one against the source trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.depth_study.findings import by_difficulty
from experiments.growth_study.inference import mean, text_of
from experiments.pages import markdown_table
from experiments.retrofit_study.study import MODELS, ON, RETROFITTED

Row = Mapping[str, Any]
FIGURES = {
    "spearman": "Spearman's correlation of a token's passes with its difficulty",
    "one pass": "what one pass forced costs it on the hardest third, points",
    "hardest": "retrofitted less trained on, right answers of the hardest third, points",
    "all": "retrofitted less trained on, all right answers, points",
    "nats": "retrofitted less trained on, loss, nats an answer",
}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`models`: means over seeds; `figures`: the claims, paired by seed."""
    by = {model: sorted((row for row in rows if row["model"] == model), key=lambda row: row["seed"])
          for model in MODELS}  # fmt: skip
    pairs = list(zip(by[RETROFITTED], by[ON], strict=True))

    def less(key: str, scale: float = 1.0) -> dict[str, Any]:
        return mean([scale * (a[key] - b[key]) for a, b in pairs])

    figures = {
        "spearman": mean([row["spearman"] or 0.0 for row in by[RETROFITTED]]),  # none where all run as many passes
        "one pass": mean([100 * (row["accuracy_hardest"] - row["forced"]["1"]["accuracy_hardest"])
                          for row in by[RETROFITTED]]),
        "hardest": less("accuracy_hardest", 100), "all": less("accuracy_all", 100), "nats": less("nats"),
    }  # fmt: skip
    return {"models": {model: _of_model(found) for model, found in by.items()}, "figures": figures}


def _of_model(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {key: by_difficulty([row[key] for row in rows]) for key in ("accuracy", "passes")}
    found |= {key: mean([row[key] for row in rows]) for key in ("accuracy_all", "nats", "flops", "steps")}
    forced = rows[0]["accuracy_forced"]
    return found | {"forced": {k: by_difficulty([row["accuracy_forced"][k] for row in rows]) for k in forced}}


def markdown(stored: Mapping[str, Any]) -> str:
    """The page."""
    config, found = stored["config"], stored["summary"]
    setting, models = config["setting"], found["models"]
    difficulties = list(models[RETROFITTED]["accuracy"])
    rows = [[name, f"{one['steps']['mean']:,.0f}", f"{one['flops']['mean'] / 1e9:,.1f}",
             *(f"{100 * one['accuracy'][d]['mean']:.0f}" for d in difficulties), f"{one['nats']['mean']:.4f}"]
            for name, one in models.items()]  # fmt: skip
    mine = models[RETROFITTED]
    rows += [[f"retrofitted, {k} pass{'es' * (k != '1')} forced", "", "",
              *(f"{100 * one[d]['mean']:.0f}" for d in difficulties), ""]
             for k, one in mine["forced"].items()]  # fmt: skip
    rows.append(["its passes", "", "", *(f"{mine['passes'][d]['mean']:.2f}" for d in difficulties), ""])
    head = ["model", "steps", "GFLOPs", *(f"right at {d}, %" for d in difficulties), "nats an answer"]
    seeds = len(config["seeds"])
    claims = [[text, text_of(found["figures"][name], "{:+.3f}")] for name, text in FIGURES.items()]
    return "\n".join([
        "# Does a retrofitted model use its passes?", "", f"`{stored['command']}`", "",
        f"`{setting['task']}`: a plain {setting['layout']} model of width {setting['width']}, trained for "
        f"{config['source_steps']} steps; made adaptive and trained for {config['steps']} more at "
        f"{setting['pass_price']:g} nats a pass, or trained on as it is, at equal FLOPs. {seeds} "
        f"seed{'s' * (seeds != 1)}, {stored['seconds'] / 60:.0f} minutes on {stored['machine']['cores']} cores; means "
        "over seeds, in brackets the 95 % interval by Student's t; held-out instances.", "",
        *markdown_table(rows, head), "", *markdown_table(claims, ["claim", "found"]),
    ]) + "\n"  # fmt: skip
