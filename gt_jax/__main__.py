"""`python -m gt_jax COMMAND …`, and the script `gt-jax`: one entry to all commands; without one, the list of them."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import gt_jax
from gt_jax.errors import Refused, run_command

# In the order in which a user meets them.
COMMANDS = {
    "demo": "the whole idea in a few minutes: train shallow, measure, grow, train on",
    "train": "train a model, by default the adaptive `tiny` on the Python library's sources",
    "retrofit": "an adaptive model from a plain checkpoint, which computes the same until it is trained",
    "measure": "how many passes does every layer want?",
    "grow": "turn an adaptive checkpoint into a deep feed-forward one, or show the plan",
    "verify": "did the growth keep what was learned? two checkpoints on the same batches",
    "calibrate": "fit the gains of a grown model to its source",
    "evaluate": "nats a token, bits per byte and perplexity on held-out text, with intervals",
    "sample": "continue a text",
    "report": "what runs did, side by side, on one HTML page",
    "describe": "config, layout and every tensor of a preset or checkpoint",
    "prepare": "text files into tokens on the disk, or into a TFDS dataset",
    "convert": "checkpoints of the PyTorch system in, safetensors out",
    "plan_pod": "does the training step compile and fit on a TPU pod that is not here?",
}


def overview() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join([
        f"gt_jax {gt_jax.__version__}: train a language model that decides its own depth, and grow it.", "",
        "python -m gt_jax COMMAND …, or gt-jax COMMAND …; each has --help:", "", *lines,
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; raises `Refused` for an unknown one, with the nearest."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"gt_jax {gt_jax.__version__}")
        return 0
    name = words[0].replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "python -m gt_jax lists them"
        raise Refused(f"there is no command {words[0]!r}; {hint}")
    code: int = importlib.import_module(f"gt_jax.{name}").main(words[1:])
    return code


def script() -> None:
    """What `gt-jax` runs."""
    run_command(main)


if __name__ == "__main__":
    script()
