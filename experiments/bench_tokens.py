"""What does a corpus of tokens on the disk cost to make, and to open?

    python -m experiments.bench_tokens --text FILE… [--tokenizer tokenizer.json] [--documents 3000000] [--json FILE]

* Making: seconds, and bytes of text a second, to write the folder of these files by `gt_jax.text.token_writer`, beside
  the time of `open_text`, which is what a run without the folder spends at each start.
* Opening: a folder of so many documents of 650 tokens in the mean, its tokens a file with a hole, to the first batch of
  128 rows of 4,096, and the memory that is held then beside the mapped pages (anonymous memory, of Linux).
* Nothing is written but a temporary folder, and what `--json` names.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.machine import keep, machine
from gt_jax.configs.data import BYTES, DataConfig
from gt_jax.errors import run_command
from gt_jax.files import local_name
from gt_jax.options import at_least
from gt_jax.text.batches import open_text
from gt_jax.text.token_folder import (
    ENDS,
    KEYS,
    MANIFEST,
    TOKENS,
    Manifest,
    Sums,
    TokenizerNamed,
    sample_of,
    sha256_of,
)
from gt_jax.text.token_writer import write_tokens

MEAN = 650


def made(files: Sequence[str], tokenizer: str) -> dict[str, float]:
    """Seconds to tokenize as a run does, to write the folder, and to open that; bytes of text."""
    config = DataConfig(text=tuple(files), tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        text = open_text(config)
        read = time.perf_counter() - began
        began = time.perf_counter()
        write_tokens(Path(folder, "tokens"), files, tokenizer)
        written = time.perf_counter() - began
        began = time.perf_counter()
        open_text(config.replace(text=(str(Path(folder, "tokens")),)))
        return {"bytes": text.characters, "tokens": len(text.tokens), "read_seconds": read,
                "written_seconds": written, "opened_seconds": time.perf_counter() - began}  # fmt: skip


def opened(documents: int) -> dict[str, float]:
    """Seconds to open so many documents, and to the first batch; bytes of anonymous memory a document then."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = _large(Path(folder), documents)
        config = DataConfig(text=(folder,), sequence_length=4096, batch_size=128, held_out=0.001)
        before, began = _anonymous(), time.perf_counter()
        text = open_text(config)
        seconds = time.perf_counter() - began
        stream = text.train()
        next(stream)
        return {"documents": documents, "tokens": tokens, "opened_seconds": seconds,
                "first_batch_seconds": time.perf_counter() - began,
                "bytes_a_document": (_anonymous() - before) / documents}  # fmt: skip


def _large(folder: Path, documents: int) -> int:
    """Write a folder of random lengths, its tokens zeros that take no place on the disk; how many tokens."""
    draws = np.random.default_rng(0)
    ends = np.cumsum(draws.geometric(1 / MEAN, documents) + 1)
    ends.astype("<i8").tofile(folder / ENDS)
    draws.integers(0, 2**63, documents).astype("<u8").tofile(folder / KEYS)
    tokens = int(ends[-1])
    with open(folder / TOKENS, "wb") as stream:
        stream.truncate(2 * tokens)
    sums = Sums("", sha256_of(folder / ENDS), sha256_of(folder / KEYS), sample_of(folder / TOKENS))
    manifest = Manifest(dtype="uint16", tokens=tokens, documents=documents, bytes=tokens, vocab_size=257,
                        end_of_document=256, tokenizer=TokenizerNamed(BYTES, None), files=(), told="",
                        sha256=sums)  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return tokens


def _anonymous() -> int:
    """Bytes that the process holds and no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m experiments.bench_tokens", description="Tokens on the disk.")
    p.add_argument("--text", nargs="+", type=local_name, default=[], metavar="FILE", help="files to tokenize")
    p.add_argument("--tokenizer", type=local_name, default=BYTES, help="of these (bytes)")
    p.add_argument("--documents", type=at_least(1), default=3_000_000, help="of the folder that is opened (3,000,000)")
    p.add_argument("--json", type=local_name, metavar="FILE", help="write the figures there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print."""
    arguments = parser().parse_args(argv)
    rows = []
    if arguments.text:
        one = made(arguments.text, arguments.tokenizer)
        rows.append(one)
        print(f"{one['bytes'] / 1e6:.1f} MB of text, {one['tokens']:,.0f} tokens: tokenized in "
              f"{one['read_seconds']:.2f} s, written in {one['written_seconds']:.2f} s, "
              f"{one['bytes'] / one['written_seconds'] / 1e6:.2f} MB/s; opened in {one['opened_seconds']:.3f} s")
    two = opened(arguments.documents)
    rows.append(two)
    print(f"{two['documents']:,} documents, {two['tokens']:,} tokens: opened in {two['opened_seconds']:.1f} s, first "
          f"batch after {two['first_batch_seconds']:.1f} s, {two['bytes_a_document']:.0f} bytes of memory a document")
    keep(arguments.json, machine(), rows)
    return 0


if __name__ == "__main__":
    run_command(main)
