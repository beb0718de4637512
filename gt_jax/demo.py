"""`make demo`: the whole idea on real text in a few minutes: train shallow and adaptive, measure, grow, train on.

- The source is the preset `tiny`: 8 layers that may run up to four times a token, trained on the Python library's own
  sources as bytes (`--text` for other text).
- At the end of the plateau of its learning rate it is grown to 20 layers in three ways: by the published recipe, with
  its strengths on the output tensors, and as `python -m gt_jax.grow` does by default (plan `dealt`, coefficient
  `expected`, carry `gain`). Beside them stand three baselines: the source itself, its own eight layers run once each,
  and twenty layers of random weights.
- Every model then trains on: the same batches, the same fall of the rate, and but for the random one with the second
  moments of the source's optimizer.
- Interrupted, it goes on where it stopped; run again, it gives the same losses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.configs.standing import plateau_end
from gt_jax.devices.sharding import mesh_for_rows, put_like
from gt_jax.errors import Refused, run_command
from gt_jax.evaluation.measurement import pass_counts
from gt_jax.evaluation.model_files import load
from gt_jax.files import write_atomically
from gt_jax.growth import repetition
from gt_jax.growth.plan import Plan, identity_plan, make_plan
from gt_jax.growth.provenance import grown_plan
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.growth.transform import target_config
from gt_jax.models.language_model import abstract, initialise
from gt_jax.monitoring.metrics import Recorder, read_metrics, seconds_of, table
from gt_jax.monitoring.plots import plot_depth, plot_growth
from gt_jax.text.batches import Text, open_text
from gt_jax.training.loop import Trainer, fit, make_trainer, train_run, variables_of
from gt_jax.training.moments import carried_moments
from gt_jax.training.step import evaluate
from gt_jax.typing import Tree

TARGET_LAYERS = 20
EVALUATION_BATCHES = 12
RANDOM_SEED = 1
LAST = "grown, dealt, gain + expected"
ROWS = 4


class Contender(NamedTuple):
    """A model that trains on: what it is called, what it is, where it starts, and the checkpoint of that, if any."""

    name: str
    config: ModelConfig
    variables: Tree
    start: Path | None = None


class Outcome(NamedTuple):
    """What became of one: held-out losses before and after training on, its curve, the seconds that took."""

    name: str
    layers: int
    parameters: int
    before: float
    after: float
    curve: list[tuple[float, float]]
    seconds: float


def source_config(text: Sequence[str], steps: int) -> RunConfig:
    """The adaptive source's run."""
    optimizer = OptimizerConfig(learning_rate=3e-3)
    train = TrainConfig(steps=steps, evaluate_every=0, checkpoint_every=100, optimizer=optimizer)
    data = DataConfig(text=tuple(text), sequence_length=128, batch_size=ROWS)
    return RunConfig(model=tiny(), train=train, data=data)


def further(source: TrainConfig, steps: int) -> TrainConfig:
    """Training after the growth, the same for every contender: the rate falls as it does in the source's own decay."""
    return TrainConfig(steps=steps, optimizer=source.optimizer.replace(warmup=0.0, decay=1.0))


def say(line: str) -> None:
    """One line of the story, on standard error: standard output has the table only."""
    print(line, file=sys.stderr, flush=True)


def plans(measured: repetition.Repetition, config: ModelConfig) -> dict[str, tuple[Plan, str]]:
    """The three growths to `TARGET_LAYERS` and the eight layers run once: name -> (plan, carry)."""

    def to_target(kind: str, coefficient: str) -> Plan:
        return make_plan(
            kind, measured, config.depth, round="balance", target_layers=TARGET_LAYERS, coefficient=coefficient
        )

    return {
        "grown, readme": (to_target("block", "schedule"), "weights"),
        "grown, output": (to_target("block", "schedule"), "output"),
        LAST: (to_target("dealt", "expected"), "gain"),
        "eight layers, once each": (identity_plan(config.depth), "gain"),
    }


