"""`python -m gt_jax.verify SRC DST`: did the growth keep what was learned? The same batches through both models.

    python -m gt_jax.verify runs/a grown --picture verify.png
    python -m gt_jax.verify runs/a grown --text story.txt --curve 100 --json

- The source's loss with its own adaptive passes and with passes fixed at k_exec, the target's loss, KL divergence,
  top-1 agreement, logit cosine.
- By target layer, beside the pass of the source that it stands for: |dh|/|h|, the largest singular value of the layer's
  Jacobian, router entropy, KL of the routers, null rate.
- Any two models of one vocabulary can be compared. Where DST was not grown from SRC, no layer stands for a pass: then
  the source's columns are empty, and the report says why.
- Several processes share the work: the same command with --coordinator HOST:PORT --processes N --process I in each.
- Thresholds: a loss less than 3 % above the source's is good, less than 10 % usable; a cosine above 0.995 is good.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.comparison import COSINE, GOOD, USABLE, compare_models
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices.flags import add_device_flags, mesh_of, wrong_process_flags
from gt_jax.devices.processes import Team, joined
from gt_jax.devices.sharding import Rules, current_sizes, everywhere, mesh_for_rows
from gt_jax.errors import Refused, refuse_all, run_command
from gt_jax.growth.plan import Plan
from gt_jax.growth.provenance import grown_plan, other_values
from gt_jax.loading import add_text_arguments, data_config, text_config
from gt_jax.models.language_model import abstract
from gt_jax.monitoring.metrics import table, to_json
from gt_jax.text.batches import Text, open_text
from gt_jax.text.tokenizers import other_tokens, tokenizer_of
from gt_jax.training.divisibility import indivisible_fields
from gt_jax.training.loop import fit, make_trainer, variables_of
from gt_jax.training.step import evaluate
from gt_jax.typing import Tree

__all__ = ["compare_models", "report_lines", "verify"]

TOKENS = ("statistics/embedding/token_bytes", "statistics/embedding/token_length")
Say = Callable[[str], None]


class Checkpoint(NamedTuple):
    """One of the two, before its values are read."""

    path: Path
    place: Path
    config: ModelConfig
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def load(self) -> Tree:
        """The variables on the current mesh."""
        return checkpoint.load(self.place, abstract(self.config))


def verify(
    source: Path, target: Path, *, text: Sequence[str] = (), tfds: str | None = None, tfds_dir: str | None = None,
    batches: int = 8, jacobian_rows: int | None = None, jacobian_iterations: int = 20, curve: int = 0,
    say: Say = lambda line: None, team: Team | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare two checkpoints on held-out text (default: the source's own); numbers that are not finite as strings.

    `jacobian_rows` None is as few as the mesh can cut, one on one device; 0 leaves the singular values out. `curve` > 0
    trains the target so many steps more, on the text's training part, with a fresh optimizer. Every process of the
    `team` calls it, on a mesh of the devices of all. Raises `Refused` before anything is computed.
    """
    team = team or Team()
    rows = Rules().shards("batch") if jacobian_rows is None else jacobian_rows
    named: dict[str, Any] = {"text": tuple(text), "tfds": tfds, "tfds_dir": tfds_dir}

    def prepare() -> tuple[Checkpoint, Checkpoint, Text, Plan | None, str | None]:
        if batches < 1:
            raise Refused(f"--batches is {batches}; at least one is needed")
        if curve < 0:
            raise Refused(f"--curve is {curve}; name a number of steps, 0 trains none")
        shallow, deep = open_checkpoint(source), open_checkpoint(target)
        refuse_all(incomparable(shallow, deep), f"{source} and {target} cannot be compared:")
        reading = open_text(data_config(shallow.metadata, named if any(named.values()) else None))
        _refuse_rows(reading, shallow, deep, rows, jacobian_iterations)
        return shallow, deep, reading, *plan_between(shallow, deep)

    shallow, deep, reading, plan, reason = team.agree(prepare)
    held_out, rules, variables = reading.held_out(batches), Rules(), deep.load()
    result = compare_models(
        shallow.config, shallow.load(), deep.config, variables, plan, held_out, rules, say=say,
        jacobian_rows=rows, jacobian_iterations=jacobian_iterations,
    )  # fmt: skip
    notes = [*([] if reason is None else [reason]), *result.pop("notes")]
    more: dict[str, Any] = {}
    if curve:
        position = None if any(named.values()) else shallow.metadata.get("data")
        more["curve"] = train_curve(deep.config, variables, reading, position, curve, held_out, _rate(shallow), say)
    whole = {"source": str(source), "target": str(target), "text": reading.summary(), "notes": notes, **result, **more}
    return _finite(whole)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint, or a run's newest, at `path`; raises `Refused` where there is none."""
    place = checkpoint.resolve(path)
    leaves, metadata = checkpoint.describe(place)
    return Checkpoint(path, place, checkpoint.model_config(place, leaves, metadata), metadata, leaves)


