"""One seed of the study: the source, every operator from it, the controls; each unit kept as soon as it is done."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.growth_study import flops
from experiments.growth_study.analysis import analyse
from experiments.growth_study.engine import NO_LOSS, Engine, Losses, Run
from experiments.growth_study.operators import BLOCK, DEALT, OPERATORS, Operator, build
from experiments.growth_study.store import Store
from experiments.growth_study.study import StudyConfig, open_material
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Failed
from gt_jax.evaluation.measurement import pass_counts
from gt_jax.growth import repetition
from gt_jax.growth.plan_entries import Plan
from gt_jax.models.language_model import abstract, fixed_passes
from gt_jax.training.loop import Diverged
from gt_jax.training.price import PriceState, phase
from gt_jax.typing import Tree

SCRATCH_TOKENS, SCRATCH_FLOPS = "from scratch, equal tokens", "from scratch, equal FLOPs"
ON_TOKENS, ON_FLOPS = "source trained on, equal tokens", "source trained on, equal FLOPs"
LONGER = f"{DEALT}, for half of scratch's tokens"
CONTROLS = (ON_TOKENS, ON_FLOPS, LONGER, SCRATCH_TOKENS, SCRATCH_FLOPS)
SOURCE_SAMPLES, CONTROL_POINTS = 12, 8


class Rates(NamedTuple):
    """Learning rates, tuned at the first seed on the tuning text: from scratch, and grown and trained on for longer."""

    scratch: float
    longer: float


class Progress:
    """Lines on standard error: what is done, and how long the rest will take at this pace."""

    def __init__(self, total: float) -> None:
        self._left, self._done, self._start = total, 0.0, time.monotonic()

    def say(self, line: str) -> None:
        """One line."""
        print(line, file=sys.stderr, flush=True)

    def unit(self, name: str, cost: float, found: bool, line: str) -> None:
        """A unit of `cost` (any measure) is done; one that was `found` says nothing about the pace."""
        self._left -= cost
        self._done += 0.0 if found else cost
        spent = time.monotonic() - self._start
        left = f"; about {max(0.0, self._left) * spent / self._done / 60:.0f} min left" if self._done else ""
        self.say(f"{name}: {line}{' (found done)' if found else ''}{left}")


def costs(study: StudyConfig) -> dict[str, float]:
    """Layers x steps of every unit of one seed, for the time left."""
    layers, further = study.target_layers, study.further_steps
    total = study.source_steps + further
    shallow = 1.5 * len(study.source.depth)
    found = {"source": shallow * study.source_steps, "analysis": 4.0 * layers}
    fit = study.calibration_batches * study.calibration_iterations * layers * 8
    for one in OPERATORS:
        found[one.name] = (layers if one.plan != "once" else len(study.source.depth)) * (further + 12)
        found[one.name] += float(fit) if one.calibrated else 0.0
    equal = round(shallow / layers * study.source_steps) + further
    found |= {LONGER: layers * total / 2, ON_TOKENS: shallow * further, ON_FLOPS: layers * further}
    found[SCRATCH_TOKENS] = layers * total
    return found | {SCRATCH_FLOPS: float(layers * equal)}


class Seed:
    """All units of one seed; see `run`."""

    def __init__(self, engine: Engine, study: StudyConfig, store: Store, seed: int, progress: Progress) -> None:
        self.engine, self.study, self.store, self.seed, self.progress = engine, study, store, seed, progress
        self.material = open_material(study, seed)
        self.deep = study.source.plain.replace(layout=self._deep_layout())

    def run(self, rates: Rates | None = None) -> tuple[dict[str, Any], Rates]:
        """Every unit of this seed, made or found, and the rates, which are tuned here where they are None."""
        cost = costs(self.study)
        source, variables = self._source(cost["source"])
        units = {"source": source}
        for operator in OPERATORS:
            units[operator.name] = self._unit(operator.name, cost[operator.name],
                                              functools.partial(self._grown, operator, source, variables))
        units["analysis"] = self._unit("analysis", cost["analysis"],
                                       lambda: self._analysis(source, variables, units))
        scratch = functools.partial(self._scratch, self._equal_steps(source))
        longer = functools.partial(self._longer, source, variables)
        if rates is None:
            tried = {SCRATCH_FLOPS: self._tried("scratch", self.study.scratch_rates, cost[SCRATCH_FLOPS], scratch),
                     LONGER: self._tried("grown, longer", self.study.longer_rates, cost[LONGER], longer)}
            units["tuning"] = {name: {str(one["rate"]): one["tuning_loss"] for one in records}
                               for name, records in tried.items()}
            units |= {name: min(records, key=lambda record: record["tuning_loss"]) for name, records in tried.items()}
            rates = Rates(units[SCRATCH_FLOPS]["rate"], units[LONGER]["rate"])
        everything = self.study.source_steps + self.study.further_steps
        makers: dict[str, Callable[[], dict[str, Any]]] = {
            ON_TOKENS: lambda: self._on(self.study.further_steps, source, variables),
            ON_FLOPS: lambda: self._on(self._steps_on(source), source, variables),
            LONGER: lambda: longer(rates.longer),
            SCRATCH_TOKENS: lambda: self._scratch(everything, rates.scratch),
            SCRATCH_FLOPS: lambda: scratch(rates.scratch),
        }
        for name in CONTROLS:
            if name not in units:
                units[name] = self._unit(name, cost[name], makers[name])
        same = {unit["batches"] for name, unit in units.items()
                if name in {*(one.name for one in OPERATORS), ON_TOKENS} and not unit.get("diverged")}
        if len(same) > 1:
            raise Failed(f"seed {self.seed}: contenders were trained on {len(same)} different series of batches")
        return units, rates

    def _tried(self, name: str, rates: Sequence[float], cost: float,
               make: Callable[[float], Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A unit at each learning rate."""
        return [self._unit(f"{name} at {rate:g}", cost, functools.partial(make, rate)) for rate in rates]

    def _unit(self, name: str, cost: float, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        unit, found = self.store.unit(self.seed, name, make)
        self.progress.unit(f"seed {self.seed}, {name}", cost, found, unit["line"])
        return unit

    def _deep_layout(self) -> str:
        segment, *rest = self.study.source.depth.segments
        copies, left = divmod(self.study.target_layers, len(segment.pattern))
        if rest or left:
            raise Failed(f"layout {self.study.layout} does not repeat to {self.study.target_layers} layers")
        return f"{segment.pattern}*{copies}"

    def _step_flops(self, config: ModelConfig, passes: Any = None) -> float:
        study = self.study
        a_token = flops.training_flops(config, study.sequence_length, passes, reads_first=config.adaptive is not None)
        return a_token * study.tokens_per_step

    def _source(self, cost: float) -> tuple[dict[str, Any], Tree]:
        """The source's record and variables, from its checkpoint or by training."""
        study, place = self.study, self.store.path(self.seed, "source", "")
        found = place.exists()
        if not found:
            variables, record = self._trained_source()
            checkpoint.save(place, variables, {"kind": "study", "config": study.source.to_json(), "record": record})
        variables = checkpoint.load(place, abstract(study.source))
        record = checkpoint.describe(place)[1]["record"]
        self.progress.unit(f"seed {self.seed}, source", cost, found, record["line"])
        return record, variables

    def _trained_source(self) -> tuple[Tree, dict[str, Any]]:
        study, engine, config = self.study, self.engine, self.study.source
        every = max(1, study.source_steps // SOURCE_SAMPLES)
        points = {*range(every, study.source_steps, every), study.source_steps}
        run = engine.train(config, engine.fresh(config, self.seed), self.material.text.train(), study.source_steps,
                           study.source_rate, points=sorted(points), held_out=self.material.evaluation[:2],
                           price=study.price,
                           say=lambda line: self.progress.say(f"seed {self.seed}, source: {line}"))  # fmt: skip
        measured = pass_counts(engine.evaluation(config), run.variables, self.material.measuring, config,
                           lambda_p=float(run.price.value))  # fmt: skip
        counts = repetition.from_json(measured)
        adaptive = engine.losses(config, run.variables, self.material.evaluation)
        fixed = engine.losses(config, run.variables, self.material.evaluation,
                              fixed_passes(jnp.asarray(counts.k_exec, jnp.int32)))  # fmt: skip

        assert config.adaptive is not None and isinstance(run.price, PriceState)
        most = config.adaptive.max_passes

        def forced(step: int) -> int:
            return int(phase(study.price, jnp.asarray(step - 1, jnp.int32), study.source_steps, most).control.forced)

        samples = {step: one.passes for step, one in run.losses.items()}
        passes = flops.passes_by_step(samples, study.source_steps, forced)
        weight = sum(sum(layer.survival) for layer in counts.layers) / len(counts.layers)
        return run.variables, {
            "measured": measured, "adaptive": adaptive._asdict(), "fixed": fixed._asdict(), "curve": run.curve,
            "loss": adaptive.mean, "seconds": run.seconds, "batches": run.batches,
            "flops": sum(self._step_flops(config, row) for row in passes), "parameters": size(run.variables),
            "price": [float(run.price.value), int(run.price.high_steps)],
            "separation": self.material.separation,
            "line": f"loss {adaptive.mean:.4f}, mean weight {weight:.2f}, k_exec {counts.k_exec}, fixed "
                    f"{100 * (fixed.mean / adaptive.mean - 1):+.2f} %, {run.seconds:.0f} s",
        }  # fmt: skip

    def _position(self, batches: int) -> Any:
        """The training stream after so many batches."""
        stream = self.material.text.train()
        stream.restore({**stream.state(), "batches": batches})
        return stream

    def _longer(self, source: Mapping[str, Any], variables: Tree, rate: float) -> dict[str, Any]:
        """The dealt model trained on for half of what the model from scratch is given, evaluated often."""
        steps = (self.study.source_steps + self.study.further_steps) // 2
        operator = next(one for one in OPERATORS if one.name == DEALT)
        return self._grown(operator, source, variables, steps, (0, *self._control_points(steps)), rate)

    def _grown(self, operator: Operator, source: Mapping[str, Any], variables: Tree, steps: int | None = None,
               points: Sequence[int] | None = None, rate: float | None = None) -> dict[str, Any]:
        """Grow, and train on for `steps` at `rate`, evaluated at `points`; what is None is the study's."""
        study = self.study
        steps, points = steps or study.further_steps, points or study.points
        counts = repetition.from_json(source["measured"])
        calibration = self.material.calibration if operator.calibrated else []
        passes = source["adaptive"]["passes"]
        grown = build(operator, study, variables, counts, self.seed, calibration, passes, self.engine.fresh)
        record = self._trained(grown.config, grown.variables, self._position(study.source_steps), steps,
                               rate or study.further_rate, points)  # fmt: skip
        first = record["losses"]["0"]
        gap = 100 * (Losses(**first).mean / source["loss"] - 1)
        step = self._step_flops(grown.config)
        return {
            **record, "what": operator.what, "seconds_growth": grown.seconds, "flops_growth": grown.cost,
            "flops": step * steps, "plan": grown.plan.to_json(), "calibration": grown.report,
            "line": f"gap {gap:+.2f} %, {Losses(**first).mean:.4f} -> {record['final']:.4f}, "
                    f"{grown.seconds + record['seconds']:.0f} s",
        }  # fmt: skip

    def _trained(self, config: ModelConfig, variables: Tree, batches: Any, steps: int, rate: float, points: Any,
                 **how: Any) -> dict[str, Any]:
        """Train and record; a loss that is not finite is a result too."""
        record: dict[str, Any] = {"layers": len(config.depth), "layout": config.layout, "steps": steps, "rate": rate,
                                  "parameters": size(variables), "diverged": None}  # fmt: skip
        try:
            run: Run = self.engine.train(config, variables, batches, steps, rate, points=points,
                                         held_out=self.material.evaluation, **how)  # fmt: skip
        except Diverged as error:
            first = self.engine.losses(config, variables, self.material.evaluation)
            return record | {"diverged": str(error), "losses": {"0": first._asdict()}, "final": NO_LOSS,
                             "tuning_loss": NO_LOSS, "curve": [], "seconds": 0.0, "batches": ""}  # fmt: skip
        losses = {str(step): one._asdict() for step, one in run.losses.items()}
        tuning = self.engine.losses(config, run.variables, self.material.tuning).mean
        return record | {"losses": losses, "final": run.losses[steps].mean, "tuning_loss": tuning, "curve": run.curve,
                         "seconds": run.seconds, "batches": run.batches}  # fmt: skip

    def _control_points(self, steps: int) -> list[int]:
        return sorted({max(1, round(steps * part / CONTROL_POINTS)) for part in range(1, CONTROL_POINTS + 1)})

    def _scratch(self, steps: int, rate: float) -> dict[str, Any]:
        variables = self.engine.fresh(self.deep, self.seed)
        record = self._trained(self.deep, variables, self.material.text.train(), steps, rate,
                               self._control_points(steps))  # fmt: skip
        return record | {"flops": self._step_flops(self.deep) * steps,
                         "line": f"loss {record['final']:.4f} after {steps} steps at {rate:g}"}

    def _on(self, steps: int, source: Mapping[str, Any], variables: Tree) -> dict[str, Any]:
        value, high = source["price"]
        price = PriceState(jnp.float32(value), jnp.int32(high))
        points, settled = sorted({0, *self._control_points(steps)}), self.study.settled_price
        record = self._trained(self.study.source, variables, self._position(self.study.source_steps), steps,
                               self.study.further_rate, points, price=settled, at_price=price)  # fmt: skip
        samples = {int(step): one["passes"] for step, one in record["losses"].items()}
        passes = flops.passes_by_step(samples, steps, lambda step: 2 if step % settled.audit_every == 0 else 0)
        return record | {"flops": sum(self._step_flops(self.study.source, row) for row in passes),
                         "line": f"loss {record['final']:.4f} after {steps} more steps"}

    def _equal_steps(self, source: Mapping[str, Any]) -> int:
        """Steps from scratch that cost what the source, measuring it, and the steps of its grown model cost."""
        before = source["flops"] + self._measuring_flops(source)
        return round(before / self._step_flops(self.deep)) + self.study.further_steps

    def _measuring_flops(self, source: Mapping[str, Any]) -> float:
        study = self.study
        return flops.measuring_flops(study.source, study.sequence_length, source["adaptive"]["passes"],
                                     study.measuring_batches * study.tokens_per_step)  # fmt: skip

    def _steps_on(self, source: Mapping[str, Any]) -> int:
        """Steps of the source that cost what measuring it and the further steps of the grown model cost."""
        mine = self._step_flops(self.study.source, source["adaptive"]["passes"])
        grown = self.study.further_steps * self._step_flops(self.deep) + self._measuring_flops(source)
        return max(1, round(grown / mine))

    def _analysis(self, source: Mapping[str, Any], variables: Tree, units: Mapping[str, Any]) -> dict[str, Any]:
        losses = {"adaptive": source["loss"], "fixed": Losses(**source["fixed"]).mean}
        grown = {name: (Plan.from_json(units[name]["plan"]), Losses(**units[name]["losses"]["0"]).mean)
                 for name in (BLOCK, DEALT)}  # fmt: skip
        counts = repetition.from_json(source["measured"])
        found = analyse(self.engine, self.study, variables, counts, self.material.evaluation, losses, grown)
        parts = (f"{name}: tail {one['tail']:+.2f} %, order {one['order']:+.2f} %"
                 for name, one in found["models"].items())  # fmt: skip
        return found | {"line": "; ".join((f"spread {found['spread']:+.2f} %", *parts))}


def size(variables: Tree) -> int:
    """Parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
