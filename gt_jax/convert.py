"""Convert public hybrids, and checkpoints of the origin (PyTorch) system, to checkpoints of ours, and back.

    python -m gt_jax.convert HF_FOLDER DST
    python -m gt_jax.convert CHECKPOINT HF_FOLDER --to hf [--approximate TEXT]
    python -m gt_jax.convert SRC... DST [--config FILE]
    python -m gt_jax.convert CHECKPOINT FILE --to safetensors

- HF_FOLDER: a folder as transformers writes it, with config.json, safetensors and tokenizer, of Qwen3.5, Qwen3-Next or
  Olmo Hybrid. Its tokenizer and generation config travel along. Nothing in it runs.
- SRC: .pt with `model_state_dict` or a bare state dict, .safetensors, one file or shards, a folder of them, or an
  *.index.json. `.pt` is read with weights_only, nothing in it runs; it needs PyTorch (pip install 'gt-jax[torch]').
- Widths come from the shapes. --config is a JSON object of config fields for the rest (gsa.k_base, moe.top_k,
  adaptive.threshold, ...), nested as in our metadata; its defaults are the `3b` preset's.
- DST is never overwritten, and does not exist before it is whole.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gt_jax.errors import Refused, refuse_all, run_command, say
from gt_jax.files import local_name, local_path
from gt_jax.options import whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m gt_jax.convert", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", nargs="+", type=local_path, metavar="SRC",
                      help="files or a folder; a checkpoint to go back")
    made.add_argument("target", type=local_path, metavar="DST", help="checkpoint or file to write; must not exist")
    made.add_argument("--to", choices=("orbax", "safetensors", "hf"), default="orbax",
                      help="what DST becomes (orbax)")
    made.add_argument("--approximate", type=local_path, metavar="TEXT",
                      help="with --to hf: fold gains that are neither 0 nor 1, and measure on this text what that "
                      "and rounding cost")
    made.add_argument("--config", type=local_path, metavar="FILE", help="config fields that the tensors do not tell")
    made.add_argument("--step", type=whole, metavar="N", help="the step to note (what SRC says, else 0)")
    made.add_argument("--tokens", type=local_path, metavar="FILE",
                      help="the tokens' texts for a Kronecker embedding: a JSON list, or a tokenizer.json")
    made.add_argument("--tokenizer", type=local_name, metavar="NAME",
                      help="noted for the commands that read text: bytes, a tokenizer.json, a .model, or their folder")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or raises `Refused` with what would be right."""
    args = parser().parse_args(argv)
    _check(args)
    if args.to == "orbax":
        report = _import(args)
    elif args.to == "hf":
        report = _export(args)
    else:
        from gt_jax.interop.to_safetensors import to_safetensors
        report = to_safetensors(args.source[0], args.target, progress=say)
    for line in report.get("warnings", ()):
        say(f"warning: {line}")
    print(json.dumps(report) if args.json else "\n".join(report_lines(report)))
    return 0


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as lines for a reader."""
    config, whose = report["config"], report.get("family", "the origin")
    lines = [f"{report['target']}: step {report['step']}, layout {config['layout']}, width {config['width']}, "
             f"{report['tensors']} tensors of {whose}, {report['bytes'] / 2**20:.1f} MiB, {report['seconds']:.1f} s"]
    if report.get("aliases") or report.get("ignored"):
        lines.append(f"{report['aliases']} second names agree with the first, {report['ignored']} rotary buffers are "
                     "ignored")
    if report.get("dropped"):
        lines.append(f"without counterpart in the origin, left out: {', '.join(report['dropped'])}")
    if report.get("left_out"):
        lines.append(f"left out: {report['left_out']}")
    if "family" in report:
        beside = ", ".join(filter(None, (report["tokenizer"], *report["beside"])))
        lines.append(f"beside it: {beside or 'neither tokenizer nor generation config'}")
    if report.get("zeroed"):
        lines.append(f"layers with gain 0, whose projections back to the stream are zeros: {report['zeroed']}")
    if report.get("cost") or report.get("rounded"):
        lines.append(_loss_line(report))
    return [*lines, "config " + json.dumps(config)]


def _loss_line(report: Mapping[str, Any]) -> str:
    """What is not written as it is, and what that costs where a text was given to measure it on."""
    done = [f"gains of layers {list(report['folded'])} folded"] if report["folded"] else []
    done += [f"{count} tensors rounded to {dtype}" for dtype, count in report["rounded"].items()]
    cost, what = report["cost"], ", ".join(done) or "nothing folded or rounded"
    if cost is None:
        return f"{what}, which such tensors came in or matrices have; --approximate TEXT says what it costs"
    return (f"{what}: on {cost['tokens']} tokens logits differ by up to {cost['logits']:.2e} of the largest, loss "
            f"{cost['loss']:.4f} -> {cost['loss_folded']:.4f}")


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from gt_jax.interop.to_hf import to_hf
    from gt_jax.text.encodings import plain
    text = None
    if args.approximate is not None:
        try:
            text = plain(args.approximate.read_bytes())[0]
        except (OSError, ValueError) as error:  # ValueError: what is no text
            reason = getattr(error, "strerror", None) or error
            raise Refused(f"--approximate {args.approximate} cannot be read: {reason}") from error
    return to_hf(args.source[0], args.target, approximate=text, progress=say)


def _import(args: argparse.Namespace) -> dict[str, Any]:
    from gt_jax.interop.hf_folder import is_hf_folder
    if len(args.source) == 1 and is_hf_folder(args.source[0]):
        from gt_jax.interop.from_hf import from_hf
        refuse_all([f"{flag} has no meaning for a folder of transformers, whose config.json says it"
                    for flag, value in (("--config", args.config), ("--tokens", args.tokens)) if value is not None],
                   "these arguments do not go together:")
        return from_hf(args.source[0], args.target, step=args.step, tokenizer=args.tokenizer, progress=say)
    from gt_jax.configs.json_config import read_object
    from gt_jax.interop.to_orbax import to_orbax
    from gt_jax.text.vocabulary_files import read_tokens
    return to_orbax(args.source, args.target, overrides=read_object(args.config, "--config") if args.config else None,
                    step=args.step, tokens=read_tokens(args.tokens) if args.tokens else None,
                    tokenizer=args.tokenizer, progress=say)


def _check(args: argparse.Namespace) -> None:
    """Refuse, before anything is read, arguments that contradict each other."""
    wrong = []
    if args.to != "hf" and args.approximate is not None:
        wrong.append("--approximate has a meaning with --to hf alone")
    if args.to != "orbax":
        wrong += [f"{flag} has no meaning with --to {args.to}" for flag, value in
                  (("--config", args.config), ("--step", args.step), ("--tokens", args.tokens),
                   ("--tokenizer", args.tokenizer)) if value is not None]
        if len(args.source) > 1:
            wrong.append(f"--to {args.to} writes one checkpoint; there are {len(args.source)}")
    if args.step is not None and args.step < 0:
        wrong.append(f"--step is {args.step}; it must be at least 0")
    refuse_all(wrong, "these arguments do not go together:")


if __name__ == "__main__":
    run_command(main)
