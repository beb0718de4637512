"""Plans of pods as files: read, told as a table by part, and compared part by part. JSON alone, no JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import is_number, read_json

Json = Mapping[str, Any]
PHASES = ("forward", "again", "backward", "update")
GB, TFLOP = 1e9, 1e12
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "preset": str, "topology": str, "devices": int, "parameters": int, "batch": int, "sequence_length": int,
    "tried": list,
}  # fmt: skip
_ROW = {"mesh": dict, "accumulate": int, "fits": bool, "bytes": int, "flops": int, "collectives": dict}
_NUMBERS: dict[str, type | tuple[type, ...]] = {
    "mesh": int, "memory": (int, float), "least_seconds": (int, float), "launches": int, "one_pass": (int, float),
}  # fmt: skip
_SUMS = ("bytes", "flops", "links", "between_slices", "link_seconds", "kernels")
_PART = {"part": str, "phase": str, "bytes": (int, float), "flops": (int, float), "links": (int, float)}


def read_plan(path: Path) -> dict[str, Any]:
    """The plan in a file that `plan_pod --json` wrote; raises `Refused` for what is none, or fits on no mesh."""
    try:
        plan = read_json(path)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as JSON: {error}") from error
    several = isinstance(plan, Mapping) and "slices" in plan  # of a pod there is one where it says nothing
    wrong = _mistyped(plan, {**_FIELDS, "slices": int} if several else _FIELDS)
    wrong += _unprintable(plan, _FIELDS)
    wrong += [f"has {name} {plan[name]}; there is one at least" for name in ("devices", "batch", "sequence_length")
              if not wrong and plan[name] < 1]  # fmt: skip
    if several and not wrong and not 1 <= plan["slices"] < 2**20:
        wrong = [f"has slices {plan['slices']}; they are 1 or more"]
    rows = plan["tried"] if not wrong else []
    if not wrong and not rows:
        wrong = ["has no mesh in tried"]
    for number, row in enumerate(rows):
        wanted = _ROW if isinstance(row, dict) and row.get("fits") is True else {"fits": bool}
        wrong += [f"tried[{number}] {line}" for line in _mistyped(row, wanted)]
        wrong += [f"tried[{number}] {line}" for line in _not_numbers(row)]
        if wanted is _ROW and not wrong and row["accumulate"] < 1:
            wrong.append(f"tried[{number}] has accumulate {row['accumulate']}; there is one part at least")
        parts = row.get("parts", []) if isinstance(row, dict) else []
        each = enumerate(parts if isinstance(parts, list) else [parts])
        wrong += [f"tried[{number}] parts[{at}] {line}" for at, one in each
                  for line in (*_mistyped(one, _PART), *_unprintable(one, _PART), *_strange_sums(one))]  # fmt: skip
    refuse_all(wrong, f"{path} is no plan that plan_pod --json wrote; it")
    if best(plan) is None:
        raise Refused(f"{path}: none of its meshes fits, so there is nothing to show")
    return plan


def _unprintable(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Names that would move a terminal's cursor."""
    return [f"has a {name} that is no line of text: {found[name]!r:.60}" for name, kind in wanted.items()
            if kind is str and isinstance(found, Mapping) and isinstance(found.get(name), str)
            and not found[name].isprintable()]  # fmt: skip


