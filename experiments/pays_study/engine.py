"""Trains one model of the study and asks it everything: one call makes one unit.

A source is also kept as a training checkpoint, from which children are grown as `gt_jax.grow` does it, and trained on
as `gt_jax.train --start` does: weights, and the moments of the weights that they are copies of.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.growth_study.operators import with_random_layers
from experiments.pays_study import budget
from experiments.pays_study.ask import figures
from experiments.pays_study.budget import Spent
from experiments.pays_study.recipes import STACK, STACK_ONCE, Recipe, plan_of
from experiments.pays_study.setting import Setting, TaskSetting
from experiments.pays_study.study import (
    AGAIN,
    CONTROL,
    GROWN,
    ON,
    ON_FORCED,
    ONCE_SOURCE,
    SCRATCH,
    SHALLOW,
    SOURCE,
    STACKED,
    Wanted,
)
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.errors import Failed
from gt_jax.evaluation.measurement import pass_counts
from gt_jax.growth import repetition
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.growth.transform import target_config
from gt_jax.models.language_model import abstract, initialise
from gt_jax.text.data import open_data
from gt_jax.training.loop import Diverged, Trainer, fit, make_trainer, variables_of
from gt_jax.training.moments import carried_moments
from gt_jax.training.state import TrainState
from gt_jax.training.step import Batch
from gt_jax.typing import Tree

NOISE = 1e-4  # of copies, that they be no twins
NO_LOSS = 1e9
TENTH = 0.1
"""After so many more steps than the source had, what was made of it is held against the source trained on."""


def make(work: Path, text: tuple[str, ...], wanted: Wanted) -> dict[str, Any]:
    """The unit: what the model is, what it cost, its curve, and what it says at its end."""
    makers = {SOURCE: _source, ONCE_SOURCE: _source, SCRATCH: _scratch, SHALLOW: _scratch, GROWN: _grown,
              STACKED: _grown, CONTROL: _grown, ON: _on, ON_FORCED: _on, AGAIN: _scratch}  # fmt: skip
    began = time.monotonic()
    row = makers[wanted.kind](_Place(work, text, wanted))
    last = row["final"]
    said = f"{100 * last['accuracy_all']:.1f} % right" if "accuracy_all" in last else f"{last['nats']:.4f} nats"
    seconds = time.monotonic() - began
    same = {"task": wanted.setting.name, "model": wanted.model, "kind": wanted.kind, "seed": wanted.seed,
            "point": wanted.point, "rate": wanted.own or wanted.rate,
            "harder": list(wanted.setting.harder)}  # fmt: skip
    answers = {name: last[name] for name in ("accuracy", "passes", "spearman") if name in last}
    return {**same, **answers, **row, "seconds": round(seconds, 1), "line": f"{said} in {seconds:.0f} s"}


class _Place(NamedTuple):
    """What every maker needs."""

    work: Path
    text: tuple[str, ...]
    wanted: Wanted

    @property
    def setting(self) -> Setting:
        return self.wanted.setting

    @property
    def source_place(self) -> Path:
        return self.wanted.place(self.work)

    def data(self, steps: int, deep: bool = True) -> DataConfig:
        return self.setting.data(self.wanted.seed, steps, self.text, deep)

    def held_out(self) -> Sequence[Batch]:
        """What all of a setting are judged by: of the deep model's data."""
        return _part(self.setting.data(0, 1, self.text, deep=True), self.setting.held_out_batches, False)

    def tuning(self, deep: bool = True) -> Sequence[Batch]:
        return _part(self.setting.data(0, 1, self.text, deep), self.setting.held_out_batches, True)

    @property
    def diverged(self) -> dict[str, Any]:
        """What stands for a model whose loss was no number: it sorts last."""
        answers = {"accuracy_all": 0.0, "accuracy": {}} if isinstance(self.setting, TaskSetting) else {}
        return {"nats": NO_LOSS, **answers}

    @property
    def forced(self) -> int | None:
        """The passes that every token runs, in training and where it is asked; None leaves them to the gates."""
        adaptive = self.setting.source.adaptive
        return adaptive.max_passes if self.wanted.kind == ON_FORCED and adaptive is not None else None

    def source(self) -> dict[str, Any]:
        """The record of the source that this one is made from."""
        return dict(checkpoint.describe(self.source_place)[1]["record"])


