"""The pages and pictures of the recall studies, made from their stored files alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.growth_study.inference import text_of
from experiments.pages import earlier_runs, markdown_table, page_writer
from experiments.recall_study.findings import FOLLOWS_BOUND, follows_at, right_at
from experiments.recall_study.states import MODES, REST
from experiments.recall_study.study import TEXT
from gt_jax.monitoring.canvas import own_settings
from gt_jax.monitoring.plots import COLOURS, new_figure, save_png

Stored = Mapping[str, Any]
CHANCE = "Chance is 12.5 %."


def write(name: str) -> Callable[[Path, Stored], str]:
    """What writes the page and the picture of the part's stored file, and gives the page."""
    markdown, draw = PARTS[name]
    return page_writer(f"recall_{name}", functools.partial(markdown, f"recall_{name}"), draw)


MEANS = " Means over seeds, in brackets the 95 % interval by Student's t over seeds."


def _head(title: str, stored: Stored, figures: str = MEANS) -> list[str]:
    seeds = len(stored["config"]["seeds"])
    return [f"# {title}", "", f"`{stored['command']}`", "",
            f"{seeds} seed{'s' * (seeds != 1)}, {stored['seconds'] / 60:.0f} minutes of wall time in all calls, on "
            f"{stored['machine']['cores']} cores.{figures}"]


