"""The sentences of the report: each follows from the figures by rule, with its interval and its number of seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.growth_study.inference import Interval, interval, verdict, within
from experiments.growth_study.operators import BLOCK, DEALT, ONCE, OPERATORS, README
from experiments.growth_study.results import Units, of, paired, times
from experiments.growth_study.run import CONTROLS, LONGER, ON_FLOPS, ON_TOKENS, SCRATCH_FLOPS, SCRATCH_TOKENS
from experiments.growth_study.study import SEEN_ALLOWED, StudyConfig

GAP_WANTED, CALIBRATED_WANTED, SHARE_WANTED = 1.0, 0.3, 0.5
FITTED = ", calibrated"  # how the name of a calibrated operator ends
Found = Mapping[str, Any]


def seeds(figure: Interval, pattern: str) -> str:
    """A figure with its interval and its seeds."""
    return f"{figure.text(pattern)}, {figure.seeds} seed{'s' * (figure.seeds != 1)}"


def findings(study: StudyConfig, units: Units, found: Found, first: str) -> list[str]:
    """All sentences; `first` is the operator with the lowest mean loss."""
    sound = [name for name in found if not any(found[name]["diverged"])]
    lowest = seeds(of(found, first, "final"), "{:.4f}")
    lines = [f"Lowest mean loss after training on: {first}, {lowest}. It was chosen by this figure, so it is compared "
             f"with nothing; operators are compared with {DEALT}, the default."]
    lines += comparisons(found, sound)
    lines += [target(found, name, GAP_WANTED) for name in (README, BLOCK, DEALT)]
    lines += [target(found, one.name, CALIBRATED_WANTED) for one in OPERATORS if one.calibrated]
    errors = {one.name: max(found[one.name]["seeds"]["gap_error"]) for one in OPERATORS}
    lines.append(f"The standard error of one seed's gap over the held-out batches (paired, each batch taken as "
                 f"independent; where they share documents it is larger), %: {errors[BLOCK]:.2f} {BLOCK}, "
                 f"{errors[DEALT]:.2f} {DEALT}, at most {max(errors.values()):.2f}.")  # fmt: skip
    others = (README, ONCE, "random new layers", ON_TOKENS, ON_FLOPS, SCRATCH_FLOPS, SCRATCH_TOKENS)
    pairs = ((DEALT, BLOCK), (BLOCK, README), *((DEALT, other) for other in others), (LONGER, SCRATCH_TOKENS))
    named = [(mine, other) for mine, other in pairs if {mine, other} <= set(sound)]
    lines.append(f"The {len(named)} comparisons that follow are of losses after training on, with the FLOPs of both "
                 f"({len(study.seeds)} seed{'s' * (len(study.seeds) != 1)}; were there no difference at all, "
                 f"{0.05 * len(named):.1f} of them would be called one by chance).")  # fmt: skip
    lines += [f"{verdict(mine, other, paired(found, mine, other))}{compute(found, mine, other)}."
              for mine, other in named]  # fmt: skip
    for key, words in (("gap", "in the gap at growth, %"), ("final", "after training on")):
        lines += [f"Calibration, {words}: {verdict(fitted, plain, paired(found, fitted, plain, key))}"
                  f"{compute(found, fitted, plain)}."
                  for plain, fitted in calibrated() if {plain, fitted} <= set(sound)]  # fmt: skip
    lines += [reach(study, found, name) for name in (BLOCK, DEALT, LONGER)
              if "there" in found[name]["seeds"]]  # fmt: skip
    for name, tried in units[study.seeds[0]]["tuning"].items():
        if len(tried) > 1 and min(tried, key=tried.__getitem__) in (min(tried, key=float), max(tried, key=float)):
            lines.append(f"{name} did best at the end of the rates that were tried; a rate beyond it may be better "
                         "still.")  # fmt: skip
    lines += [largest(units, name) for name in (BLOCK, DEALT)]
    if len(sound) < len(found):
        lines.append(f"Diverged at one seed or more: {', '.join(name for name in found if name not in sound)}.")
    return lines


def comparisons(found: Found, sound: list[str]) -> list[str]:
    """Which operators differ from the default after training on, and at growth; how many may do so by chance."""
    if DEALT not in sound:
        return []
    names = [one.name for one in OPERATORS if one.name != DEALT and one.name in sound]
    lines = []
    for key, words, unit in (("final", "After training on", ""), ("gap", "At growth", ", in their gap")):
        signs = {name: paired(found, name, DEALT, key).sign for name in names}
        above, below = ([name for name in names if signs[name] == sign] for sign in (1, -1))
        rest = [name for name in names if signs[name] == 0]
        parts = [f"{word} it: {', '.join(f'*{name}*' for name in some) or 'none'}" for word, some in
                 (("above", above), ("below", below), ("not to be told apart from", rest))]  # fmt: skip
        lines.append(f"{words}, against {DEALT}{unit}: {'; '.join(parts)} ({of(found, DEALT, key).seeds} seeds, "
                     f"{len(names)} comparisons; were there no difference at all, {0.05 * len(names):.1f} of them "
                     "would be called one by chance).")  # fmt: skip
    return lines


def calibrated() -> list[tuple[str, str]]:
    """Every operator that is compared with and without calibration: (without, with)."""
    names = [one.name for one in OPERATORS]
    return [(one.name.removesuffix(FITTED), one.name) for one in OPERATORS
            if one.calibrated and one.name.removesuffix(FITTED) in names]  # fmt: skip


def compute(found: Found, mine: str, other: str) -> str:
    """How the FLOPs of two contenders compare."""
    times_as_much = of(found, mine, "flops").mean / of(found, other, "flops").mean
    return f", the former with {times_as_much:.2f} times the FLOPs of the latter"


def target(found: Found, name: str, wanted: float) -> str:
    """An operator's gap, and whether its interval is within what is wanted."""
    gap = of(found, name, "gap")
    return f"Gap at growth of {name}: {seeds(gap, '{:+.2f}')}, %; within {wanted:g} %: {within(gap, wanted)}."


