"""`make demo`: the whole idea in a few minutes: a layer that decides how often it runs, measured, grown, trained on.

- The task is pointer jumps: a permutation is written down, then followed; the d-th jump takes d look-ups, one behind
  another. One layer, run once, has one. The source is the preset `one_layer`, which may run up to four times a token.
- Beside it trains the same layer without passes. Both see the same instances, none of which is evaluated on.
- At the end of the plateau of its learning rate the source is grown to four layers: each copy at the full strength of
  its pass, or at the mean over tokens, or with a gate that gives each token the strength that the source would. Beside
  them stand four random layers.
- Every model then trains on: the same batches, the same fall of the rate, and but for the random one with the second
  moments of the source's optimizer.
- Interrupted, it goes on where it stopped; run again, it gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.presets import one_layer
from gt_jax.configs.price import budget
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.configs.standing import plateau_end
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.devices.sharding import mesh_for_rows, put_like
from gt_jax.errors import Refused, deliver, run_command, say
from gt_jax.evaluation.answer_table import answer_table
from gt_jax.evaluation.measurement import pass_counts
from gt_jax.evaluation.model_files import load
from gt_jax.files import local_path, write_atomically
from gt_jax.growth import repetition
from gt_jax.growth.kept_gates import keeping_gates
from gt_jax.growth.plan import Plan, make_plan
from gt_jax.growth.provenance import grown_plan
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.growth.transform import target_config
from gt_jax.models.language_model import abstract, initialise
from gt_jax.monitoring.answer_plots import panel_of, plot_by_difficulty
from gt_jax.monitoring.metrics import Recorder, read_metrics, seconds_of, table
from gt_jax.monitoring.plots import plot_growth
from gt_jax.options import whole
from gt_jax.tasks.registry import read_task
from gt_jax.text.batches import Batch
from gt_jax.text.data import open_data
from gt_jax.training.loop import Trainer, fit, make_trainer, train_run, variables_of
from gt_jax.training.moments import carried_moments
from gt_jax.typing import Tree

TASK = "pointer_jumps:hardest=4,symbols=8,queries=4"
STEPS = 1200
RATE, RAMP, FORCED, DECAY = 2e-3, 0.6, 0.7, 0.15
EVALUATION_BATCHES = 12
RANDOM_SEED, NOISE = 1, 1e-4
ONCE, ADAPTIVE = "one layer, once", "one layer, adaptive"
LAST = "grown, full strength"
ROWS = 32

Answers = dict[str, Any]
Held = Sequence[Batch]


class Contender(NamedTuple):
    """A model that trains on: what it is called, what it is, where it starts, and the checkpoint of that, if any."""

    name: str
    config: ModelConfig
    variables: Tree
    start: Path | None = None


class Outcome(NamedTuple):
    """What became of one: answers before and after training on (`answer_table`), its curve, the seconds that took."""

    name: str
    layers: int
    passes: float
    before: Answers
    after: Answers
    curve: list[tuple[float, float]]
    seconds: float


def source_config(model: ModelConfig, steps: int, passes: int) -> RunConfig:
    """The run of the adaptive source, which is shown all its `passes` first, or of the same layer without passes."""
    price = budget(None, value=0.02, forced_passes=passes, forced_ramp=RAMP, forced_until=FORCED, price_from=FORCED,
                   clipped_until=FORCED)  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=RATE, weight_decay=0.01, decay=DECAY, halting_scale=10.0)
    train = TrainConfig(steps=steps, evaluate_every=0, checkpoint_every=max(1, steps // 4), optimizer=optimizer,
                        price=price)  # fmt: skip
    data = DataConfig(tasks=(TASK,), sequence_length=read_task(TASK).longest, batch_size=ROWS,
                      curriculum_rows=round(RAMP * steps) * ROWS)  # fmt: skip
    return RunConfig(model=model, train=train, data=data)


def further(source: TrainConfig, steps: int) -> TrainConfig:
    """Training after the growth, the same for every contender: the rate falls as it does in the source's own decay."""
    return TrainConfig(steps=steps, optimizer=source.optimizer.replace(warmup=0.0, decay=1.0))


def plans(measured: repetition.Repetition, config: ModelConfig) -> dict[str, Plan]:
    """The growths by name. `mean strength` is what the command does by default."""
    mean, full = (make_plan("layer", measured, config.depth, coefficient=coefficient)
                  for coefficient in ("expected", "schedule"))  # fmt: skip
    return {"grown, mean strength": mean, LAST: full, "grown, gates kept": keeping_gates(full, measured.alpha)}