def _mistyped(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    if not isinstance(found, Mapping):
        return ["is no JSON object"]
    return [f"lacks {name}" if name not in found else f"has a {name} of another type"
            for name, kind in wanted.items() if not isinstance(found.get(name), kind)]  # fmt: skip


def _not_numbers(row: Any) -> list[str]:
    """What a mesh tells by name, and a plan that has it: sizes of axes, bytes of memory, seconds, kernels."""
    given = {name: row[name] for name in _NUMBERS if name in row} if isinstance(row, Mapping) else {}
    wrong = [f"has a {name} that is no JSON object" for name, value in given.items() if not isinstance(value, Mapping)]
    return wrong + _strange_sums(row) + [
        f"{name} has a {key} that is no number from 0: {one!r:.40}" for name, value in given.items()
        if isinstance(value, Mapping) for key, one in value.items()
        if not (isinstance(one, _NUMBERS[name]) and _is_amount(one))]  # fmt: skip


def _strange_sums(row: Any) -> list[str]:
    """What a mesh or a part of it sums up, where it is there, and is no number."""
    given = {name: row[name] for name in _SUMS if name in row} if isinstance(row, Mapping) else {}
    return [f"has a {name} that is no number from 0: {one!r:.40}" for name, one in given.items() if not _is_amount(one)]


def _is_amount(value: Any) -> bool:
    """Whether it is a number of bytes, seconds, devices or the like."""
    return is_number(value) and value >= 0


def best(plan: Json) -> Json | None:
    """The first of its meshes, which are in order, if that fits."""
    return plan["tried"][0] if plan["tried"] and plan["tried"][0].get("fits") else None


def is_old(plan: Json) -> bool:
    """Whether it was made before plans told their parts; its collectives are then counted too often."""
    row = best(plan)
    return row is None or "parts" not in row


def refuse_other(plans: Mapping[str, Json]) -> None:
    """Raise `Refused` where two plans are not of the same model and the same tokens a step."""
    (first, one), *rest = plans.items()
    what = {"preset": "preset", "parameters": "parameters", "changed": "fields that differ from the preset",
            "batch": "rows of a batch", "sequence_length": "tokens of a row"}  # fmt: skip
    wrong = [f"{words}: {one.get(name)} in {first}, {other.get(name)} in {path}" for path, other in rest
             for name, words in what.items() if (one.get(name) or 0) != (other.get(name) or 0)]  # fmt: skip
    refuse_all(wrong, "these plans cannot be compared; they must be of one model and as many tokens a step:")


def pod_name(plan: Json) -> str:
    """The pod, or how many of it."""
    return f"{plan['slices']} x {plan['topology']}" if plan.get("slices", 1) > 1 else str(plan["topology"])


def heading(plan: Json) -> str:
    """One line: model, pod, mesh."""
    row = best(plan)
    assert row is not None
    sizes = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
    return f"{plan['preset']} on {pod_name(plan)}, --mesh {sizes or 'data=1'} --accumulate {row['accumulate']}"


def sums(row: Json, what: str, part: str | None = None, phase: str | None = None) -> float:
    """`bytes`, `flops`, `links` or `link_seconds` of a part in a phase; None: of all."""
    return float(sum(one.get(what, 0) for one in row.get("parts", ())
                     if part in (None, one["part"]) and phase in (None, one["phase"])))  # fmt: skip


def parts(rows: Sequence[Json]) -> list[str]:
    """The parts of all rows, those that move most HBM bytes first."""
    names = {one["part"] for row in rows for one in row.get("parts", ())}
    return sorted(names, key=lambda name: (-max(sums(row, "bytes", name) for row in rows), name))


def part_lines(row: Json) -> list[str]:
    """A table by part: HBM bytes by phase, their share, FLOPs, bytes over links, a GPU's kernels; the sum is last."""
    header = [*PHASES, "HBM GB", "%", "TFLOP", "links GB", *(["kernels"] if "launches" in row else [])]
    lines = [f"    {'part':26s}" + "".join(f"{name:>10s}" for name in header)]
    for part in (*parts([row]), None):
        of: Callable[..., float] = lambda what, phase=None, part=part: sums(row, what, part, phase)  # noqa: E731
        share = 100 * of("bytes") / max(sums(row, "bytes"), 1)
        numbers = [*(of("bytes", phase) / GB for phase in PHASES), of("bytes") / GB, share, of("flops") / TFLOP,
                   of("links") / GB]  # fmt: skip
        counted = f"{of('kernels'):10.0f}" if "launches" in row else ""
        lines.append(f"    {part or 'together':26s}" + "".join(f"{number:10.3g}" for number in numbers) + counted)
    if (seconds := part_by_part(row)) is not None:
        exposed = seconds + row["least_seconds"].get("links", 0.0)
        lines.append(f"    part by part, the larger of arithmetic and HBM: {seconds:.3g} s; {exposed:.3g} where "
                     "nothing of what is received is hidden")  # fmt: skip
    return lines + _passes_lines(row)


def _passes_lines(row: Json) -> list[str]:
    """What an adaptive step takes at least, by how many passes of each layer are computed: each costs the same."""
    one, least = row.get("one_pass", {}), row.get("least_seconds", {})
    counts = {"flops": "flops", "bytes": "bytes", "links": "link_seconds"}
    first = {name: least[name] * one[key] / row[key] if row[key] else 0.0 for name, key in counts.items()
             if name in least and key in one and key in row}  # fmt: skip
    if not first or one.get("of", 1) <= 1:
        return []
    words = []
    for passes in dict.fromkeys((1, 1.3, 2, one["of"])):
        share = (passes - 1) / (one["of"] - 1)
        times = (f"{at + share * (least[name] - at):.2g}" for name, at in first.items())
        words.append(f"{passes:g}: {' / '.join(times)}")
    return [f"    by passes a layer that are computed, least s by {' / '.join(first)}: {'; '.join(words)}"]


def part_by_part(row: Json) -> float | None:
    """Seconds of a step whose parts follow one another, arithmetic and HBM hidden behind each other within each phase
    of a part alone: between the largest of the least times and what a step takes. None where no times are told."""
    least = row.get("least_seconds", {})
    whole = {what: sums(row, what) for what in ("flops", "bytes")}
    if not all(whole.values()) or not whole.keys() <= least.keys():
        return None
    return sum(max(least[what] * one[what] / whole[what] for what in whole) for one in row["parts"])


def least_by_part(row: Json, bound: str) -> dict[str, float]:
    """Of the least seconds by `flops`, `bytes` or `links`, what each part takes."""
    total = row.get("least_seconds", {}).get(bound, 0.0)
    what = "link_seconds" if bound == "links" else bound
    whole = sums(row, what)
    return {part: total * sums(row, what, part) / whole if whole else 0.0 for part in parts([row])}


def comparison_lines(plans: Mapping[str, Json]) -> list[str]:
    """Two plans side by side: totals and least times, then HBM, FLOPs and links by part where both have parts."""
    lines = [f"{letter}: {path}: {heading(plan)}" for letter, (path, plan) in zip("AB", plans.items(), strict=True)]
    rows = [row for row in map(best, plans.values()) if row is not None]
    old = [path for path, plan in plans.items() if is_old(plan)]
    lines += [f"{path} is an old plan: it has no parts, and its collectives are counted too often" for path in old]
    lines += ["", f"    {'':26s}{'A':>12s}{'B':>12s}{'B / A':>9s}"]
    totals = [("HBM, GB", "bytes", GB), ("TFLOP", "flops", TFLOP), ("links, GB received", "links", GB)]
    several = any("between_slices" in row for row in rows)
    network = [("from other slices, GB", "between_slices", GB)] if several else []
    launches = [row.get("launches", {}).get("kernels") for row in rows]
    for words, name, unit in totals + network:
        lines.append(_pair(words, *(row[name] / unit if name in row else None for row in rows)))
    for name in ("flops", "bytes", "links", *(["between_slices"] if several else [])):
        lines.append(_pair(f"least s by {name}", *(row.get("least_seconds", {}).get(name) for row in rows)))
    lines.append(_pair("s part by part", *(part_by_part(row) for row in rows)))
    held = [row.get("memory", {}).get("total") for row in rows]
    lines.append(_pair("GiB of memory", *(None if size is None else size / 2**30 for size in held)))
    lines += [_pair("kernels executed", *launches)] if any(launches) else []
    if old:
        return lines
    totals += [("kernels executed", "kernels", 1)] if all(launches) else []
    for words, name, unit in totals:
        lines += ["", f"    {words}, by part"]
        for part in parts(rows):
            pair = [sums(row, name, part) / unit for row in rows]
            lines += [_pair(part, *pair)] if any(pair) else []
    return lines


def _pair(words: str, a: float | None, b: float | None) -> str:
    shown = "".join(f"{'-' if x is None else format(x, '.4g'):>12s}" for x in (a, b))
    ratio = format(b / a, ".2f") if a and b is not None else "-"
    return f"    {words:26s}{shown}{ratio:>9s}"
