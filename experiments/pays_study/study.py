"""The study of growth as one frozen config, and its units: which model of which setting, seed and rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import contract
from experiments.depth_study.study import CHAINS as CHAINS_OF
from experiments.depth_study.study import JUMPS as JUMPS_OF
from experiments.depth_study.study import SCALES as DEPTH_SCALES
from experiments.pays_study.setting import Setting, TaskSetting, TextSetting
from experiments.seeds_and_rates import wrong_seeds
from experiments.units import slug
from gt_jax.configs.json_config import Config
from gt_jax.errors import Refused, refuse_all

SOURCE, GROWN, ON, CONTROL, SCRATCH = "source", "grown", "source trained on", "control", "from scratch"
SHALLOW = "shallow, from scratch"
ON_FORCED = "source trained on, passes forced"
ONCE_SOURCE, STACKED = "source run once", "source run once, stacked"
AGAIN = "from scratch, started"

JUMPS = TaskSetting(name="pointer_jumps", of=JUMPS_OF, budget=1200, held_out_batches=32)
CHAINS = TaskSetting(name="variable_chains", budget=1800, of=CHAINS_OF.replace(adaptive_rates=(), adaptive_tuned_at=1),
                     points=(0.75,), rates=(2e-3, 3e-3), tuned_at=2, curricula=(0.6,),
                     held_out_batches=32)  # fmt: skip
DEEPER = TaskSetting(
    name="deeper_jumps", of=JUMPS_OF.replace(task="pointer_jumps:hardest=4,symbols=10,queries=4"),
    deeper="pointer_jumps:hardest=8,symbols=10,queries=4", times=8, budget=900, points=(0.5,),
)  # fmt: skip
TEXT = TextSetting(name="text", budget=800, points=(0.25, 0.5))
NARROW = TextSetting(name="text_narrow", width=24, heads=2, budget=1800, points=(0.5,), rates=(4e-3, 8e-3),
                     child_rates=(4e-3, 8e-3), shallow=True, opened=0.85, context="all", planned=2.5,
                     held_out_batches=40)  # fmt: skip
"""A model so narrow that two cores show the deep one 19 tokens a parameter; its source's gates are let go late.

Until then a step costs what a plain one does: under `context` "alive" its one pass would be computed again.

All seeds are judged by one held-out part: of 6 batches it ranks models otherwise than the tuning part does.
"""
LONG = NARROW.replace(name="text_long", budget=7200, adapts=False, points=(0.03125, 0.125, 0.5),
                      rates=(4e-3, 8e-3, 1.6e-2), child_rates=(8e-3,))  # fmt: skip
"""Four times as long, where depth is worth its price: what a stack of layers run once is then, early and late.

What is stacked is tried at no rate but that of the deep model from scratch, so that it has no advantage of it.
"""
_FROZEN = JUMPS.replace(rates=(4e-3,), curricula=(0.3,)), CHAINS.replace(rates=(2e-3,), tuned_at=1)
"""Rates and curricula as scale `tries` chose them with seeds 0, 1, 2: nothing is tried on seeds to come."""
_WIDE_CHAINS, _WIDE_JUMPS = DEPTH_SCALES["accelerator"]
_LESS = {"budget": 24, "points": (0.5,), "evaluations": 2, "held_out_batches": 2, "rates": (4e-3,)}
_LITTLE = {"width": 16, "rows": 8}
SCALES: dict[str, tuple[tuple[TaskSetting, ...], tuple[TextSetting, ...]]] = {
    "minutes": (
        tuple(one.replace(of=one.of.replace(**_LITTLE), **_LESS) for one in (JUMPS, CHAINS, DEEPER)),
        (TEXT.replace(**_LESS, **_LITTLE, tokens=64, target_layers=8),),
    ),
    "small": (_FROZEN, ()),
    "hours": (_FROZEN, (NARROW, LONG)),
    "tries": ((JUMPS, CHAINS), (TEXT,)),
    "accelerator": (
        (
            JUMPS.replace(of=_WIDE_JUMPS, budget=16000),
            CHAINS.replace(of=_WIDE_CHAINS, budget=16000, points=(0.25, 0.5, 0.75), curricula=(0.6, 0.3)),
            DEEPER.replace(of=_WIDE_JUMPS.replace(task="pointer_jumps:hardest=12,symbols=26,queries=8"),
                           deeper="pointer_jumps:hardest=24,symbols=26,queries=8", budget=12000),
        ),
        (TEXT.replace(layout="DDDG*2", target_layers=24, width=256, rows=64, tokens=256, budget=8000,
                      points=(0.25, 0.5, 0.75)),),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Study(Config):
    """Settings and seeds; `text` are files, none for the Python library's sources.

    Each model is trained at each rate of its setting with the first seed or few; the best on the tuning part, which
    nothing trains on, goes on with the others. Figures are of the held-out part.
    """

    tasks: tuple[TaskSetting, ...] = SCALES["small"][0]
    texts: tuple[TextSetting, ...] = SCALES["small"][1]
    text: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)

    def problems(self) -> list[str]:
        wrong, names = [], [one.name for one in self.settings]
        if not names or len(set(names)) < len(names):
            wrong.append(f"settings are named {names}; one or more of different names are needed")
        wrong += wrong_seeds(self.seeds)
        return wrong

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Tasks first."""
        return (*self.tasks, *self.texts)


