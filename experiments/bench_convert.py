"""How fast does `gt_jax.convert` bring a public hybrid in and out beside the disk, and how much memory does it hold?

    python -m experiments.bench_convert [--size 4b] [--repeats 3] [--workdir DIR] [--output experiments/results]

* The source is a folder as transformers writes it: config.json, shards of --shard-bytes with an index, a tokenizer;
  random values in bfloat16. `4b` has the shape of a Qwen3.5 of 4 billion parameters, tied embeddings included.
* In: `convert FOLDER OURS`; out: `convert OURS BACK --to hf`. The floor, and how all is measured:
  experiments/disk_floor.py. At the end every shard's tensors are compared with the source's, bit for bit.
* Asked: at most 1.5 GiB held and 2.5 times the floor, both ways.
* --output keeps bench_convert_SIZE.json and .md there. WORKDIR needs room for four times the model (34 GB for 4b);
  what is made there is deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import disk_floor
from experiments.machine import machine
from experiments.pages import markdown_table
from experiments.training_measured.report import keep, note
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import DeltaNetConfig, EmbeddingConfig, ModelConfig
from gt_jax.configs.presets import preset
from gt_jax.errors import Failed, run_command
from gt_jax.files import local_path
from gt_jax.growth import noise
from gt_jax.interop.expected_tensors import model_leaves
from gt_jax.interop.families.family import depth_fields
from gt_jax.interop.families.registry import family_for
from gt_jax.interop.families.rows import units, whole_shapes
from gt_jax.interop.hf_folder import CONFIG, HFFolder
from gt_jax.interop.safetensors import DTYPES
from gt_jax.interop.tensor_files import Info, same_bytes
from gt_jax.interop.to_hf import INDEX, shards_of
from gt_jax.options import at_least

HELD, FLOORS = 1.5, 2.5  # GiB, and times the floor: what is asked
PIECE = 2**20  # values drawn at a time


def four_billion() -> ModelConfig:
    """Qwen3.5 4B: 32 layers of width 2560."""
    return preset("qwen3_5_9b").replace(width=2560, mlp_width=9216, embedding=EmbeddingConfig(tied=True))


def toy() -> ModelConfig:
    """The same in a second."""
    return four_billion().replace(
        layout="DDDA", width=64, mlp_width=96, vocab=600,
        deltanet=DeltaNetConfig(heads=2, value_heads=4, key_width=16, value_width=16, head_gate_bias=False),
        attention=AttentionConfig(heads=4, kv_heads=2, head_width=16, gate=True, qk_norm="head", rope_base=1e7,
                                  rope_share=0.25))  # fmt: skip


SIZES = {"4b": four_billion, "toy": toy}


def write_folder(folder: Path, config: ModelConfig, shard_bytes: int, seed: int = 0) -> int:
    """Write a model of random bfloat16 as transformers would; returns the bytes of its tensors."""
    family, tensors = family_for(config, None), tensors_of(config)
    folder.mkdir(parents=True)
    data = {**family.write(config), **depth_fields(config), "model_type": family.model_type, "dtype": "bfloat16",
            "architectures": [family.architecture]}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(data, indent=1))
    tokens = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    parts, index = shards_of(tensors, shard_bytes), dict[str, str]()
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / file, {name: tensors[name] for name in names}, config.init_std, seed)
        index |= dict.fromkeys(names, file)
    total = sum(map(disk_bytes, tensors.values()))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    note(f"{folder.name}: {len(tensors)} tensors in {len(parts)} shards, {total / 1e9:.2f} GB")
    return total


def tensors_of(config: ModelConfig) -> dict[str, Info]:
    """Shape and dtype by name of what a model of this config is there."""
    shapes = {path: tuple(leaf.shape) for path, leaf in model_leaves(config).items()}
    wanted = whole_shapes(list(units(config, family_for(config, None).table(config, ()))), shapes)
    return {name: Info(shape, DTYPES["BF16"]) for name, shape in wanted.items()}


def disk_bytes(info: Info) -> int:
    """What a tensor takes."""
    return math.prod(info.shape) * info.dtype.itemsize


def write_shard(file: Path, tensors: Mapping[str, Info], deviation: float, seed: int) -> None:
    """One shard, without the checksums that files of ours have."""
    header, end = dict[str, Any](), 0
    for name, info in tensors.items():
        begin, end = end, end + disk_bytes(info)
        header[name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, info in tensors.items():
            key, count = noise.key_of(seed, name, 0), math.prod(info.shape)
            for start in range(0, count, PIECE):
                drawn = noise.at(key, start, min(PIECE, count - start), noise.step(deviation))
                stream.write(drawn.astype(info.dtype).tobytes())


def compare(before: Path, after: Path) -> int:
    """How many tensors are the same bits in both folders; raises `Failed` that names those that are not."""
    one, other = HFFolder(before), HFFolder(after)
    wrong = sorted(one.tensors.keys() ^ other.tensors.keys())
    wrong += [name for name, info in one.tensors.items() if name in other.tensors
              and not (info == other.tensors[name] and same_bytes(one.read(name), other.read(name)))]
    if wrong:
        raise Failed(f"{len(wrong)} tensors did not come back as they were: {', '.join(wrong[:5])}")
    return len(one.tensors)


def measure(options: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    """Everything the report says."""
    folder, ours, back = (workdir / name for name in ("folder", "ours", "back"))
    size = write_folder(folder, SIZES[options.size](), options.shard_bytes)
    convert = [sys.executable, "-m", "gt_jax.convert"]
    cold = disk_floor.forget(workdir)
    made: dict[str, Any] = {"size": options.size, "tensor_bytes": size, "cold": cold}
    made["in"] = disk_floor.measure("in", [*convert, str(folder), str(ours)], folder, ours, options.repeats)
    made["out"] = disk_floor.measure("out", [*convert, str(ours), str(back), "--to", "hf"], ours, back,
                                     options.repeats)  # fmt: skip
    return {**made, "identical": compare(folder, back), "machine": machine()}


def page(report: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    names = {"in": "in, `convert FOLDER OURS`", "out": "out, `convert OURS BACK --to hf`"}
    rows = [[words, f"{statistics.median(one[name] for one in found['rounds']):.1f}",
             f"{statistics.median(one['read'] + one['write'] for one in found['rounds']):.1f}",
             "{median:.2f} ({least:.2f} to {most:.2f})".format(**found["ratio"]),
             f"{statistics.median(one['processor'] for one in found['rounds']):.1f}", f"{found['peak_gib']:.2f}"]
            for name, words in names.items() for found in (report[name],)]  # fmt: skip
    one = report["machine"]
    load = statistics.median(each["load"] for name in names for each in report[name]["rounds"])
    return ["# Bringing a public hybrid in and out", "",
            f"`python -m experiments.bench_convert --size {report['size']}`: {report['tensor_bytes'] / 1e9:.2f} GB of "
            f"random bfloat16, caches cold by {report['cold']}, medians of {len(report['in']['rounds'])} rounds; at "
            f"most {FLOORS} times the floor and {HELD} GiB are asked. {report['identical']} tensors came back bit for "
            f"bit. {one['processor']}, {one['cores']} cores, on which {load:.1f} programs ran.", "",
            *markdown_table(rows, ["way", "seconds", "floor, seconds", "times the floor", "seconds of processor",
                                   "GiB held"])]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="4b")
    parser.add_argument("--shard-bytes", type=at_least(1), default=2 * 10**9, help="of a shard of the source (2e9)")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--workdir", type=local_path, help="a folder to work in (the system's for temporary files)")
    parser.add_argument("--output", type=local_path, help="a folder to keep the results in")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench_convert", dir=options.workdir) as workdir:
        report = measure(options, Path(workdir))
    print("\n".join(page(report)))
    if options.output is not None:
        keep(options.output / f"bench_convert_{options.size}", report, page(report))
    return 0


if __name__ == "__main__":
    run_command(main)