def contenders(source: Path, output: Path, config: ModelConfig, measured: repetition.Repetition) -> list[Contender]:
    """All that trains on. Every growth is the real thing, leaf by leaf on disk; the last one to OUTPUT/grown."""
    found = []
    for name, (plan, carry) in plans(measured, config).items():
        place = output / ("grown" if name == LAST else name.replace(",", "").replace(" ", "_"))
        _grow_once(source, place, plan, carry, 1e-4 if "grown" in name else 0.0)
        found.append(Contender(name, target_config(config, plan), load(place)[1], place))
    deep = found[0].config
    return [*found, Contender("twenty random layers", deep, initialise(deep, RANDOM_SEED))]


def _grow_once(source: Path, target: Path, plan: Plan, carry: str, noise: float) -> None:
    """Grow to `target`, or find there what an earlier run of the demo grew by the same plan."""
    if target.exists():
        _, metadata = checkpoint.describe(target)
        if grown_plan(metadata) != plan:
            raise Refused(f"{target} was grown by another plan; give another --output, or remove it")
        return
    grow_checkpoint(
        source, target, plan=plan, carry=carry, noise_std=noise, seed=0, resume=True, progress=lambda line: None
    )


class Stage(NamedTuple):
    """What contenders of one shape share: compiled pieces, and where their arrays lie."""

    trainer: Trainer
    shapes: Tree


def train_on(one: Contender, stage: Stage, text: Text, position: dict[str, Any], train: TrainConfig) -> Outcome:
    """Evaluate, train `train.steps` more on the batches after `position`, evaluate again."""
    held_out, trainer = text.held_out(EVALUATION_BATCHES), stage.trainer
    curve: list[tuple[float, float]] = []
    state = trainer.new_state(put_like(one.variables, stage.shapes))  # a copy: the step donates its state
    if one.start is not None:
        moments = carried_moments(state.optimizer, state.params, one.start, checkpoint.describe(one.start)[0])
        state = state._replace(optimizer=moments)
    before = evaluate(trainer.evaluation, variables_of(state), held_out)
    start = time.monotonic()
    with Recorder(total_steps=train.steps, every=50) as recorder:
        recorder.message(f"training on: {one.name}")

        def record(step: int, metrics: dict[str, Any]) -> None:
            curve.append((step, float(metrics["loss"])))
            recorder.log(step, loss=metrics["loss"])

        state = fit(trainer, state, text.train(position), train.steps, record=record)
    seconds = time.monotonic() - start
    after = evaluate(trainer.evaluation, variables_of(state), held_out)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(one.variables["params"]))
    return Outcome(one.name, len(one.config.depth), parameters, before, after, curve, seconds)


def report(source: dict[str, Any], outcomes: Sequence[Outcome], steps: int) -> str:
    """The table: every model's held-out loss at the moment of growth, and after training on."""
    after = f"after {steps} steps"
    headers = ["model", "layers", "passes a token", "parameters", "loss at growth", "gap", after, "seconds"]
    rows = [[
        "source, adaptive", source["layers"], f"{source['passes_run']:.1f}", f"{source['parameters']:,}",
        f"{source['loss']:.4f}", "", f"{source['after']:.4f}", f"{source['seconds']:.0f}",
    ]]  # fmt: skip
    for one in outcomes:
        gap = f"{100 * (one.before / source['loss'] - 1):+.1f} %"
        rows.append([
            one.name, one.layers, f"{one.layers:.1f}", f"{one.parameters:,}", f"{one.before:.4f}", gap,
            f"{one.after:.4f}", f"{one.seconds:.0f}",
        ])  # fmt: skip
    return table(rows, headers)