class Wanted(NamedTuple):
    """One unit: a model of `setting`; but for those from scratch it is, or was made from, the source of `point`.

    What is stacked was made from a source that ran each layer once, and what was started at a point has what such a
    source leaves of B. `curriculum` is of the one from scratch, None where
    it is the setting's; `own` is the rate of what was grown, None where it is its source's.
    """

    setting: Setting
    kind: str
    seed: int
    rate: float
    point: float = 1.0
    recipe: str = ""
    curriculum: float | None = None
    own: float | None = None

    @property
    def model(self) -> str:
        """What it is called in tables."""
        if self.kind in (SCRATCH, SHALLOW):
            return self.kind
        what = {SOURCE: "source to", GROWN: "grown at", CONTROL: f"{self.recipe}, at", ON: f"{ON} from",
                ON_FORCED: f"{ON_FORCED}, from", ONCE_SOURCE: f"{ONCE_SOURCE}, to",
                STACKED: f"{STACKED} at", AGAIN: f"{AGAIN} at"}  # fmt: skip
        return f"{what[self.kind]} {self.point:g}"

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        eased = "" if self.curriculum is None else f", curriculum {self.curriculum:g}"
        then = "" if self.own is None else f", then {self.own:g}"
        return f"{self.setting.name}/seed{self.seed}/{self.model} at {self.rate:g}{eased}{then}"

    def place(self, work: Path) -> Path:
        """Where the checkpoint of the source lies."""
        return work / "sources" / slug(self.source.name)

    @property
    def source(self) -> Wanted:
        """The source that it is, or was made from."""
        kind = ONCE_SOURCE if self.kind in (ONCE_SOURCE, STACKED) else SOURCE
        return self._replace(kind=kind, recipe="", own=None)