def contenders(source: Path, output: Path, config: ModelConfig, measured: repetition.Repetition) -> list[Contender]:
    """All that trains on. Every growth is the real thing, leaf by leaf on disk; the last one to OUTPUT/grown."""
    found = []
    for name, plan in plans(measured, config).items():
        place = output / ("grown" if name == LAST else name.replace(",", "").replace(" ", "_"))
        _grow_once(source, place, plan)
        found.append(Contender(name, target_config(config, plan), load(place)[1], place))
    deep = found[1].config
    return [*found, Contender(f"{len(deep.depth)} random layers", deep, initialise(deep, RANDOM_SEED))]


def _grow_once(source: Path, target: Path, plan: Plan) -> None:
    """Grow to `target`, or find there what an earlier run of the demo grew by the same plan."""
    if target.exists():
        _, metadata = checkpoint.describe(target)
        if grown_plan(metadata) != plan:
            raise Refused(f"{target} was grown by another plan; give another --output, or remove it")
        return
    grow_checkpoint(source, target, plan=plan, carry="gain", noise_std=NOISE, seed=0, resume=True,
                    progress=lambda line: None)  # fmt: skip


class Stage(NamedTuple):
    """What contenders of one shape share: compiled pieces, and where their arrays lie."""

    trainer: Trainer
    shapes: Tree


def asked(config: ModelConfig, variables: Tree, held_out: Held, forced: Sequence[int] | None = ()) -> Answers:
    """Right answers, loss and passes on held-out instances; `forced` None tries every number of passes."""
    return answer_table(config, variables, held_out, forced=forced, cuts=False).to_json()


def train_on(one: Contender, stage: Stage, batches: Iterator[Batch], held_out: Held, train: TrainConfig) -> Outcome:
    """Ask, train `train.steps` more on `batches`, ask again."""
    trainer = stage.trainer
    curve: list[tuple[float, float]] = []
    state = trainer.new_state(put_like(one.variables, stage.shapes))  # a copy: the step donates its state
    if one.start is not None:
        moments = carried_moments(state.optimizer, state.params, one.start, checkpoint.describe(one.start)[0])
        state = state._replace(optimizer=moments)
    before = asked(one.config, variables_of(state), held_out)
    start = time.monotonic()
    with Recorder(total_steps=train.steps, every=50) as recorder:
        recorder.message(f"training on: {one.name}")

        def record(step: int, metrics: dict[str, Any]) -> None:
            curve.append((step, float(metrics["loss"])))
            recorder.log(step, loss=metrics["loss"])

        state = fit(trainer, state, batches, train.steps, record=record)
    seconds = time.monotonic() - start
    layers, after = len(one.config.depth), asked(one.config, variables_of(state), held_out)
    return Outcome(one.name, layers, layers, before, after, curve, seconds)


def report(outcomes: Sequence[Outcome], more: int) -> str:
    """The table: right answers and loss of every model at the moment of growth, and after training on."""
    difficulties = list(outcomes[0].before["accuracy"])
    headers = ["model", "layers", "passes", *(f"{d} look-up{'s' * (d != '1')}" for d in difficulties), "loss",
               f"{difficulties[-1]} after {more} steps", "loss"]  # fmt: skip

    def percent(share: float) -> str:
        return f"{100 * share:.0f} %"

    rows = [[one.name, one.layers, f"{one.passes:.1f}", *map(percent, one.before["accuracy"].values()),
             f"{one.before['nats']:.4f}", percent(one.after["accuracy"][difficulties[-1]]),
             f"{one.after['nats']:.4f}"] for one in outcomes]  # fmt: skip
    return table(rows, headers)


def story(free: Mapping[str, Any]) -> None:
    """What the source does at the moment of growth: passes by difficulty, and what forced ones get right."""
    line = ", ".join(f"{one:.2f} for {d}" for d, one in free["passes"].items())
    rho = free["spearman"]
    say(f"   passes a token: {line} look-ups" + ("" if rho is None else f" (Spearman's correlation {rho:.2f})"))
    for count, right in free["accuracy_forced"].items():
        said = " ".join(f"{100 * share:.0f}" for share in right.values())
        say(f"   {count} pass{'es' * (count != '1')} forced: right at {said} %")


class Trained(NamedTuple):
    """A finished run, and the checkpoint at the end of its plateau."""

    place: Path
    at: Path
    state: Any
    metrics: list[dict[str, Any]]


def trained(place: Path, config: RunConfig) -> Trained:
    """Train, or go on with what an earlier run of the demo began."""
    state = train_run(place, config, resume=(place / "config.json").exists())
    return Trained(place, place / str(plateau_end(config.train) or config.train.steps), state,
                   read_metrics(place / "metrics.jsonl"))  # fmt: skip