@functools.lru_cache(maxsize=4)
def _part(data: DataConfig, count: int, tuning: bool) -> Sequence[Batch]:
    """Batches that nothing trains on: drawing an instance of such a part takes many tries."""
    opened = open_data(data)
    return opened.tuning(count) if tuning else opened.held_out(count)


class _Trained(NamedTuple):
    state: TrainState
    curve: list[dict[str, Any]]
    asked: dict[int, dict[str, Any]]
    spent: Spent
    passes: list[float]
    diverged: str | None


@functools.lru_cache(maxsize=16)
def _trainer(config: ModelConfig, train: TrainConfig) -> Trainer:
    return make_trainer(config, train)


def _train(at: _Place, config: ModelConfig, trainer: Trainer, state: TrainState, batches: Any, steps: int,
           before: Spent, points: Iterable[int] = ()) -> _Trained:  # fmt: skip
    """Train for `steps` steps; asked at evenly spaced steps, at `points`, and at the end.

    `passes` are the mean passes computed in the last tenth of the steps, by layer.
    """
    setting, held_out = at.setting, at.held_out()
    cost = budget.cost_of(setting, config)
    computed: list[list[float]] = []
    ran: list[list[float]] = []
    asked: dict[int, dict[str, Any]] = {}
    curve: list[dict[str, Any]] = []
    spaced = {round(steps * part / setting.evaluations) for part in range(1, setting.evaluations + 1)}
    due = {step for step in (*spaced, *points, steps) if 1 <= step <= steps}

    def spent() -> Spent:
        if not computed:
            return before
        return Spent(before.flops + cost.computed(computed), before.model_flops + cost.model(ran),
                     before.tokens + len(computed) * setting.batch * setting.length)  # fmt: skip

    def record(step: int, metrics: dict[str, Any]) -> None:
        ones = np.ones(len(config.depth))
        adaptive = config.adaptive is not None
        computed.append(np.asarray(metrics["passes_computed"] if adaptive else ones, np.float64).tolist())
        ran.append(np.asarray(metrics["passes_run"] if adaptive else ones, np.float64).tolist())

    def after(step: int, state: TrainState, last: bool) -> None:
        asked[step] = figures(config, variables_of(state), held_out, at.forced)
        curve.append(point_of(step, spent(), asked[step]))

    try:
        state = fit(trainer, state, batches, steps, record=record, due=due.__contains__, after=after)
    except Diverged as error:
        return _Trained(state, curve, asked, spent(), [], str(error))
    last = np.mean(computed[-max(1, steps // 10) :], axis=0).tolist()
    return _Trained(state, curve, asked, spent(), last, None)


def point_of(step: int, spent: Spent, found: dict[str, Any]) -> dict[str, Any]:
    """A point of a curve: its place in the training, all that led there, and what was found."""
    point = {"step": step, "flops": spent.flops, "tokens": spent.tokens, "nats": found["nats"]}
    return point | ({"accuracy_all": found["accuracy_all"]} if "accuracy_all" in found else {})


def _row(at: _Place, config: ModelConfig, steps: int, trained: _Trained, **more: Any) -> dict[str, Any]:
    """What every unit says."""
    size = sum(leaf.size for leaf in jax.tree.leaves(trained.state.params))
    final = trained.asked[steps] if trained.diverged is None else at.diverged
    return {"layers": config.layout, "steps": steps, "parameters": size, **trained.spent._asdict(),
            "tokens_a_parameter": trained.spent.tokens / size, "curve": trained.curve,
            "final": final, "diverged": trained.diverged, **more}  # fmt: skip


def _source(at: _Place) -> dict[str, Any]:
    """The source of a point, kept as a checkpoint; `tuning_nats` and the counts are of the tuning part of its data."""
    setting, wanted, config = at.setting, at.wanted, at.setting.source
    steps = budget.source_steps(setting, wanted.point)
    if wanted.kind == ONCE_SOURCE:
        config, steps = config.plain, budget.shallow_steps(setting, wanted.point)
    train, data = setting.source_train(steps, wanted.rate), at.data(steps, deep=False)
    trainer = _trainer(config, train)
    stream = open_data(data).train(None)
    variables = initialise(config, wanted.seed)
    trained = _train(at, config, trainer, trainer.new_state(variables), stream, steps, Spent())
    row = _row(at, config, steps, trained)
    if trained.diverged is not None:
        return row | {"tuning_nats": NO_LOSS}
    variables, tuning = variables_of(trained.state), at.tuning(deep=False)
    row["tuning_nats"] = figures(config, variables, tuning)["nats"]
    if wanted.kind == SOURCE:
        row["measured"] = pass_counts(trainer.evaluation, variables, tuning, config)
        row["k_exec"] = list(repetition.from_json(row["measured"]).k_exec)
        row["passes_computed"] = trained.passes
    if at.source_place.exists():  # of a unit that was killed before it was kept
        shutil.rmtree(at.source_place)
    run = RunConfig(model=config, train=train, data=data)
    checkpoint.save(at.source_place, trained.state._asdict(),
                    {"kind": "train", "config": config.to_json(), "run": run.to_json(), "step": steps,
                     "data": stream.state(), "price": float(trained.state.price.value), "record": row})  # fmt: skip
    return row


def _scratch(at: _Place) -> dict[str, Any]:
    """The deep model from scratch, for all of B or what a source leaves of it, or the source's layers, once each."""
    setting, wanted = at.setting, at.wanted
    config = setting.source.plain if wanted.kind == SHALLOW else setting.deep
    steps = {SCRATCH: setting.budget, SHALLOW: budget.shallow_steps(setting),
             AGAIN: budget.left_steps(setting, wanted.point)}[wanted.kind]  # fmt: skip
    train = setting.scratch_train(wanted.rate, steps)
    if wanted.kind == AGAIN:
        train = train.replace(optimizer=train.optimizer.replace(decay=setting.fall(wanted.point)))
    trainer = _trainer(config, train)
    state = trainer.new_state(initialise(config, wanted.seed))
    batches = open_data(setting.scratch_data(wanted.seed, at.text, wanted.curriculum)).train(None)
    trained = _train(at, config, trainer, state, batches, steps, Spent())
    tuning = NO_LOSS if trained.diverged else figures(config, variables_of(trained.state), at.tuning())["nats"]
    more = {} if wanted.curriculum is None else {"curriculum": wanted.curriculum}
    return _row(at, config, steps, trained, tuning_nats=tuning, **more)


def _further(at: _Place, config: ModelConfig, start: Path, variables: Tree, spent: Spent, steps: int, decay: float,
             **more: Any) -> dict[str, Any]:  # fmt: skip
    """Train on from `start`, its moments carried, on what follows in the source's data."""
    setting, source = at.setting, at.source()
    train = setting.further(source["steps"], at.wanted.own or at.wanted.rate, steps, decay)
    if at.forced is not None:  # to the end, and none of them is paid for: what a child has
        train = train.replace(price=train.price.replace(value=0.0, forced_passes=at.forced, forced_until=1.0,
                                                        price_from=1.0, clipped_until=1.0))  # fmt: skip
    trainer = _trainer(config, train)
    state = trainer.new_state(jax.tree.map(jnp.array, variables))  # copies: the step donates its state
    stored = checkpoint.describe(start)[0]
    state = state._replace(optimizer=carried_moments(state.optimizer, state.params, start, stored))
    if config.adaptive is not None:
        there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state.price)
        state = state._replace(price=checkpoint.load(start, {"price": there})["price"])
    data, read = setting.further_data(at.wanted.seed, source["steps"], at.text)
    stream = open_data(data).train(None)
    stream.restore({**stream.state(), "batches": read})
    tenth = min(steps, max(1, round(TENTH * source["steps"])))
    first = figures(config, variables_of(state), at.held_out(), at.forced)
    trained = _train(at, config, trainer, state, stream, steps, spent, (tenth,))
    trained.curve.insert(0, point_of(0, spent, first))
    last = variables_of(trained.state)
    tuning = NO_LOSS if trained.diverged else figures(config, last, at.tuning(), at.forced)["nats"]
    row = _row(at, config, steps, trained, step0=first, tuning_nats=tuning, **more)
    if tenth in trained.asked:
        row["tenth"] = {"steps": tenth, **trained.asked[tenth]}
    return row


def _spent(source: dict[str, Any]) -> Spent:
    return Spent(source["flops"], source["model_flops"], source["tokens"])


def _on(at: _Place) -> dict[str, Any]:
    """The source trained on: from the last point to the end of the budget, from others for a tenth at its rate.

    Its gates free and its passes paid for, or all of them forced.
    """
    setting, point, source = at.setting, at.wanted.point, at.source()
    variables = checkpoint.load(at.source_place, abstract(setting.source))
    whole = point == setting.points[-1]
    passes = budget.with_audits(setting, _computed(source))
    passes = passes if at.forced is None else np.full(len(passes), float(at.forced))
    steps = budget.further_steps(setting, _spent(source), passes) if whole else round(TENTH * source["steps"])
    decay = setting.fall(point) if whole else 0.0
    return _further(at, setting.source, at.source_place, variables, _spent(source), max(1, steps), decay, whole=whole)


def _computed(source: dict[str, Any]) -> list[float]:
    """Passes computed in each layer on the tuning part."""
    layers = len(source["passes_computed"])
    return [source["measured"][f"layer{layer}"]["passes_computed"] for layer in range(layers)]


def _grown(at: _Place) -> dict[str, Any]:
    """A child to the end of the budget: the best of its recipes on the tuning part. A control: for a tenth."""
    setting, wanted, source = at.setting, at.wanted, at.source()
    control, stacked = wanted.kind == CONTROL, wanted.kind == STACKED
    recipes = [one for one in setting.controls if one.name == wanted.recipe] if control else list(setting.recipes)
    recipes = [STACK_ONCE] if stacked else recipes
    with tempfile.TemporaryDirectory(dir=at.work) as folder:
        children = [grown(at, recipe, Path(folder) / str(number)) for number, recipe in enumerate(recipes)]
        said = [figures(config, variables, at.held_out()) for config, variables in children]
        best = 0
        if len(children) > 1:
            tuned = [figures(config, variables, at.tuning())["nats"] for config, variables in children]
            best = int(np.argmin(tuned))
        made = 0.0 if stacked else budget.making(setting, _computed(source), len(recipes))
        spent = _spent(source)._replace(flops=source["flops"] + made, model_flops=source["model_flops"] + made)
        steps = round(TENTH * source["steps"]) if control else budget.child_steps(setting, spent)
        decay = 0.0 if control else setting.fall(wanted.point)
        config, variables = children[best]
        return _further(at, config, Path(folder) / str(best), variables, spent, max(1, steps), decay,
                        recipe=recipes[best].name, source=source["final"],
                        recipes={one.name: found for one, found in zip(recipes, said, strict=True)})  # fmt: skip


def grown(at: _Place, recipe: Recipe, target: Path) -> tuple[ModelConfig, Tree]:
    """Grow the source into the checkpoint `target`, with the moments of its weights; returns config and variables."""
    setting, seed, source = at.setting, at.wanted.seed, at.setting.source
    stacked = recipe.kind == STACK
    counts = None if stacked else repetition.from_json(at.source()["measured"])
    plan = plan_of(recipe, counts, source.depth, setting.deep.depth)
    config = target_config(source.plain if stacked else source, plan)
    noise = 0.0 if recipe.kind == "once" else NOISE
    grow_checkpoint(at.source_place, target, plan=plan, carry=recipe.carry, noise_std=noise, seed=seed)
    variables = checkpoint.load(target, abstract(config))
    if recipe.new:
        variables = with_random_layers(config, variables, plan, initialise(config, seed))
    return config, variables


def child_at_growth(work: Path, text: tuple[str, ...], wanted: Wanted, recipe: Recipe) -> dict[str, Any]:
    """A source, trained, and its child by `recipe` before any training of its own: both losses, passes and spread."""
    at = _Place(work, text, wanted)
    source = _source(at)
    if source["diverged"] is not None:
        raise Failed(f"{wanted.name} has no child: {source['diverged']}")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        child = figures(*grown(at, recipe, Path(folder) / "child"), at.held_out())
    layers = [one for name, one in source["measured"].items() if name != "_meta"]
    means = {name: float(np.mean([one[name] for one in layers]))
             for name in ("passes_run", "passes_computed", "mean_weight")}  # fmt: skip
    nats = source["final"]["nats"]
    return {"steps": source["steps"], "nats": nats, "child_nats": child["nats"], "recipe": recipe.name,
            "gap_percent": 100 * (child["nats"] / nats - 1), **means, "k_exec": source["k_exec"],
            "spread_percent": 100 * source["measured"]["_meta"]["spread"], "flops": source["flops"]}  # fmt: skip
