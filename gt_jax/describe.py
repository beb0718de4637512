"""`python -m gt_jax.describe PRESET_OR_CHECKPOINT`: config, layout, and every tensor with shape, dtype, parameters.

With --check every byte of a checkpoint (of every step of a run) is compared with its checksum instead; exit 1 names
what is damaged, 2 says that there are no checksums.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax.configs import presets
from gt_jax.configs.lineage import chain, tree_lines
from gt_jax.errors import Failed, Refused, run_command
from gt_jax.files import local_name


def tensor_rows(leaves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One object a tensor of `params` and `statistics`, by path."""
    chosen = sorted((path, leaf) for path, leaf in leaves.items() if path.startswith(("params/", "statistics/")))
    return [
        {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "parameters": math.prod(leaf.shape)}
        for path, leaf in chosen
    ]


def lambda_report(place: Path, config: Any) -> dict[str, Any]:
    """Of a lambda stack: with which factor each layer's update reaches the output; nothing for other stacks."""
    if config.stack.kind != "lambda":
        return {}
    import numpy as np

    from gt_jax.checkpoints import checkpoint
    from gt_jax.models.layers.stack import contributions

    where = [config.depth.position(layer) for layer in range(len(config.depth))]
    paths = [f"params/segment{segment}/layer{slot}/residual_scale" for segment, _, slot in where]
    skips = ["params/skips"] if config.stack.skips else []
    values = checkpoint.load_paths(place, {*paths, *skips})
    scales = np.asarray([values[path][block] for path, (_, block, _) in zip(paths, where, strict=True)])
    weights = values["params/skips"] if skips else None
    return {"contributions": [float(c) for c in contributions(scales, weights, config.stack.skips)]}


def describe(name: str) -> dict[str, Any]:
    """What a preset, or the checkpoint or run directory at a path, is made of; raises `Refused` for neither."""
    if name in presets.PRESETS:
        from gt_jax.checkpoints.tree_paths import flatten
        from gt_jax.models.language_model import abstract

        config = presets.preset(name)
        origin: dict[str, Any] = {"preset": name}
        leaves = flatten(abstract(config))
    elif Path(name).exists():
        from gt_jax.checkpoints.opened import open_checkpoint

        _, place, config, metadata, leaves = open_checkpoint(name)
        kept: dict[str, Any] = {key: metadata[key] for key in ("kind", "step") if key in metadata}
        kept |= {"lineage": chain(metadata), "tree": tree_lines(metadata)}
        origin = {"preset": None, "checkpoint": str(place), **kept, **lambda_report(place, config)}
    else:
        from gt_jax.checkpoints.folders import begun

        raise Refused(f"{name!r} is neither a preset ({', '.join(sorted(presets.PRESETS))}) nor a path that exists"
                      f"{begun(Path(name))}")  # fmt: skip
    tensors = tensor_rows(leaves)
    trained = sum(row["parameters"] for row in tensors if row["path"].startswith("params/"))
    return {**origin, "layout": config.layout, "parameters": trained, "config": config.to_json(), "tensors": tensors}


def check(name: str) -> dict[str, Any]:
    """Compare all bytes at a path with their checksums: {"checked": files, "bytes", "damaged": [{"file", "tensors"}]}.

    `name` is a checkpoint, a run (all its steps), or a .safetensors file of ours. Raises `Refused` where nothing was
    noted to compare with.
    """
    from gt_jax.checkpoints.check import check as check_checkpoint
    from gt_jax.interop.safetensors import SafetensorsFile
    from gt_jax.interop.tensor_files import Unreadable

    place = Path(name)
    if not place.is_file():
        return check_checkpoint(place)._asdict()
    try:
        file = SafetensorsFile(place)
    except Unreadable as error:
        raise Failed(str(error)) from error
    if not file.has_checksums:
        raise Refused(f"{place} has no checksums, so nothing says whether a bit has changed; its header fits its size")
    damaged = file.damaged()
    return {"checked": 1, "bytes": place.stat().st_size,
            "damaged": [{"file": str(place), "tensors": damaged}] if damaged else []}


def check_lines(name: str, result: Mapping[str, Any]) -> list[str]:
    """What `check` found, for a reader."""
    if not result["damaged"]:
        return [f"{name}: {result['checked']} files, {result['bytes']:,} bytes, all as they were written"]
    damaged = [one["file"] + (f" ({', '.join(one['tensors'])})" if one["tensors"] else "") for one in result["damaged"]]
    return [f"{name} is damaged:", *(f"  - {line}" for line in damaged)]


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines for a reader."""
    from gt_jax.configs.layout import parse
    from gt_jax.monitoring.metrics import table

    layout = parse(result["layout"])
    rows = [[t["path"], "x".join(map(str, t["shape"])), t["dtype"], f"{t['parameters']:,}"] for t in result["tensors"]]
    return [
        f"{result['preset'] or result['checkpoint']}: {result['parameters']:,} parameters",
        f"layout {layout}: {len(layout)} layers {layout.types}",
        *result.get("tree", ()),
        *(["contribution of each layer to the output: " + " ".join(f"{c:.3f}" for c in result["contributions"])]
          if "contributions" in result else []),
        "config " + json.dumps(result["config"]),
        "",
        table(rows, ["tensor", "shape", "dtype", "parameters"]),
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.describe", description="Describe a preset or a checkpoint.")
    p.add_argument("name", type=local_name,
                   help=f"preset ({', '.join(sorted(presets.PRESETS))}), checkpoint or run directory")
    p.add_argument("--check", action="store_true", help="compare every byte of a checkpoint or run with its checksum")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the description."""
    arguments = parser().parse_args(argv)
    if arguments.check:
        found = check(arguments.name)
        lines = "\n".join(check_lines(arguments.name, found))
        if arguments.json:
            print(json.dumps(found))
        if found["damaged"]:
            raise Failed(lines)
        if not arguments.json:
            print(lines)
        return 0
    from gt_jax.monitoring.metrics import json_values

    result = describe(arguments.name)
    print(json.dumps(json_values(result), allow_nan=False) if arguments.json else "\n".join(report_lines(result)))
    return 0


if __name__ == "__main__":
    run_command(main)
