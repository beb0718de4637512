"""The study of depth on tasks as one frozen config: settings by scale, seeds, rates, and the models compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import contract
from experiments.depth_study.setting import Setting
from experiments.seeds_and_rates import wrong_rates, wrong_seeds
from gt_jax.configs.json_config import Config
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.errors import Refused

SHALLOW, ADAPTIVE, MEAN, MOST = "plain, shallow", "adaptive", "plain, mean depth", "plain, most depth"
MODELS = (SHALLOW, ADAPTIVE, MEAN, MOST)

CHAINS = Setting(task="variable_chains:hardest=4,chains=4,letters=20,order=backward", steps=1400, pass_price=0.1,
                 weights="hard", opened=0.85, halting_scale=2.0,
                 adaptive_rates=(2e-3, 3e-3), adaptive_tuned_at=2)  # fmt: skip
JUMPS = Setting(task="pointer_jumps:hardest=4,symbols=8,queries=4", steps=1200)
WIDER = {"layout": "DDDG", "width": 256, "rows": 256, "held_out_batches": 8}
SCALES: dict[str, tuple[Setting, ...]] = {
    "minutes": tuple(one.replace(steps=60, width=16, rows=8, held_out_batches=2) for one in (CHAINS, JUMPS)),
    "small": (CHAINS, JUMPS),
    "accelerator": (
        Setting(task="variable_chains:hardest=12,chains=4,order=backward", steps=20000, **WIDER),  # type: ignore[arg-type]
        Setting(task="pointer_jumps:hardest=12,symbols=24,queries=8", steps=20000, **WIDER),  # type: ignore[arg-type]
    ),
}


@dataclasses.dataclass(frozen=True)
class Study(Config):
    """Every model of every setting is trained at each of `rates` with the first seed; the best goes on with the others.

    The best has the least loss on the tuning part, which nothing trains on; figures are of the held-out part. A setting
    may have other rates for its adaptive model, and several seeds whose mean loss decides.
    """

    settings: tuple[Setting, ...] = SCALES["small"]
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (2e-3, 4e-3)

    def problems(self) -> list[str]:
        wrong = []
        if not self.settings:
            wrong.append("settings is empty; a study needs at least one task")
        wrong += wrong_seeds(self.seeds)
        wrong += wrong_rates(self.rates)
        return wrong

    def rates_of(self, setting: Setting, model: str) -> tuple[float, ...]:
        """The rates at which a model is tried."""
        return (setting.adaptive_rates or self.rates) if model == ADAPTIVE else self.rates

    def tuned_at(self, setting: Setting, model: str) -> tuple[int, ...]:
        """The seeds whose mean loss chooses a model's rate."""
        return self.seeds[: setting.adaptive_tuned_at if model == ADAPTIVE else 1]


class Wanted(NamedTuple):
    """One unit: `model` of `setting` trained with `seed` at `rate`; a plain one has the layout `times` times."""

    setting: Setting
    model: str
    times: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"{self.setting.name}/seed{self.seed}/{self.model} at {self.rate:g}"

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.setting.adaptive() if self.model == ADAPTIVE else self.setting.plain(self.times)


def scaled(scale: str, seeds: tuple[int, ...]) -> Study:
    """The study of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return Study(settings=SCALES[scale], seeds=seeds)


def unchanged(study: Study, found: Mapping[str, Any], content: str = "") -> list[dict[str, Any]]:
    """The rows of a stored file that `study` would make the same, each with what made it; it reads nothing.

    Those of a task and model whose data, training, rates tried and questions are what they were; a price, and the rate
    of halting heads, are no part of the training of a model that has no passes to pay for. Raises `Refused` for a study
    of other seeds.
    """
    there = Study.from_json(found["config"])
    if there.seeds != study.seeds:
        raise Refused(f"the stored rows are of seeds {list(there.seeds)}; this study has {list(study.seeds)}")
    then = {one.name: one for one in there.settings}

    def same(setting: Setting, model: str) -> bool:
        mine, before = setting, then.get(setting.name)
        if before is None:
            return False
        tried = [(one.rates_of(of, model), one.tuned_at(of, model)) for one, of in ((there, before), (study, mine))]
        return tried[0] == tried[1] and _making(before, model) == _making(mine, model)

    kept = {(setting.name, model) for setting in study.settings for model in MODELS if same(setting, model)}
    return [row for row in contract.lent(found) if (row["task"], row["model"]) in kept]


def _making(setting: Setting, model: str) -> tuple[Any, ...]:
    """All that a row follows from but its seed, its rate and how often the layout stands."""
    train, wanted = setting.train(0, 1.0), Wanted(setting, model, 1, 0, 1.0)
    if model != ADAPTIVE:
        train = train.replace(price=PriceConfig(), optimizer=train.optimizer.replace(halting_scale=1.0))
    most = setting.passes if model == MOST else 0
    return wanted.config, setting.data(0), train, setting.held_out_batches, most