def reach(study: StudyConfig, found: Found, name: str) -> str:
    """Bytes to the model from scratch's final loss: counts, times by seed and their median, never a mean."""
    there, total = times(found, name, "there"), (study.source_steps + study.further_steps) * study.tokens_per_step / 1e3
    line = (f"{name} reaches the final loss of the model from scratch at {there.reached} of {len(there.times)} seeds "
            f"(thousand bytes after growth: {there.text()}; median {there.median_text()}")  # fmt: skip
    if there.median is None:
        return f"{line})."
    share = there.median / total
    whole = share + study.source_steps * study.tokens_per_step / 1e3 / total
    odds = 100 * (1 - 2.0 ** (1 - len(there.times)))
    return (f"{line}, {share:.2f} of that model's, {whole:.2f} with the source's own training; wanted: at most "
            f"{SHARE_WANTED:g}; the true median lies between the least and the largest of the times with {odds:.0f} %, "
            "so this is no claim).")  # fmt: skip


def largest(units: Units, name: str) -> str:
    """Which part of an operator's gap is the largest in the mean, where that can be told from nothing."""
    models = [one["analysis"]["models"][name] for one in units.values()]
    means = {"spread": interval([one["analysis"]["spread"] for one in units.values()])}
    means |= {key: interval([model[key] for model in models]) for key in ("tail", "order")}
    most = max(means, key=lambda key: abs(means[key].mean))
    if means[most].sign == 0:
        return (f"No part of the gap of {name} can be told from 0; the largest in the mean is the {most}, "
                f"{seeds(means[most], '{:+.2f}')}, %.")  # fmt: skip
    return f"The largest part of the gap of {name} is the {most}, {seeds(means[most], '{:+.2f}')}, %."


def cannot_tell(study: StudyConfig, found: Found) -> list[str]:
    """What this run's design leaves open, whatever its figures."""
    lines = []
    if len(study.seeds) == 1:
        lines.append("One seed: figures are shown, but no difference can be claimed.")
    else:
        gap = paired(found, DEALT, ONCE)
        if gap.high is not None and not any(any(found[name]["diverged"]) for name in (DEALT, ONCE)):
            lines.append(f"Between {DEALT} and {ONCE}, {len(study.seeds)} seeds cannot show a difference smaller than "
                         f"about {gap.high - gap.mean:.4f} nats a byte.")  # fmt: skip
    lines.append(f"All seeds are judged by the same {study.evaluation_batches * study.tokens_per_step:,} bytes; other "
                 "text may order the models otherwise.")
    if study.tuning_batches:
        lines.append("Passes were measured, gains calibrated and rates tuned on a part of the text that is neither "
                     "trained on nor judged by, at every length of the study; the run refuses a text of which more "
                     f"than {100 * SEEN_ALLOWED:g} % of the held-out windows stand in the other parts.")  # fmt: skip
    else:
        lines += [
            f"The rates of {', '.join(f'*{name}*' for name in CONTROLS if name not in (ON_TOKENS, ON_FLOPS))} were "
            f"chosen at seed {study.seeds[0]} by losses on the text that they are judged by. That favours these three "
            "by an amount that the run does not tell.",
            "The held-out documents were chosen by the rule that passes over long ones.",
            "Calibration read training text from beyond what the models train on. The run did not check that it was "
            "still the first reading of the text; at more than 2.7 times this length, of two MiB, it is not.",
        ]  # fmt: skip
    lines.append(f"The rate of the {study.further_steps} steps was not tuned; another may order the operators "
                 "otherwise.")  # fmt: skip
    return lines
