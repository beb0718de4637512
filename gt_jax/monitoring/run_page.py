"""The report of runs as one HTML page: a table, the curves as a picture, alerts in words, config differences.

Audits, single steps with forced passes, are left out of the curves of passes, gates and |dh|/|h|.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.configs.run import RunConfig, read_run_config
from gt_jax.errors import Refused, refuse_all
from gt_jax.monitoring.alerts import Alert, Course, alerts, texts
from gt_jax.monitoring.metrics import format_value, measured, read_metrics, seconds_of
from gt_jax.monitoring.run_plots import plot_runs

LAST = 20  # records that the table's figures are a mean of
SMOOTH = 50  # at most so many parts of a curve are told apart: the mean is over 1/50 of the points
ABSENT = "-"
DEPTH = ("mean_weight", "passes_run", "passes_computed", "gate_mean", "price")
MEASURES = {"mean_weight": "mean weight a layer", "passes_run": "passes run a layer",
            "passes_computed": "passes computed a layer"}  # fmt: skip


class Run(NamedTuple):
    """One run as it lies on disk."""

    name: str
    config: RunConfig
    records: list[dict[str, Any]]
    found: list[Alert]


def read_run(path: Path, begun: int = 0) -> Run:
    """A run directory, also one without metrics yet, whose data began with batch `begun`; raises `Refused` naming the
    file that is not as it should be."""
    if not (path / "config.json").is_file():
        there = "is no run directory: it has no config.json" if path.exists() else "does not exist"
        raise Refused(f"{path} {there}; name a directory that gt_jax.train has written")
    config, metrics = read_run_config(path), path / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    refuse_all(_misfits(records)[:20], f"metrics file {str(metrics)!r} holds what no run writes:")
    return Run(str(path), config, records, alerts(records, config, begun))


def _misfits(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each value that is no number, or has another shape than its name has in the records before."""
    shapes: dict[str, tuple[int, ...]] = {"loss": (), "gradient_norm": (), "price": ()}
    wrong = []
    for record in records:
        for name, value in record.items():
            said = f"step {record['step']} has {name} {json.dumps(value)[:40]}"
            try:
                shape = measured(value).shape
            except (TypeError, ValueError):
                wrong.append(f"{said}, no number")
                continue
            one = name.startswith(("time_", "held_out_loss"))
            wanted = () if one else shapes.setdefault(name, shape)
            if shape != wanted or 0 in shape:
                wrong.append(f"{said}, {'no number' if not wanted else f'no numbers of shape {list(wanted)}'}")
    return wrong


def summary(run: Run) -> dict[str, str]:
    """A column of the table: what is known of a run, by its row."""
    records = [record for record in run.records if "loss" in record]
    held_out = [(record["held_out_loss"], record["step"]) for record in run.records if "held_out_loss" in record]
    finite = [pair for pair in held_out if math.isfinite(pair[0])]
    steps, last, price = run.config.train.steps, records[-LAST:], run.config.train.price
    rows = {
        "layout": run.config.model.layout,
        "started from": run.config.start or "random weights",
        "steps": f"{records[-1]['step'] if records else 0} of {steps}",
        "loss": _mean(last, "loss"),
        "held-out loss": f"{format_value(held_out[-1][0])} at step {held_out[-1][1]}" if held_out else ABSENT,
        "lowest held-out loss": "{} at step {}".format(*map(format_value, min(finite))) if finite else ABSENT,
        **{row: _mean(_free(run, last), name) for name, row in MEASURES.items()},
        "price": format_value(last[-1].get("price")) if last else ABSENT,
        "the price aims at": "nothing, it stands" if price.target is None else
                             f"{MEASURES[price.target_of]}: {price.target:g}",
        "|dh|/|h| by layer": _by_layer(last, "delta_ratio"),
        "null rate by layer": _by_layer(last, "null_rate"),
        "gradient norm": _mean(last, "gradient_norm"),
        "tokens a second": _mean(last[-1:], "time_tokens_per_second"),  # a mean over the last steps as it is
        "model FLOP utilisation": _mean(last[-1:], "time_mfu"),
        "hours": f"{seconds_of(run.records) / 3600:.2f}" if run.records else ABSENT,
        "alerts": str(len(run.found)),
    }
    model = run.config.model
    absent = (*(() if model.halting is not None else MEASURES.values()),
              *(() if model.adaptive is not None else ("price", "the price aims at")))  # fmt: skip
    return {**rows, **dict.fromkeys(absent, ABSENT)}