def incomparable(source: Checkpoint, target: Checkpoint) -> list[str]:
    """Why the two do not speak of the same tokens."""
    if source.config.vocab != target.config.vocab:
        return [f"vocab is {source.config.vocab} in {source.path} and {target.config.vocab} in {target.path}"]
    if not all(path in one.tensors for path in TOKENS for one in (source, target)):  # a table knows no bytes
        known, named = tokenizer_of(source.metadata), tokenizer_of(target.metadata)
        differ = None if known is None or named is None else other_tokens(known, named)
        return [f"{target.path} was trained with another tokenizer than {source.path}: {differ}"] if differ else []
    (text, length), (other, other_length) = (
        [checkpoint.load_paths(one.place, TOKENS)[path] for path in TOKENS] for one in (source, target)
    )
    width = min(text.shape[1], other.shape[1])  # a model may keep fewer bytes of a long token
    same = (text[:, :width] == other[:, :width]).all(axis=1)
    same &= np.minimum(length, width) == np.minimum(other_length, width)
    if same.all():
        return []
    return [f"{np.count_nonzero(~same)} of {len(same)} tokens stand for other bytes ({TOKENS[0]}), the first is token "
            f"{int(np.argmin(same))}; compare models of one tokenizer"]  # fmt: skip


def _refuse_rows(reading: Text, source: Checkpoint, target: Checkpoint, rows: int, iterations: int) -> None:
    size, cuts, wrong = reading.config.batch_size, Rules().shards("batch"), []
    if not 0 <= rows <= size:
        wrong.append(f"--jacobian-rows is {rows}; a batch has {size} rows, and 0 leaves the Jacobians out")
    elif rows % cuts:
        wrong.append(f"--jacobian-rows is {rows}; the mesh cuts rows in {cuts}")
    if iterations < 2:
        wrong.append(f"--jacobian-iterations is {iterations}; at least 2 are needed to see how far they have come")
    for one in (source, target):
        wrong += [f"{one.path}: {line}" for line in indivisible_fields(one.config, size, current_sizes(), Rules())]
    refuse_all(wrong, "this cannot be verified:")


def plan_between(source: Checkpoint, target: Checkpoint) -> tuple[Plan | None, str | None]:
    """The plan by which `target` was grown from `source`, or None and why its layers stand for no pass of that one."""
    plan, wrong = grown_plan(target.metadata), None
    if plan is None:
        return None, f"{target.path} was not grown (its metadata has no grown_from): no layer stands for a pass"
    if plan.source_layout != source.config.depth:
        wrong = f"one of layout {plan.source_layout}; {source.path} has {source.config.layout}"
    elif plan.target_layout != target.config.depth:
        wrong = f"one by a plan for layout {plan.target_layout}; it has {target.config.layout} now"
    elif (found := other_values(target.metadata, source.place)) is not None:
        grown = target.metadata["grown_from"]
        wrong = (f"{grown.get('source')}, whose values are others (hash {grown['content_hash'][:12]}; {source.path}: "
                 f"{found[:12]})")  # fmt: skip
    return (plan, None) if wrong is None else (
        None, f"{target.path} was grown from another source, {wrong}: no layer stands for a pass")  # fmt: skip


def _rate(source: Checkpoint) -> OptimizerConfig:
    """The optimizer that the source was trained with, the default for a source without a run."""
    run = source.metadata.get("run")
    return OptimizerConfig() if run is None else RunConfig.from_json(run).train.optimizer


