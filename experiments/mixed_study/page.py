"""What the rows of the study say: means over seeds by model, text losses compared, the page and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.growth_study.inference import mean, read, text_of, verdict
from experiments.mixed_study.engine import LAST
from experiments.mixed_study.study import ADAPTIVE, LONGER, ONCE, MixedStudy
from experiments.pages import markdown_table
from gt_jax.monitoring.plots import new_figure, save_png
from gt_jax.text.tokenizers import open_tokenizer

Row = Mapping[str, Any]
NAME = "mixed_depth"
PLACES = {"1": "the first letter of a word", "2": "its second", "3": "its third", str(LAST): "later ones",
          "0": "what is no letter"}  # fmt: skip


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`models`: means over seeds; `pairs`: the adaptive model's text loss less each other's, seed by seed."""
    by: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["parameters"], row["model"], row["seed"])):
        by.setdefault(row["model"], []).append(row)
    pairs = [{"model": ADAPTIVE, "other": other, **mean(
        [a["text_nats"] - b["text_nats"] for a, b in zip(by[ADAPTIVE], found, strict=True)])}
        for other, found in by.items() if other != ADAPTIVE]  # fmt: skip
    return {"models": {model: _of_model(found) for model, found in by.items()}, "pairs": pairs}


def _of_model(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    found: dict[str, Any] = {key: first[key] for key in ("layers", "rate", "steps", "parameters")}
    found |= {key: mean([row[key] for row in rows]) for key in ("text_nats", "answer_nats", "flops")}
    found |= {key: {d: mean([row[key][d] for row in rows]) for d in first[key]} for key in ("accuracy", "passes")}
    if first["model"] == ADAPTIVE:
        found |= {key: mean([row[key] for row in rows]) for key in ("text_passes", "unasked_passes")}
        found["spearman"] = mean([row["spearman"] or 0.0 for row in rows])
        for key in ("text_nats_forced", "passes_by_place", "nats_by_place"):
            found[key] = {name: mean([row[key][name] for row in rows]) for name in first[key]}
        found["forced_costs"] = {k: mean([row["text_nats_forced"][k] - row["text_nats"] for row in rows])
                                 for k in first["text_nats_forced"]}  # fmt: skip
    return found


def markdown(stored: Mapping[str, Any]) -> str:
    """The page."""
    study, found = MixedStudy.from_json(stored["config"]), stored["summary"]
    mine, of, seeds = found["models"][ADAPTIVE], study.of, len(study.seeds)
    text = ", ".join(Path(name).name for name in study.text) or "the Python library's sources"
    models = [[name, one["layers"], f"{one['parameters']:,}", f"{one['rate']:g}", f"{one['steps']:,}",
               f"{one['flops']['mean'] / 1e12:.2f}", text_of(one["text_nats"], "{:.4f}"),
               *(f"{100 * value['mean']:.0f}" for value in one["accuracy"].values())]
              for name, one in found["models"].items()]  # fmt: skip
    head = ["model", "layers", "parameters", "rate", "steps", "FLOPs, 10^12", "text, nats a byte",
            *(f"right at {d}, %" for d in mine["accuracy"])]  # fmt: skip
    places = {place: words for place, words in PLACES.items() if place in mine["passes_by_place"]}
    kinds = {
        "text": mine["text_passes"],
        **{f"text: {words}": mine["passes_by_place"][place] for place, words in places.items()},
        f"{of.name}: what asks nothing": mine["unasked_passes"],
        **{f"{of.name}: an answer of {d}": one for d, one in mine["passes"].items()},
    }
    nats = {f"text: {words}": text_of(mine["nats_by_place"][place], "{:.2f}") for place, words in places.items()}
    spent = [[kind, text_of(one, "{:.2f}"), nats.get(kind, "-")] for kind, one in kinds.items()]
    forced = [[k, text_of(mine["text_nats_forced"][k], "{:.4f}"), text_of(mine["forced_costs"][k], "{:+.4f}")]
              for k in mine["text_nats_forced"]]  # fmt: skip
    return "\n".join([
        "# Where does one model spend its passes?", "", f"`{stored['command']}`", "",
        f"{100 * study.share:.0f} % of the rows are text ({text}), the others `{of.task}`: {of.steps} steps of "
        f"{of.rows} rows of {of.length} bytes. Passes are forced for {100 * of.opened:g} % of the steps, from 1 to "
        f"{of.passes} while the difficulty rises; then gates decide at {of.pass_price:g} nats a pass, with "
        f"hard weights. {_rates(study)} {seeds} seed{'s' * (seeds != 1)}, "
        f"{stored['seconds'] / 60:.0f} minutes on {stored['machine']['cores']} cores; means over seeds of held-out "
        "figures, in brackets the 95 % interval by Student's t.", "",
        *markdown_table(models, head), "",
        *(f"- Of text, {verdict(one['model'], one['other'], read(one))}." for one in found["pairs"]), "",
        f"Passes of `{ADAPTIVE}`; Spearman's correlation of an answer's passes and look-ups is "
        f"{text_of(mine['spearman'], '{:.3f}')}:", "",
        *markdown_table(spent, ["what a token is of, or predicts", "passes", "nats"]),
        "", "Its loss of text with passes forced, and that less the loss as its gates choose:", "",
        *markdown_table(forced, ["passes", "text, nats a byte", "more than as it chooses"]), "",
        f"![Held-out text, and instances of the task, each byte in the colour of its passes]({NAME}.png)",
    ]) + "\n"  # fmt: skip


def _rates(study: MixedStudy) -> str:
    if len(study.rates) == 1:
        return f"The rate is {study.rates[0]:g} for all, not tuned."
    return (f"Each model has the best of the rates {', '.join(f'{rate:g}' for rate in study.rates)} by its mean loss "
            f"on the tuning part over the first {study.tuned_at} seeds; `{LONGER}` has that of `{ONCE}`.")


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Rows of held-out text and of the task, each byte in the colour of the passes of its token; PNG."""
    study = MixedStudy.from_json(stored["config"])
    row = next(row for row in stored["rows"] if row["model"] == ADAPTIVE and row["seed"] == study.seeds[0])
    shown, texts = row["shown"], open_tokenizer("bytes").texts()
    length = max(len(one["tokens"]) for one in shown)
    figure, axes = new_figure(max(6.0, 0.2 * length), 0.36 * len(shown) + 1.2, "Passes of each byte, held out")
    passes = np.full((len(shown), length), np.nan)
    for line, one in enumerate(shown):
        passes[line, : len(one["passes"])] = one["passes"]
        for column, token in enumerate(one["tokens"]):
            letter = texts[token].decode("latin-1") if token < 256 else ""
            axes.text(column, line, letter if letter.isprintable() else "·", ha="center", va="center", fontsize=8,
                      family="monospace", color="white" if one["passes"][column] > 2 else "black", parse_math=False)
    steps = np.arange(study.of.passes + 1) + 0.5
    image = axes.imshow(np.ma.masked_invalid(passes), cmap="YlGnBu", vmin=steps[0], vmax=steps[-1], aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    bar = figure.colorbar(image, ax=axes, ticks=range(1, study.of.passes + 1), boundaries=steps)
    bar.set_label("passes")
    figure.tight_layout()
    save_png(figure, path)
