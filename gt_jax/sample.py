"""`python -m gt_jax.sample CHECKPOINT --prompt "def "`: continue a text, one token at a time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gt_jax.errors import Refused, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.sample", description="Continue a text with a trained model.")
    p.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    p.add_argument("--prompt", default="def ", help="text to continue")
    p.add_argument("--tokenizer", help="bytes, a file or a folder (default: what the checkpoint was trained with)")
    p.add_argument("--length", type=int, default=200, help="tokens to write")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    p.add_argument("--top-k", type=int, default=40)
    p.add_argument("--seed", type=int, default=0)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prompt and its continuation up to the end of the document."""
    arguments = parser().parse_args(argv)
    if not arguments.prompt:
        raise Refused("--prompt is empty; give at least one character")
    import numpy as np

    from gt_jax.evaluation.generation import sample
    from gt_jax.evaluation.model_files import load
    from gt_jax.text.tokenizers import chosen_tokenizer, open_tokenizer

    config, variables, metadata = load(arguments.checkpoint)
    tokenizer = open_tokenizer(chosen_tokenizer(metadata, arguments.tokenizer, arguments.checkpoint))
    if tokenizer.vocab_size > config.vocab:
        raise Refused(f"the tokenizer has {tokenizer.vocab_size} ids, {arguments.checkpoint} a vocabulary of "
                      f"{config.vocab}; name the one it was trained with by --tokenizer")  # fmt: skip
    try:
        prompt = tokenizer.encode(arguments.prompt.encode())[None]
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
    text = arguments.prompt.encode() + tokenizer.decode(drawn)
    sys.stdout.write(text.decode("utf-8", "replace") + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
