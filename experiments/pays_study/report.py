"""The study's page, made from its stored file alone. Every sentence about better or worse is computed from figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.growth_study.inference import Times, read, text_of, verdict
from experiments.pages import earlier_runs, markdown_table
from experiments.pays_study.findings import comparisons
from experiments.pays_study.study import AGAIN, CONTROL, GROWN, ON_FORCED, SHALLOW, STACKED

NAME = "growth_pays"
_CLAIMS = {
    "as good at growth": "at growth within 1 point of the source's right answers, or 0.3 % of its loss",
    "better after a tenth": "after a tenth more steps below the source trained on",
    "below both at equal FLOPs": "at equal FLOPs below the source trained on and the model from scratch",
    "below the shallow one too": "and below the source's layers run once each, from scratch",
    "below it with passes forced": "below the source trained on with all passes forced and none paid for",
    "below what was stacked": "below a source whose layers ran once, stacked at full strength",
    "half of scratch's tokens": "at the loss of the model from scratch, after growth, with half of its tokens or fewer",
    "stacked below both": "what was stacked: at equal FLOPs below its source's layers trained on, once each, and the "
                          "model from scratch",
    "stacked, its source at hand": "what was stacked: below its source's layers trained on, and below the deep model "
                                   "started then, with the FLOPs that are left",
    "stacked, half of scratch's tokens": "what was stacked: at the loss of the model from scratch, after that, with "
                                         "half of its tokens or fewer",
}


def markdown(stored: Mapping[str, Any]) -> str:
    """The page."""
    seeds, found = stored["config"]["seeds"], stored["summary"]
    count = comparisons(found)
    lines = [
        "# Does growth pay?", "", f"`{stored['command']}`", "",
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}, {stored['seconds'] / 60:.0f} minutes on "
        f"{stored['machine']['cores']} cores ({stored['machine']['device']}). Figures are means over seeds, in "
        "brackets the 95 % interval by Student's t; differences are seed by seed. Every model trained at the best of "
        "its rates, by the loss on the tuning part at the first seed or few, the one from scratch also with the better "
        "curriculum; children go on at their source's rate, where not said otherwise, and one that is started at a "
        "point has that of the one from scratch. Figures are of the held-out part. FLOPs and tokens are all that led "
        "to a model, its source's among them. "
        f"{count} differences are judged: without any, {0.05 * count:.1f} would lie outside their interval by chance. "
        f"![curves]({NAME}.png)", "",
    ]  # fmt: skip
    lines += [*_overview(found), ""]
    config = stored["config"]
    tuned = {one["name"]: _tuned(one, len(seeds)) for one in (*config.get("tasks", ()), *config.get("texts", ()))}
    for name, one in found.items():
        lines += [f"## {name}", "", *tuned.get(name, []), *earlier_runs(stored["rows"], name), *_models(one), ""]
        if one["task"]:
            lines += [*_by_difficulty(one), ""]
        lines += [*(f"- {line}" for line in sentences(one)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _tuned(setting: Mapping[str, Any], all_seeds: int) -> list[str]:
    """How rates were chosen, where it was not by the first seed alone and for sources and models from scratch; and by
    how much text models were judged."""
    seeds = min(all_seeds, setting.get("tuned_at", 1))
    own, rates = setting.get("child_rates", ()), setting["rates"]
    lines = [f"All models have the rate {rates[0]:g}: none was tried on these seeds."] if len(rates) == 1 else []
    lines += [f"Rates are the best by the mean loss of the first {seeds} seeds."] if seeds > 1 else []
    lines += [f"What is grown has a rate of its own, of {' and '.join(f'{one:g}' for one in own)}."] if own[1:] else []
    lines += [f"What is grown has the rate {own[0]:g}: no other was tried."] if len(own) == 1 else []
    text, shape = "tokens" in setting, setting if "tokens" in setting else setting["of"]
    judged = setting["held_out_batches"] * shape["rows"] * (setting["tokens"] if text else 1)
    lines.append(f"All seeds are judged by the same {judged:,} {'bytes' if text else 'rows of held-out instances'}; "
                 f"intervals are over seeds, and say nothing of other{' bytes' if text else 's'}.")  # fmt: skip
    return [" ".join(lines), ""]


def _overview(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for claim, words in _CLAIMS.items():
        points = [_points(one, claim) for one in found.values()]
        rows.append([words, *points])
    return markdown_table(rows, ["at every seed, for what was grown at these points of the budget", *found])


def _points(one: Mapping[str, Any], claim: str) -> str:
    other = {"below the shallow one too": SHALLOW, "below what was stacked": STACKED,
             "below it with passes forced": ON_FORCED, "stacked, its source at hand": AGAIN}.get(claim)  # fmt: skip
    points = one["stacked" if claim.startswith("stacked") else "grown"].values()
    if not points or (other is not None and not any(other in point for point in points)):
        return "not trained"
    return ", ".join(one["claims"][claim]) or "at no point"


def _models(one: Mapping[str, Any]) -> list[str]:
    task = one["task"]
    rows = []
    for name, model in one["models"].items():
        right = [_right(model, when) for when in ("step0", "tenth", "final")] if task else []
        nats = [_nats(model, when, task) for when in ("step0", "tenth", "final")]
        eased = "" if model["curriculum"] is None else f", curriculum {model['curriculum']:g}"
        rows.append([name, model["layers"], f"{model['rate']:g}{eased}", f"{model['steps']['mean']:.0f}",
                     f"{model['tokens']['mean'] / 1e3:.0f}", f"{model['tokens_a_parameter']['mean']:.1f}",
                     f"{model['flops']['mean'] / 1e12:.3f}", f"{model['model_flops']['mean'] / 1e12:.3f}",
                     f"{model['seconds']['mean']:.0f}", *nats, *right])  # fmt: skip
    times = ("at step 0", "after a tenth", "at the end")
    heads = [f"loss {when}" for when in times] + ([f"right {when}, %" for when in times] if task else [])
    return markdown_table(rows, ["model", "layers", "rate", "steps", "thousand tokens", "tokens a parameter",
                                 "FLOPs, 1e12", "model FLOPs, 1e12", "own seconds", *heads])  # fmt: skip


def _nats(model: Mapping[str, Any], when: str, task: bool) -> str:
    return text_of(model[when]["nats"], "{:.2g}" if task else "{:.4f}") if when in model else ""


def _right(model: Mapping[str, Any], when: str) -> str:
    return f"{100 * model[when]['accuracy_all']['mean']:.1f}" if when in model else ""


def _by_difficulty(one: Mapping[str, Any]) -> list[str]:
    """Right answers of sources and children at growth, and of all at the end."""
    rows: list[list[str]] = []
    difficulties: list[str] = []
    for name, model in one["models"].items():
        for when, words in (("step0", "at step 0"), ("final", "at the end")):
            if when not in model or (when == "step0" and model["kind"] not in (GROWN, CONTROL, STACKED)):
                continue
            accuracy = model[when]["accuracy"]
            difficulties = difficulties or list(accuracy)
            rows.append([f"{name}, {words}", *(f"{100 * accuracy[d]['mean']:.0f}" if d in accuracy else ""
                                               for d in difficulties)])  # fmt: skip
    new = one["deeper"]
    marked = [f"d = {d}{' (new)' * (d in new)}" for d in difficulties]
    return markdown_table(rows, ["right answers, %", *marked])


def sentences(one: Mapping[str, Any]) -> Iterator[str]:
    """What the figures decide, point by point, control by control."""
    pattern = "{:+.2g}" if one["task"] else "{:+.4f}"  # of answers that are all right, losses are small numbers

    def difference(mine: str, other: str, found: Mapping[str, Any]) -> str:
        every = "; below at every seed" if found.get("every_seed") else ""
        return verdict(mine, other, read(found), pattern) + every

    for point, claims in one["grown"].items():
        mine = f"grown at {point}"
        if one["task"]:
            yield f"{mine}, at step 0: {text_of(claims['step0_points'], '{:+.2f}')} points beside its source"
        else:
            yield f"{mine}, at step 0: {text_of(claims['step0_percent'], '{:+.2f}')} % of its source's loss"
        yield f"made by: {', '.join(sorted(set(claims['recipe'])))}"
        if "mean" in claims["tenth"]:
            yield difference(f"{mine}, after a tenth more,", "the source trained on", claims["tenth"])
        yield difference(mine, "the source trained on, at equal FLOPs", claims["on"])
        yield difference(mine, "the model from scratch, at equal FLOPs", claims["scratch"])
        if SHALLOW in claims:
            yield difference(mine, "the source's layers run once each, at equal FLOPs", claims[SHALLOW])
        if ON_FORCED in claims:
            yield difference(mine, "the source trained on with passes forced, at equal FLOPs", claims[ON_FORCED])
        if STACKED in claims:
            yield difference(mine, "a source run once and stacked, at equal FLOPs", claims[STACKED])
        yield _in_tokens(mine, claims)
    for point, claims in one["stacked"].items():
        mine = f"{STACKED} at {point},"
        yield f"{mine} at step 0: {text_of(claims['step0_percent'], '{:+.2f}')} % of its source's loss"
        yield difference(mine, "the model from scratch, at equal FLOPs", claims["scratch"])
        yield difference(mine, "the source's layers trained on, once each, at equal FLOPs", claims[SHALLOW])
        if AGAIN in claims:
            yield difference(mine, "the deep model from scratch with the FLOPs that were left then", claims[AGAIN])
        yield _in_tokens(mine, claims)
    for name, found in one["controls"].items():
        yield f"{name}: at step 0 {text_of(found['step0'], pattern)} beside the grown model of its point"
        if "tenth" in found:
            yield difference("the grown model, after a tenth more,", name, found["tenth"])
    for pair in one["others"]:
        yield difference(f"{pair['mine']}, at equal FLOPs,", pair["other"], pair)


def _in_tokens(mine: str, claims: Mapping[str, Any]) -> str:
    """When the loss of the model from scratch was reached."""
    times = Times(tuple(claims["tokens"]["shares"]), tuple(claims["tokens"]["ends"]))
    return (f"{mine.rstrip(',')}: from growth to the loss of the model from scratch, in tokens of that model, by seed: "
            f"{times.text('{:.2f}')}; {times.reached} of {len(times.times)} reached it")  # fmt: skip