def run(output: Path, steps: int) -> tuple[str, dict[str, Callable[[], object]]]:
    """The demo; returns the table, and what draws the pictures OUTPUT/growth.png and depth.png.

    Writes OUTPUT/source, grown, report.json and the counts.
    """
    began = time.monotonic()
    model = one_layer()
    passes = 1 if model.adaptive is None else model.adaptive.max_passes
    config, plain = source_config(model, steps, passes), source_config(model.plain, steps, passes)
    say(f"1. training one {model.layout} layer that runs once, on {TASK}")
    shallow = trained(output / "plain", plain)
    say("2. training the same layer with up to four passes a token")
    source = trained(output / "source", config)

    say(f"3. measuring how deep it wants to be, at step {source.at.name}, where its rate begins to fall")
    data, trainer = open_data(config.data), make_trainer(model, config.train)
    _, variables, metadata = load(source.at)
    held_out = data.held_out(EVALUATION_BATCHES)
    free = asked(model, variables, held_out, None)
    story(free)
    found = pass_counts(trainer.evaluation, variables, held_out, model,
                        source=str(source.at), lambda_p=metadata["price"])  # fmt: skip
    counts = output / "layer_repetition_factor.json"
    write_atomically(counts, json.dumps(found, indent=1) + "\n")

    say("4. growing, and training on")
    more = steps - int(source.at.name)
    train = further(config.train, max(1, more))
    stages: dict[ModelConfig, Stage] = {}
    outcomes = []
    for one in contenders(source.at, output, model, repetition.read(counts)):
        if one.config not in stages:
            stages[one.config] = Stage(make_trainer(one.config, train), abstract(one.config))
        outcomes.append(train_on(one, stages[one.config], data.train(metadata["data"]), held_out, train))
    run_on = [_run_on(ONCE, shallow, model.plain, held_out), _run_on(ADAPTIVE, source, model, held_out, free)]
    outcomes = [*run_on, *outcomes]
    summary = {"task": TASK, "outcomes": [one._asdict() for one in outcomes], "seconds": time.monotonic() - began}
    write_atomically(output / "report.json", json.dumps(summary, indent=1) + "\n")
    say(f"pictures: {output / 'growth.png'}, {output / 'depth.png'}; {time.monotonic() - began:.0f} seconds in all")
    return report(outcomes, more), _pictures(output, free, outcomes, int(source.at.name))


def _run_on(name: str, done: Trained, config: ModelConfig, held_out: Held, free: Answers | None = None) -> Outcome:
    """A run as an outcome: what it was at the end of its plateau, and at its end."""
    before = free or asked(config, load(done.at)[1], held_out)
    curve = [(line["step"], line["loss"]) for line in done.metrics if "loss" in line]
    return Outcome(name, len(config.depth), sum(before["passes"].values()) / len(before["passes"]), before,
                   asked(config, variables_of(done.state), held_out), curve, seconds_of(done.metrics))  # fmt: skip


def _pictures(
    output: Path, free: Answers, outcomes: Sequence[Outcome], grown_at: int
) -> dict[str, Callable[[], object]]:
    """What draws each picture, by its name: the table does not wait for them, and is not lost with them."""
    curves = {one.name: one.curve if one.name in (ONCE, ADAPTIVE) else
              [(grown_at + step, loss) for step, loss in one.curve] for one in outcomes}  # fmt: skip
    growth, depth = output / "growth.png", output / "depth.png"

    def draw_growth() -> None:
        plot_growth(curves, growth, growth_at=grown_at, smooth=15, ylim=(0.0, 2.6),
                    title="A layer that runs up to four times, grown to four layers",
                    xlabel="step", ylabel="training loss (nats an answer)")  # fmt: skip

    def draw_depth() -> None:
        plot_by_difficulty([panel_of(free, "right answers by the look-ups they take")], depth)

    return {str(growth): draw_growth, str(depth): draw_depth}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.demo", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--output", type=local_path, default=Path("demo"),
                   help="folder for the run, the counts and the pictures")
    p.add_argument("--steps", type=whole, default=STEPS, help=f"of each training ({STEPS})")
    add_cache_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print its table."""
    arguments = parser().parse_args(argv)
    if arguments.steps < 20:
        raise Refused(f"--steps {arguments.steps} must be at least 20")
    keep_programs(arguments)
    with jax.set_mesh(mesh_for_rows(ROWS)):
        deliver(*run(arguments.output, arguments.steps))
    return 0


if __name__ == "__main__":
    run_command(main)