def scaled(scale: str, seeds: tuple[int, ...], text: tuple[str, ...], only: tuple[str, ...]) -> Study:
    """The study of a scale, of all its settings or `only` some; raises `Refused` for words that are not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    tasks, texts = SCALES[scale]
    known = [one.name for one in (*tasks, *texts)]
    if unknown := [name for name in only if name not in known]:
        raise Refused(f"--only names {', '.join(unknown)}; the settings are {', '.join(known)}")
    chosen = only or tuple(known)
    return Study(tasks=tuple(one for one in tasks if one.name in chosen),
                 texts=tuple(one for one in texts if one.name in chosen), text=text, seeds=seeds)  # fmt: skip


def tries(setting: Setting, seeds: tuple[int, ...]) -> dict[str, list[list[Wanted]]]:
    """What is trained at every rate, each with the first `tuned_at` of the seeds: the sources of the middle, and the
    models from scratch, the deep one also with every curriculum."""
    found = {SCRATCH: [Wanted(setting, SCRATCH, 0, rate, curriculum=eased) for eased in setting.scratch_curricula()
                       for rate in setting.rates]}  # fmt: skip
    if setting.adapts:
        found[SOURCE] = [Wanted(setting, SOURCE, 0, rate, setting.middle) for rate in setting.rates]
    if setting.shallow:
        found[SHALLOW] = [Wanted(setting, SHALLOW, 0, rate) for rate in setting.rates]
        found[ONCE_SOURCE] = [Wanted(setting, ONCE_SOURCE, 0, rate, setting.middle) for rate in setting.rates]
    return {kind: [[one._replace(seed=seed) for seed in seeds[: setting.tuned_at]] for one in units]
            for kind, units in found.items()}  # fmt: skip


def first_round(setting: Setting, seeds: tuple[int, ...], best: dict[str, Wanted]) -> list[Wanted]:
    """Models that stand on no other: from scratch, and the sources of all points; `best` are of the first seed."""
    found = [best[kind]._replace(seed=seed) for kind in (SCRATCH, SHALLOW) if kind in best for seed in seeds]
    return found + [best[kind]._replace(seed=seed, point=point) for kind in (SOURCE, ONCE_SOURCE) if kind in best
                    for point in setting.points for seed in seeds]  # fmt: skip


def grown_tries(setting: Setting, seeds: tuple[int, ...], best: dict[str, Wanted]) -> dict[str, list[list[Wanted]]]:
    """What is grown or stacked in the middle, at every one of its own rates, each with the first `tuned_at` of the
    seeds; nothing where rates are their source's."""
    sources = {kind: best[of] for kind, of in ((GROWN, SOURCE), (STACKED, ONCE_SOURCE)) if of in best}
    return {kind: [[Wanted(setting, kind, seed, source.rate, setting.middle, own=None if own == source.rate else own)
                    for seed in seeds[: setting.tuned_at]] for own in setting.child_rates]
            for kind, source in sources.items() if setting.child_rates}  # fmt: skip


def second_round(setting: Setting, seeds: tuple[int, ...], best: dict[str, Wanted]) -> list[Wanted]:
    """What is made of the sources; at the rates of `best[GROWN]` and `best[STACKED]` what is grown and stacked, where
    that was tried."""
    made: dict[str, tuple[float, float | None]] = {}
    again: list[Wanted] = []
    if ONCE_SOURCE in best:
        made[STACKED] = best[ONCE_SOURCE].rate, best[STACKED].own if STACKED in best else None
        # who has an early source has spent so little that starting over is training from scratch for all of B
        again = [Wanted(setting, AGAIN, seed, best[SCRATCH].rate, setting.points[-1]) for seed in seeds]
    if not setting.adapts:
        return _made(setting, seeds, made) + again
    rate, own = best[SOURCE].rate, best[GROWN].own if GROWN in best else None
    made = {GROWN: (rate, own), ON: (rate, None), **made}
    found = _made(setting, seeds, made) + again
    if isinstance(setting, TaskSetting):
        found += [Wanted(setting, ON_FORCED, seed, rate, setting.points[-1]) for seed in seeds]
    return found + [Wanted(setting, CONTROL, seed, rate, setting.middle, one.name, own=own) for one in setting.controls
                    for seed in seeds]  # fmt: skip


def _made(
    setting: Setting, seeds: tuple[int, ...], rates: Mapping[str, tuple[float, float | None]]
) -> list[Wanted]:
    """Of each kind, at its source's rate and its own, what is made at all points."""
    # seeds of one model follow each other: a worker has compiled it then
    return [Wanted(setting, kind, seed, rate, point, own=own)
            for point in setting.points for kind, (rate, own) in rates.items() for seed in seeds]  # fmt: skip


def unchanged(study: Study, found: Mapping[str, Any], content: str) -> list[dict[str, Any]]:
    """The rows of a stored file whose whole setting `study` has too, each with what made it.

    Raises `Refused` for a file of other seeds or, where rows of a text are among them, of another text.
    """
    there = Study.from_json(found["config"])
    kept = {one.name for one in study.settings if one in there.settings}
    wrong = [f"the stored rows are of seeds {list(there.seeds)}; this study has {list(study.seeds)}"]
    wrong = wrong if there.seeds != study.seeds else []
    if found["content"] != content and kept & {one.name for one in study.texts}:
        wrong.append("the stored rows of text were made of another text; give that, or go without --keep")
    refuse_all(wrong, "--keep:")
    return [row for row in contract.lent(found) if row["task"] in kept]