def run(output: Path, text: Sequence[str], steps: int, more: int | None) -> str:
    """The demo; returns the table. Writes OUTPUT/source, grown, growth.png, depth.png, report.json and the counts."""
    began = time.monotonic()
    config = source_config(text, steps)
    place = output / "source"
    say(f"1. training the adaptive source, {config.model.layout}: eight layers, up to four passes each")
    state = train_run(place, config, resume=(place / "config.json").exists())
    trained = read_metrics(place / "metrics.jsonl")
    model, top = config.model, plateau_end(config.train)
    grows = place / str(top or steps)

    say(f"2. measuring how deep every layer wants to be, at step {grows.name}, where its rate begins to fall")
    trainer = make_trainer(model, config.train)
    reading = open_text(config.data)
    held_out = reading.held_out(EVALUATION_BATCHES)
    _, variables, metadata = load(grows)
    price = metadata["price"]
    found = pass_counts(trainer.evaluation, variables, held_out, model, source=str(grows), lambda_p=price)
    counts = output / "layer_repetition_factor.json"
    write_atomically(counts, json.dumps(found, indent=1) + "\n")
    measured = repetition.read(counts)
    layers = [found[f"layer{layer}"] for layer in range(len(model.depth))]
    weight, passes = (sum(layer[name] for layer in layers) for name in ("mean_weight", "passes_run"))
    say(f"   k_exec {' '.join(str(layer['k_exec']) for layer in layers)}; over {len(layers)} layers a token runs "
        f"{passes:.1f} passes, at a weight of {weight:.1f} in all")

    say(f"3. growing to {TARGET_LAYERS} layers, and training on")
    more = more or max(1, steps - int(grows.name))
    train = further(config.train, more)
    stages: dict[str, Stage] = {}
    outcomes = []
    for one in contenders(grows, output, model, measured):
        if one.config.layout not in stages:
            stages[one.config.layout] = Stage(make_trainer(one.config, train), abstract(one.config))
        outcomes.append(train_on(one, stages[one.config.layout], reading, metadata["data"], train))

    source = {
        "layers": len(model.depth), "passes_run": passes, "mean_weight": weight,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "loss": found["_meta"]["loss"], "after": evaluate(trainer.evaluation, variables_of(state), held_out),
        "seconds": seconds_of(trained),
    }  # fmt: skip
    _pictures(output, trained, layers, model, outcomes, int(grows.name))
    summary = {"source": source, "outcomes": [one._asdict() for one in outcomes], "seconds": time.monotonic() - began}
    write_atomically(output / "report.json", json.dumps(summary, indent=1) + "\n")
    say(f"pictures: {output / 'growth.png'}, {output / 'depth.png'}; {time.monotonic() - began:.0f} seconds in all")
    return report(source, outcomes, more)


def _pictures(
    output: Path, trained: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]], model: ModelConfig,
    outcomes: Sequence[Outcome], grown_at: int,
) -> None:  # fmt: skip
    level = outcomes[-2].before  # of the eight layers: the picture is about what happens around it
    curves: dict[str, Sequence[tuple[float, float]]] = {
        "source, adaptive": [(line["step"], line["loss"]) for line in trained if "loss" in line]
    }
    for one in outcomes:
        curves[one.name] = [(grown_at + step, loss) for step, loss in one.curve]
    plot_growth(
        curves, output / "growth.png", growth_at=grown_at, smooth=15, ylim=(0.6 * level, 2 * level),
        title="A shallow adaptive model, grown to 20 layers",
        xlabel="step", ylabel="training loss (nats a byte)",
    )  # fmt: skip
    names = [f"{kind}{layer}" for layer, kind in enumerate(model.depth.types)]
    passes = {
        "passes run, mean over tokens": [layer["passes_run"] for layer in layers],
        "mean weight": [layer["mean_weight"] for layer in layers],
        "k_exec": [float(layer["k_exec"]) for layer in layers],
    }
    plot_depth(names, passes, output / "depth.png", title="Passes each layer uses")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.demo", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--output", type=Path, default=Path("demo"), help="folder for the run, the counts and the pictures")
    p.add_argument("--text", nargs="+", default=(), help="text files instead of the Python library's sources")
    p.add_argument("--steps", type=int, default=360, help="of the source")
    p.add_argument("--more", type=int, help="steps each model trains on (as many as the source has left)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print its table."""
    arguments = parser().parse_args(argv)
    if arguments.steps < 1 or (arguments.more is not None and arguments.more < 1):
        raise Refused(f"--steps {arguments.steps} and --more {arguments.more} must be at least 1")
    with jax.set_mesh(mesh_for_rows(ROWS)):
        print(run(arguments.output, arguments.text, arguments.steps, arguments.more))
    return 0


if __name__ == "__main__":
    run_command(main)
