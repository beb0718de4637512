"""The study's results on disk: rows and figures as JSON, tables as Markdown, curves as PNG; made, or made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import contract
from experiments.exit_study.figures import MODES, summary
from experiments.exit_study.findings import bound_text, cannot_tell, findings
from experiments.exit_study.study import ExitStudy, Model
from experiments.growth_study.inference import read
from experiments.pages import markdown_table
from gt_jax.configs.data import TEXT
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import write_atomically

NAME = "early_exit"
HEAD = ("model", "rate", "layers used", "held-out loss", "minus dense", "speed, decoding", "speed, prefill")


def write(output: Path, found: Mapping[str, Any]) -> str:
    """Write OUTPUT/early_exit.{json,md,png} of what `contract.stored` gave; returns the Markdown text."""
    from experiments.exit_study.picture import draw

    study = ExitStudy.from_json(found["config"])
    text = markdown(study, found)
    contract.write(output / f"{NAME}.json", found)
    write_atomically(output / f"{NAME}.md", text)
    draw(study, found, output / f"{NAME}.png")
    return text


def render(output: Path) -> str:
    """Make figures, tables and picture anew from the rows of OUTPUT/early_exit.json; nothing is trained or timed."""
    file = output / f"{NAME}.json"
    found = contract.read(file)
    study = ExitStudy.from_json(found["config"])
    dense = Model(study.layers).name
    there = {(row["task"], row["model"], row["seed"]) for row in found["rows"]}
    refuse_all([f"{source} has no {dense} at seed {seed}" for source in study.sources for seed in study.seeds
                if (source, dense, seed) not in there], f"{file} is not whole:")  # fmt: skip
    tuning = {source: found["summary"][source]["tuning"] for source in study.sources if source in found["summary"]}
    if missing := [source for source in study.sources if source not in tuning]:
        raise Refused(f"{file} is not whole: its summary has no {', '.join(missing)}")
    return write(output, {**found, "summary": summary(study, found["rows"], tuning)})


def markdown(study: ExitStudy, found: Mapping[str, Any]) -> str:
    """The report."""
    of, machine = found["summary"], found["machine"]
    text = ", ".join(study.text) or "the sources of Python's standard library"
    lines = [
        "# Early exit", "",
        "Is a model whose tokens leave the stack early faster, at equal held-out loss, than the dense model trained as "
        "long, and than a dense model cut to the mean depth?", "",
        f"Made by `{found['command']}`, {found['seconds'] / 60:.0f} minutes, on "
        f"{', '.join(f'{key} {value}' for key, value in machine.items())}.", "",
        f"Scale {study.scale}: width {study.width}, {study.layers} layers of kind D, {study.rows} rows of up to "
        f"{max(map(study.length, study.sources))} tokens a step, {len(study.seeds)} seeds. Text, {study.steps} steps: "
        f"{text}. Tasks, {study.task_steps} steps: {', '.join(f'`{words}`' for words in study.tasks) or 'none'}.",
        "", "## What the figures say", "",
        *(f"- {line}" for line in findings(study, of)), "",
        "## What they cannot tell", "", *(f"- {line}" for line in cannot_tell(study)), "",
    ]  # fmt: skip
    for source in study.sources:
        lines += tables(study, source, of[source])
    lines += ["## Rates", "", "Tuning loss of the first seed by learning rate; the lowest is taken.", "",
              *rates(study, of), ""]  # fmt: skip
    lines += [f"![Held-out loss against time]({NAME}.png)", ""]
    return "\n".join(lines)


def tables(study: ExitStudy, source: str, found: Mapping[str, Any]) -> list[str]:
    """The models of one source, and the exit models against the dense ones."""
    models, unit = found["models"], "nats a byte" if source == TEXT else "nats an answer"
    answers = () if source == TEXT else ("accuracy", "Spearman")
    order = sorted(models, key=lambda name: (models[name]["ponder"] is not None, models[name]["ponder"] or 0.0,
                                             models[name]["threshold"] or 0.0, models[name]["layers"]))  # fmt: skip
    lines = [f"## {source}", "",
             f"Loss in {unit}. Speed is the dense model's time over the model's, above 1 is faster; the dense model of "
             f"{study.layers} layers decodes {tokens(study, found, 'decoding')} and reads "
             f"{tokens(study, found, 'prefill')} tokens a second.", ""]  # fmt: skip
    lines += markdown_table([_row(name, models[name], bool(answers)) for name in order], (*HEAD, *answers))
    against = [name for name in order if "loss_minus_cut" in models[name]]
    lines += ["", "Time of the dense models at the exit model's loss, and of the dense model of its mean depth, over "
              "the exit model's: above 1 the exit model is faster.", ""]  # fmt: skip
    head = ("model", *(f"at equal loss, {mode}" for mode in MODES), *(f"mean depth, {mode}" for mode in MODES),
            "loss minus mean depth's")  # fmt: skip
    rows = [[name, *(bound_text(models[name][f"equal_{mode}"]) for mode in MODES),
             *(read(models[name][f"speed_against_cut_{mode}"]).text("{:.2f}") for mode in MODES),
             read(models[name]["loss_minus_cut"]).text("{:+.4f}")] for name in against]  # fmt: skip
    return [*lines, *markdown_table(rows, head), ""]


def tokens(study: ExitStudy, found: Mapping[str, Any], mode: str) -> str:
    """Tokens a second of the dense model."""
    return read(found["models"][Model(study.layers).name][f"tokens_a_second_{mode}"]).text("{:.0f}")


def _row(name: str, one: Mapping[str, Any], task: bool) -> list[str]:
    cells = [name, f"{one['rate']:g}", read(one["layers_used"]).text("{:.2f}"), read(one["loss"]).text("{:.4f}"),
             read(one["loss_minus_dense"]).text("{:+.4f}")]  # fmt: skip
    cells += [read(one[f"speed_{mode}"]).text("{:.2f}") for mode in MODES]
    if task:
        cells.append(read(one["accuracy"]).text("{:.3f}"))
        cells.append(read(one["spearman"]).text("{:.2f}") if one["spearman"] else "-")
    return cells


def rates(study: ExitStudy, summary: Mapping[str, Any]) -> list[str]:
    """Every model's tuning losses by rate."""
    rows = [[source, name, *(f"{tried[f'{rate:g}']:.4f}" for rate in study.rates)]
            for source in study.sources for name, tried in summary[source]["tuning"].items()]  # fmt: skip
    return markdown_table(rows, ("source", "model", *(f"{rate:g}" for rate in study.rates)))