def arms_page(name: str, stored: Stored) -> str:
    """Right answers, the state test, and what recall costs in text."""
    config, arms = stored["config"], stored["summary"]
    hardest = str(max(config["stages"]))
    places = list(next(iter(arms.values()))["accuracy"][hardest])
    equal = config.get("as_large_as", "")
    title = f"Token mixers with as many parameters as {equal}" if equal else "Does the state carry the answer?"
    made = " The width of an arm's MLPs makes up for what its mixers take." if equal else ""
    tokens = "bytes" if config["tokenizer"] == "bytes" else Path(config["tokenizer"]).name
    lines = [
        *_head(title, stored), "",
        f"Text is {', '.join(Path(file).name for file in config['text']) or 'the standard library'} in {tokens}. Width "
        f"{config['width']}, {config['steps']} steps, rate {config['rate']:g}. {config['facts']} facts among up to "
        f"{hardest} distractors, in rows of {config['length'] or 'as many tokens as the longest prompt'}; the answer "
        f"is the likeliest of 8 colours. {CHANCE} {len(places) * config['prompts']} prompts at {hardest} "
        f"distractors.{made} ![the state test]({name}.png)", "",
        *earlier_runs(stored["rows"]),
        "## Right answers and text", "",
        *markdown_table([_accuracy_row(label, arm, hardest, places, equal) for label, arm in arms.items()],
                        ["arm", *(f"fact at {100 * float(place):.0f} %" for place in places), "without distractors",
                         "bits per byte", "above text alone", *(["parameters beside the table"] if equal else [])]), "",
        f"## The state test, {hardest} distractors", "",
        "Of 100 answers: that stay with the prompt's colour / that follow the twin's. Cut before the question:", "",
        *markdown_table([_state_row(label, arm, "question") for label, arm in arms.items()], ["arm", *MODES]), "",
        "Cut right after the asked fact, all that follows read from what is left:", "",
        *markdown_table([_state_row(label, arm, "fact") for label, arm in arms.items()], ["arm", *MODES]), "",
        *(_verdict(label, arm) for label, arm in arms.items() if arm["training"] != TEXT),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _accuracy_row(label: str, arm: Mapping[str, Any], hardest: str, places: list[str], equal: str) -> list[str]:
    easiest = min(arm["accuracy"], key=int)
    right = [f"{arm['accuracy'][hardest][place]['mean']:.0f}" for place in places]
    easy = [figure["mean"] for figure in arm["accuracy"][easiest].values()]
    cost = text_of(arm["costs_in_text"], "{:+.3f}") if "costs_in_text" in arm else "-"
    size = [f"{arm['parameters']:,}"] if equal else []
    return [label, *right, f"{sum(easy) / len(easy):.0f}", text_of(arm["bits_per_byte"], "{:.3f}"), cost, *size]


def _state_row(label: str, arm: Mapping[str, Any], cut: str) -> list[str]:
    found = arm["state"][cut]
    return [label, *(f"{found[mode]['stays']['mean']:.0f} / {found[mode]['follows']['mean']:.0f}" if mode in found
                     else "-" for mode in MODES)]  # fmt: skip


def _verdict(label: str, arm: Mapping[str, Any]) -> str:
    """One line of the list: whether there is something to follow, and what it follows."""
    right, follows = right_at(arm), follows_at(arm)
    if right < 50:
        return (f"- `{label}`: {right:.0f} % right with nothing changed: the arm has not learned the task and says "
                "nothing.")
    rest = arm["state"]["question"][REST]["follows"]["mean"]
    met = "at least" if follows >= FOLLOWS_BOUND else "below"
    return (f"- `{label}`: {right:.0f} % right; {follows:.0f} % follow the swapped state ({met} the "
            f"{FOLLOWS_BOUND:.0f} asked for), {rest:.0f} % follow the rest.")  # fmt: skip


def machine_page(name: str, stored: Stored) -> str:
    """Right answers by task and model, and the known outcomes."""
    found = stored["summary"]
    models = list(next(iter(found["models"].values())))
    right: dict[tuple[str, str], list[str]] = {}  # by seed: of two the interval of a mean says less than they do
    for row in stored["rows"]:
        right.setdefault((row["task"], row["model"]), []).append(f"{100 * row['accuracy']:.0f}")
    rows = [[task, *(", ".join(right[task, model]) for model in models)] for task in found["models"]]
    return "\n".join([
        *_head("Checks of the machine", stored, figures=""), "",
        f"Two layers of width {stored['config']['width']}, {stored['config']['steps']} steps at rate "
        f"{stored['config']['rate']:g}, one rate for all. Right answers of 100, by seed; chance is 6 in recall and "
        "memorisation, 50 in parity, which is asked of in the last quarter of a row.", "",
        *markdown_table(rows, ["task", *models]), "",
        *markdown_table([[text, "yes" if came else "no"] for text, came in found["known"].items()],
                        ["known outcome", "came out"]), "",
        f"![right answers]({name}.png)",
    ]) + "\n"  # fmt: skip


def scaling_page(name: str, stored: Stored) -> str:
    """The sizes, the fit of all, and what any three would have claimed."""
    found = stored["summary"]
    sizes = [[f"{one['width']}", f"{one['parameters']:,}", f"{one['rate']:g}",
              ", ".join(f"{value:.4f}" for value in one["nats"])] for one in found["sizes"]]  # fmt: skip
    names = {"amplitude": "A", "alpha": "alpha", "floor": "B, nats"}
    fits = [["all sizes", *(_with_limits(found["fit"][key], found["intervals"][key]) for key in names)]]
    fits += [[", ".join(map(str, one["widths"])), *(f"{one[key]:.3f}" for key in names)]
             for one in found["three_sizes"]]  # fmt: skip
    alphas = [one["alpha"] for one in found["three_sizes"]]
    return "\n".join([
        *_head("Loss over size", stored, figures=""), "",
        f"Layout {stored['config']['layout']}, {stored['config']['steps']} steps of the same text for all; the rate is "
        "each size's own, tuned at the first seed. Held-out nats a token, by seed:", "",
        *markdown_table(sizes, ["width", "parameters beside the table", "rate", "nats"]), "",
        "loss = A N^-alpha + B, N in units of the smallest size; in brackets percentiles 2.5 and 97.5 over resampled "
        "seeds.", "",
        *markdown_table(fits, ["sizes", *names.values()]), "",
        f"Three sizes give an alpha from {min(alphas):.2f} to {max(alphas):.2f}, each of them a perfect fit or the "
        f"edge of what was tried. ![loss over size]({name}.png)",
    ]) + "\n"  # fmt: skip


def _with_limits(value: float, limits: list[float] | None) -> str:
    return f"{value:.3f}" if limits is None else f"{value:.3f} ({limits[0]:.3f} to {limits[1]:.3f})"


@own_settings()
def draw_arms(stored: Stored, path: Path) -> None:
    """By arm the answers that stay and that follow, state swapped and rest swapped, cut before the question."""
    arms = stored["summary"]
    figure, panel = new_figure(11.0, 1.6 + 0.5 * len(arms), "The answer after a swap, cut before the question")
    height = 0.27
    for place, (label, arm) in enumerate(reversed(arms.items())):
        for number, mode in enumerate(("intact", "state swapped", "rest swapped")):
            found = arm["state"]["question"][mode]
            at, stays, follows = place + (1 - number) * height, found["stays"]["mean"], found["follows"]["mean"]
            once = {"label": mode} if place == 0 else {}
            panel.barh(at, follows, height * 0.9, color=COLOURS[number + 1], **once)
            panel.plot([stays], [at], marker="|", markersize=11, color="#222222", linestyle="")
        panel.text(101, place, label, fontsize=8, va="center")
    panel.set_yticks([])
    panel.set_xlim(0, 100)
    panel.axvline(12.5, color="#999999", linewidth=0.8, linestyle=":")
    panel.set_xlabel("answers that follow the twin, %; strokes: that stay with the prompt; dotted: chance")
    panel.legend(frameon=False, fontsize=8.5, loc="lower right")
    figure.subplots_adjust(right=0.6)
    save_png(figure, path)


@own_settings()
def draw_machine(stored: Stored, path: Path) -> None:
    """Right answers by task, a bar a model."""
    found = stored["summary"]["models"]
    figure, axes = new_figure(10.0, 4.2, "Checks of the machine")
    models = list(next(iter(found.values())))
    for number, model in enumerate(models):
        at = [place + (number - (len(models) - 1) / 2) * 0.16 for place in range(len(found))]
        axes.bar(at, [each[model]["mean"] for each in found.values()], 0.15, color=COLOURS[number % len(COLOURS)],
                    label=model)  # fmt: skip
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("right answers, %")
    axes.legend(frameon=False, fontsize=8.5)
    save_png(figure, path)


@own_settings()
def draw_scaling(stored: Stored, path: Path) -> None:
    """Losses by seed, the fit of all sizes, and those of any three."""
    found = stored["summary"]
    figure, axes = new_figure(8.0, 4.6, "Loss over size: five sizes, and any three of them")
    sizes = [one["parameters"] for one in found["sizes"]]
    for one in found["sizes"]:
        axes.plot([one["parameters"]] * len(one["nats"]), one["nats"], "o", color=COLOURS[0], markersize=4)
    line = [min(sizes) * (4 * max(sizes) / min(sizes)) ** (step / 60) for step in range(61)]
    widths = {one["width"]: one["parameters"] for one in found["sizes"]}
    for one in found["three_sizes"]:
        least = min(widths[width] for width in one["widths"])
        axes.plot(line, [one["amplitude"] * (n / least) ** -one["alpha"] + one["floor"] for n in line],
                     color="#bbbbbb", linewidth=0.8)  # fmt: skip
    fit = found["fit"]
    axes.plot(line, [fit["amplitude"] * (n / min(sizes)) ** -fit["alpha"] + fit["floor"] for n in line],
                 color=COLOURS[1], linewidth=2)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("parameters beside the token table")
    axes.set_ylabel("held-out nats a token")
    save_png(figure, path)


PARTS: dict[str, tuple[Callable[[str, Stored], str], Callable[[Stored, Path], None]]] = {
    "state": (arms_page, draw_arms), "mixers": (arms_page, draw_arms),
    "machine": (machine_page, draw_machine), "scaling": (scaling_page, draw_scaling),
}  # fmt: skip