def train_curve(
    config: ModelConfig, variables: Tree, text: Text, position: dict[str, Any] | None, steps: int,
    held_out: Sequence[Any], optimizer: OptimizerConfig, say: Say = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Training losses of `steps` steps with a fresh optimizer on the batches after `position`, and the loss after them.

    The schedule is `optimizer`'s over these steps, warm-up included. The variables are used up.
    """
    rules, trainer = Rules(), make_trainer(config, TrainConfig(steps=steps, optimizer=optimizer))
    batches = (everywhere(batch, rules) for batch in text.train(position))
    losses: list[list[float]] = []

    def record(step: int, metrics: dict[str, Any]) -> None:
        losses.append([step, float(metrics["loss"])])
        if step % max(1, steps // 10) == 0:
            say(f"training on: step {step}/{steps}, loss {float(metrics['loss']):.4f}")

    state = fit(trainer, trainer.new_state(variables), batches, steps, record=record)
    after = evaluate(trainer.evaluation, variables_of(state), [everywhere(batch, rules) for batch in held_out])
    return {"steps": steps, "learning_rate": optimizer.learning_rate, "loss": losses, "held_out_loss": after}


def _finite(value: Any) -> Any:
    """JSON values all the way down; NaN and infinities as the strings that `float` reads back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else to_json(value)


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines for a reader."""
    fixed = result["source_fixed_loss"]
    beside = "" if fixed is None else f", {float(fixed):.4f} at fixed k_exec"
    lines = [
        *(f"note: {note}" for note in result.get("notes", ())),
        f"loss of the source: {float(result['source_loss']):.4f} adaptive{beside}",
        f"loss of the {'grown model' if fixed is not None else 'target'}: {float(result['target_loss']):.4f}, "
        f"gap {100 * float(result['gap']):+.2f} % ({result['verdict']}; "
        f"below {100 * GOOD:.0f} % is good, below {100 * USABLE:.0f} % usable)",
        f"KL {float(result['kl']):.4f} nats, same top token {100 * float(result['same_top1']):.1f} %, "
        f"logit cosine {float(result['cosine']):.4f} ({_cosine(result)})",
    ]
    if (how := result["jacobian"]) is not None:
        lines.append(f"singular values: {how['rows']} row{'s' * (how['rows'] != 1)} of {how['tokens']} tokens, "
                     f"{how['iterations']} iterations, the last moved them by at most "
                     f"{100 * float(how['relative_change']):.1g} %")  # fmt: skip
    if "curve" in result:
        curve = result["curve"]
        lines.append(f"trained on for {curve['steps']} steps: training loss {float(curve['loss'][0][1]):.4f} to "
                     f"{float(curve['loss'][-1][1]):.4f}, held out {float(curve['held_out_loss']):.4f}")  # fmt: skip
    return [*lines, "", _layer_table(result)]


def _cosine(result: dict[str, Any]) -> str:
    return f"good, above {COSINE}" if result["cosine_verdict"] == "good" else f"wanted: above {COSINE}"


FIGURES = (("delta_ratio", "|dh|/|h|"), ("jacobian", "singular v."), ("router_entropy", "entropy"), ("router_kl", "KL"),
           ("null_rate", "nulls"))  # fmt: skip


def _layer_table(result: dict[str, Any]) -> str:
    """One line a target layer: each figure that the pair has, then that of the source's pass."""
    layers = result["layers"]
    headers = ["layer", "type", "source", "coefficient"]
    rows = [[one["target"], one["type"], _stands_for(one),
             None if one["coefficient"] is None else f"{one['coefficient']:.3f}"] for one in layers]  # fmt: skip
    for name, header in FIGURES:
        for key, title in ((name, header), (f"source_{name}", "of the source")):
            if all(one.get(name) is None for one in layers) or key == "source_router_kl":
                continue
            headers.append(title)
            for row, one in zip(rows, layers, strict=True):
                row.append(None if one[key] is None else f"{float(one[key]):.3f}")
    return table(rows, headers)


def _stands_for(layer: dict[str, Any]) -> str | None:
    if layer["source"] is None:
        return None
    if not layer["copy"]:
        return "identity"
    ran = "" if layer["source_delta_ratio"] is not None else ", did not run"
    return f"{layer['source']}, pass {layer['copy']}{ran}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("source", type=Path, help="the adaptive checkpoint")
    p.add_argument("target", type=Path, help="the checkpoint grown from it, or any of the same vocabulary")
    add_text_arguments(p)
    p.add_argument("--jacobian-rows", type=int, metavar="N",
                   help="rows of text for the singular values of the layers (as few as the mesh can cut, 1 on one "
                   "device); 0 leaves them out")  # fmt: skip
    p.add_argument("--jacobian-iterations", type=int, default=20, metavar="N", help="of the power iteration (20)")
    p.add_argument("--curve", type=int, default=0, metavar="STEPS",
                   help="train the target so many steps more, in memory, and report the losses")  # fmt: skip
    p.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the figures by layer")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_device_flags(p)
    return p


def _refuse_picture(path: Path | None) -> None:
    """What keeps the picture from being written, before any work is done."""
    if path is None:
        return
    if path.exists():
        raise Refused(f"--picture {path} exists; name a new file")
    if path.suffix.lower() != ".png":
        raise Refused(f"--picture {path}: pictures are PNG; name it {path.with_suffix('.png').name}")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise Refused(f"--picture {path}: {path.parent} is not a folder that can be written to")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 0 whatever the verdict."""
    arguments = parser().parse_args(argv)
    refuse_all(wrong_process_flags(arguments), "these arguments do not go together:")
    with joined(arguments) as team:
        _verify(arguments, team)
    return 0


def _verify(arguments: argparse.Namespace, team: Team) -> None:
    """Everything after the command line, in each process of the team; the first one prints and draws."""
    team.agree(lambda: _refuse_picture(arguments.picture))
    named = text_config(arguments) or {}
    with jax.set_mesh(team.agree(lambda: mesh_of(arguments)) or mesh_for_rows(1)):
        result = verify(
            arguments.source, arguments.target, batches=arguments.batches, jacobian_rows=arguments.jacobian_rows,
            jacobian_iterations=arguments.jacobian_iterations, curve=arguments.curve, **named, team=team,
            say=lambda line: print(line, file=sys.stderr, flush=True) if team.first else None,
        )  # fmt: skip
    team.agree(lambda: _show(result, arguments) if team.first else None)


def _show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.picture is not None:
        from gt_jax.monitoring.plots import plot_verification

        plot_verification(result, arguments.picture)
    print(json.dumps(result, allow_nan=False) if arguments.json else "\n".join(report_lines(result)))


if __name__ == "__main__":
    run_command(main)
