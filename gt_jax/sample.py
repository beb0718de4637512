"""`python -m gt_jax.sample CHECKPOINT`: continue a text, one token at a time, or show a model's answers to a task.

    python -m gt_jax.sample runs/a --prompt "def "
    python -m gt_jax.sample runs/a --task pointer_jumps:hardest=4 --instances 3

Without --prompt a model that was trained on tasks or JSON lines alone answers held-out instances of these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused, run_command

PROMPT = "def "


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    p.add_argument("--prompt", help=f"text to continue ({PROMPT!r})")
    p.add_argument("--task", action="append", metavar="NAME[:OPTION=VALUE,…]", help="show answers to held-out "
                   "instances of this task; may be given several times")  # fmt: skip
    p.add_argument("--instances", type=int, default=3, metavar="N", help="of each task (3)")
    p.add_argument("--tokenizer", help="bytes, a file or a folder (default: what the checkpoint was trained with)")
    p.add_argument("--length", type=int, default=200, help="tokens to write")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    p.add_argument("--top-k", type=int, default=40)
    p.add_argument("--seed", type=int, default=0)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prompt and its continuation up to the end of the document, or instances with their answers."""
    arguments = parser().parse_args(argv)
    if arguments.prompt == "":
        raise Refused("--prompt is empty; give at least one character")
    if arguments.prompt is not None and arguments.task:
        raise Refused("--prompt continues a text, --task shows answers; leave one out")
    if arguments.instances < 1:
        raise Refused(f"--instances is {arguments.instances}; at least one can be shown")
    from gt_jax.evaluation.model_files import load, open_checkpoint
    from gt_jax.text.tokenizers import chosen_tokenizer, open_tokenizer

    asks = None if arguments.prompt is not None else _questions(arguments, open_checkpoint(arguments.checkpoint))
    config, variables, metadata = load(arguments.checkpoint)
    tokenizer = open_tokenizer(chosen_tokenizer(metadata, arguments.tokenizer, arguments.checkpoint))
    if tokenizer.vocab_size > config.vocab:
        raise Refused(f"the tokenizer has {tokenizer.vocab_size} ids, {arguments.checkpoint} a vocabulary of "
                      f"{config.vocab}; name the one it was trained with by --tokenizer")  # fmt: skip
    if asks is not None:
        _show_answers(config, variables, asks, arguments.instances)
    else:
        _continue_text(config, variables, tokenizer, arguments)
    return 0


def _questions(arguments: argparse.Namespace, checkpoint: Any) -> Any:
    """The `Data` that --task names, or that the model was trained on where that is without text; else None."""
    from gt_jax.configs.data import TEXT
    from gt_jax.evaluation.loading import data_config
    from gt_jax.text.data import open_data
    from gt_jax.text.flags import read_tasks

    named = {"tasks": read_tasks(arguments.task or ()), "tokenizer": arguments.tokenizer}
    data = data_config(checkpoint.metadata, named, arguments.checkpoint)
    return None if TEXT in data.parts else open_data(data)


def _show_answers(config: Any, variables: Any, data: Any, count: int) -> None:
    from gt_jax.evaluation.shown_instances import held_out_instances, lines_of

    for name, part in data.parts.items():
        found = held_out_instances(config, variables, part, count, data.tokenizer.vocab_size)
        for number, instance in enumerate(found, 1):
            print("\n".join([*lines_of(name, number, instance, data.tokenizer), ""]))


def _continue_text(config: Any, variables: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    import numpy as np

    from gt_jax.evaluation.generation import sample
    from gt_jax.text.tokenizers import continuation

    given = PROMPT if arguments.prompt is None else arguments.prompt
    try:
        prompt = tokenizer.encode(given.encode())[None]
    except ValueError as error:
        raise Refused(f"--prompt cannot be encoded by the model's tokenizer: {error}") from error
    if not prompt.size:
        raise Refused("--prompt has no token in the model's tokenizer; give other words")
    drawn = sample(
        config, variables, prompt, arguments.length, temperature=arguments.temperature, top_k=arguments.top_k,
        seed=arguments.seed, tokens=tokenizer.vocab_size,
    )[0]  # fmt: skip
    ends = np.flatnonzero(drawn == tokenizer.end_of_document)
    drawn = drawn[: ends[0]] if len(ends) else drawn
    text = given.encode() + continuation(tokenizer, prompt[0], drawn)
    sys.stdout.write(text.decode("utf-8", "replace") + "\n")


if __name__ == "__main__":
    run_command(main)