def _free(run: Run, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of steps that were no audits."""
    course = Course(run.config)
    return [record for record in records if not course.audit(record["step"])]


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [np.mean(record[name]) for record in records if name in record]
    return format_value(float(np.mean(values))) if values else ABSENT


def _by_layer(records: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [record[name] for record in records if name in record]
    return " ".join(f"{value:.2g}" for value in np.mean(values, axis=0)) if values else ABSENT


def drawable(run: Run) -> list[dict[str, Any]]:
    """The records as they are drawn: without what the passes of an audit change, the depth of a plain model, or a price
    that nothing pays."""
    course, model = Course(run.config), run.config.model

    def left_out(record: Mapping[str, Any]) -> tuple[str, ...]:
        if model.halting is None:
            return DEPTH
        if model.adaptive is None:
            return ("price",)
        return (*DEPTH, "delta_ratio", "update_ratio") if course.audit(record["step"]) else ()

    return [{name: value for name, value in record.items() if name not in left_out(record)} for record in run.records]


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(field, its value in each config) of every field that is not the same in all, nested ones by their path."""
    flat = [_flat(config) for config in configs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [(name, [json.dumps(one[name]) if name in one else ABSENT for one in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return found


def picture(runs: Sequence[Run]) -> bytes | None:
    """The curves as PNG; None where no run has a value yet."""
    drawn = {run.name: drawable(run) for run in runs}
    if not any("loss" in record for records in drawn.values() for record in records):
        return None
    most = max(len(records) for records in drawn.values())
    target = io.BytesIO()
    plot_runs(drawn, target, smooth=most // SMOOTH)
    return target.getvalue()


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
th, td { text-align: left; vertical-align: top; padding: 0.2em 1.2em 0.2em 0; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; }
img { width: 100%; }
.alert { color: #a33b00; }
"""


def page(runs: Sequence[Run], image: bytes | None, problem: str | None = None) -> str:
    """The whole HTML document; `problem` is why the curves could not be drawn."""
    names, columns = [run.name for run in runs], [summary(run) for run in runs]
    rows = [[row, *(column[row] for column in columns)] for row in columns[0]]
    rows = [row for row in rows if any(cell != ABSENT for cell in row[1:])]
    missing = f"The curves could not be drawn: {problem}" if problem else "There are no metrics to draw yet."
    title = f"gt_jax report: {', '.join(names)}"
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f"<title>{html.escape(title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>",
        f"<h1>{html.escape(title)}</h1>", _table(["", *names], rows),
        *([] if image is None else [_image(image, names)]),
        *([] if image is not None else [f"<p>{html.escape(missing)}</p>"]),
        "<h2>Alerts</h2>", *(_alerts(run) for run in runs), *_differences(runs), "</body>", "</html>", "",
    ])  # fmt: skip


def _image(image: bytes, names: Sequence[str]) -> str:
    text = html.escape(f"Curves of {', '.join(names)}", quote=True)
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line(headers, "th"), *(line(row, "td") for row in rows), "</table>"])


def _alerts(run: Run) -> str:
    if not run.records:
        return f"<p>{html.escape(run.name)}: no metrics yet</p>"
    if not run.found:
        return f"<p>{html.escape(run.name)}: none</p>"
    lines = "\n".join(f'<li class="alert">{html.escape(text)}</li>' for text in texts(run.found))
    return f"<p>{html.escape(run.name)}:</p>\n<ul>\n{lines}\n</ul>"


def _differences(runs: Sequence[Run]) -> list[str]:
    """What sets the configs apart; the config itself where there is one run."""
    configs = [run.config.to_json() for run in runs]
    if len(runs) == 1:
        rows = [[name, json.dumps(value)] for name, value in _flat(configs[0]).items()]
        return ["<h2>Config</h2>", _table(["field", runs[0].name], rows)]
    found = config_differences(configs)
    heading = "<h2>Config fields that differ</h2>"
    if not found:
        return [heading, "<p>none</p>"]
    return [heading, _table(["field", *(run.name for run in runs)], [[name, *values] for name, values in found])]
