"""The sentences of the report: each follows from the figures by rule, with its interval and its number of seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.exit_study.figures import MODES
from experiments.exit_study.study import ExitStudy, Model
from experiments.growth_study.inference import Interval, read

WANTED = 1.3
WORDS = {"decoding": "decoding at batch 1", "prefill": "batched prefill"}
Found = Mapping[str, Any]


def seeds(figure: Interval, pattern: str = "{:.2f}") -> str:
    """A figure with its interval and its seeds."""
    return f"{figure.text(pattern)}, {figure.seeds} seed{'s' * (figure.seeds != 1)}"


def beyond(figure: Interval, level: float) -> str:
    """Whether a figure is at least `level`: yes or no where its whole interval says so."""
    if figure.low is None or figure.high is None:
        return "cannot be said"
    return "yes" if figure.low >= level else "no" if figure.high < level else "cannot be said"


def at_most(figure: Interval, level: float) -> str:
    """Whether a figure is at most `level`, likewise."""
    if figure.low is None or figure.high is None:
        return "cannot be said"
    return "yes" if figure.high <= level else "no" if figure.low > level else "cannot be said"


def compared(ratio: Interval, faster: str, slower: str) -> str:
    """A ratio of times in words, by its interval about 1."""
    if ratio.low is not None and ratio.low > 1:
        return faster
    if ratio.high is not None and ratio.high < 1:
        return slower
    return "cannot be told from it in speed"


def loss_words(difference: Interval) -> str:
    """A difference of losses in words."""
    words = {1: "a higher held-out loss", -1: "a lower held-out loss", 0: "a held-out loss that cannot be told from it"}
    return f"{words[difference.sign]} ({seeds(difference, '{:+.4f}')})"


def findings(study: ExitStudy, summary: Found) -> list[str]:
    """All sentences, source by source."""
    lines = []
    for source in study.sources:
        found = summary[source]
        if found["chosen"]:
            for mode in MODES:
                lines += [f"{source}, {WORDS[mode]}: {line}" for line in chosen(study, found, mode)]
                lines.append(f"{source}, {WORDS[mode]}: {count(found, mode)}")
        lines += [f"{source}: {line}" for line in (*own(found), *edges(found))]
        if found["dropped"]:
            lines.append(f"{source}: not measured at every seed, for they diverged: {'; '.join(found['dropped'])}.")
    return lines


def chosen(study: ExitStudy, found: Found, mode: str) -> list[str]:
    """The fastest pair as good as the dense model by the tuning part, and the best along the curve of dense models."""
    picks, dense = found["chosen"][mode], Model(study.layers).name
    name = picks["fastest"] or picks["nearest"]
    one = found["models"][name]
    speed, against = read(one[f"speed_{mode}"]), read(one[f"speed_against_cut_{mode}"])
    bound = f"within {100 * study.equal:g} % of the tuning loss of *{dense}*"
    pairs = f"of {picks['of']} pairs of threshold and ponder weight"
    which = (f"{picks['as_good']} {pairs} are {bound}. The fastest of them" if picks["fastest"] else
             f"none {pairs} is {bound}. The nearest")  # fmt: skip
    words, loss = compared(against, "is faster", "is slower"), read(one["loss_minus_dense"])
    level = study.equal * read(found["models"][dense]["loss"]).mean
    wanted = (f" {WANTED:g} times as fast: {beyond(speed, WANTED)}; a held-out loss at most {100 * study.equal:g} % "
              f"above: {at_most(loss, level)}.")  # fmt: skip
    lines = [
        f"{which}, *{name}*, runs {read(one['layers_used']).mean:.2f} of {study.layers} layers, as fast as "
        f"*{dense}* times {seeds(speed)}, with {loss_words(loss)}.{wanted}",
        f"against a dense model of its mean depth, trained as long (between the two trained depths beside it), "
        f"*{name}* {words} (times {seeds(against)}), with {loss_words(read(one['loss_minus_cut']))}.",
    ]
    best = picks["curve"]
    one = found["models"][best][f"equal_{mode}"]
    lines.append(f"along the curve of dense models of every depth, at the loss of *{best}* (of all pairs the best by "
                 f"the tuning part): {along(one)}")  # fmt: skip
    return lines


def along(one: Found) -> str:
    """How an exit model compares with the dense models at its loss."""
    ratio = f"{bound_text(one)}, {one['seeds']} seed{'s' * (one['seeds'] != 1)}"
    words = {1: "the exit model is faster", -1: "a dense model is faster", 0: "neither can be called faster"}
    return f"{words[one['sign']]}; the dense one takes its time times {ratio}."


def bound_text(one: Found, pattern: str = "{:.2f}") -> str:
    """The ratio at equal loss with its interval, after `<` or `>` where no dense model has such a loss."""
    mark = {"": "", "<": "at most ", ">": "at least "}.get(one["bound"], "beyond the dense models at both ends: ")
    return mark + read(one).text(pattern)


def count(found: Found, mode: str) -> str:
    """How many pairs are on which side at equal loss, and how many would be by chance."""
    signs = [one[f"equal_{mode}"]["sign"] for one in found["models"].values() if f"equal_{mode}" in one]
    sides = f"{signs.count(1)} are faster than a dense model, {signs.count(-1)} slower, {signs.count(0)} neither"
    return (f"of {len(signs)} pairs at equal loss {sides} (were there no difference at all, {0.05 * len(signs):.1f} "
            "would be called one by chance).")  # fmt: skip


def own(found: Found) -> list[str]:
    """Whether training at the threshold of use differs from changing it afterwards."""
    lines = []
    for one in found["own"]:
        loss, used = read(one["loss"]), read(one["layers_used"])
        same = loss.sign == 0 and used.sign == 0
        words = "cannot be told apart" if same else "differ"
        lines.append(f"*{one['model']}* and *{one['other']}* {words}: the former less the latter, loss "
                     f"{loss.text('{:+.4f}')}, layers used {used.text('{:+.2f}')}, {loss.seeds} "
                     f"seed{'s' * (loss.seeds != 1)}.")  # fmt: skip
    return lines


def edges(found: Found) -> list[str]:
    """The models whose best rate was the least or the largest that was tried."""
    best = {name: min(tried, key=tried.__getitem__) for name, tried in found["tuning"].items() if len(tried) > 1}
    at_end = [name for name, rate in best.items()
              if rate in (min(found["tuning"][name], key=float), max(found["tuning"][name], key=float))]  # fmt: skip
    return [f"the best rate was at the end of those that were tried, so that one beyond it may be better still: "
            f"{'; '.join(at_end)}."] if at_end else []  # fmt: skip


def cannot_tell(study: ExitStudy) -> list[str]:
    """What the design leaves open, whatever the figures."""
    lines = []
    if len(study.seeds) == 1:
        lines.append("One seed: figures are shown, but no difference can be claimed.")
    if not study.text:
        lines.append("The text is the sources of Python's standard library, which repeat themselves: a part of the "
                     "held-out text stands in the text that is trained on.")  # fmt: skip
    lines += [
        f"Rates were tuned at seed {study.seeds[0]} alone, pairs were chosen on the tuning part by the mean "
        "of all seeds; losses are of the held-out part, which chose nothing.",
        "One model a ponder weight was trained, at threshold "
        f"{study.threshold:g}, and measured at every threshold; the models marked *trained at* were trained at their "
        "own.",
        "Times are of this program on this machine at this width: where a layer costs little beside what is done once "
        "a token, leaving early saves little, and so does a smaller depth.",
        f"Chosen times are the least of several and so a little too good; each is the median of {study.rounds} rounds.",
    ]  # fmt: skip
    return lines
