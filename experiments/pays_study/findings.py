"""What the rows of the study say, by setting: at growth, after a tenth more, at equal FLOPs, and in tokens.

- Models of one seed share source, data and held-out part: they are compared by their differences, seed by seed.
  `growth_study/inference.py` says what may be called a difference; beside it stands whether all seeds agree.
- At equal FLOPs a grown model is held against the source trained on and the model from scratch: `pays` where it is
  below both at every seed. A loss of answers that are all right is a small number; its differences are as good as any.
- Where the shallow model was trained from scratch too, each layer once, that has a line of its own: it is what somebody
  without adaptive depth and without growth would do: such a source, trained on. What is stacked of one at full strength
  is what somebody would do who grows without adaptive depth; it `pays` where it is below both of these. Who has the
  source already asks otherwise: with what is left of B, is it below that trained on and a deep model started now?
- Free gates shake, and go on paying for their passes, which no child does. So a source of a task is trained on with all
  passes forced and none paid for, too.
- In tokens: how much of the tokens of the model from scratch a grown model reads until a point of its curve is at or
  below that one's final loss. A point of a curve is the first that was looked at, so the tokens are at most those.
- In a setting with three points the better of several is not chosen: each has its own line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.growth_study.inference import Times, mean
from experiments.pays_study.study import AGAIN, CONTROL, GROWN, ON, ON_FORCED, SCRATCH, SHALLOW, SOURCE, STACKED

Row = Mapping[str, Any]
NEAR_POINTS, NEAR_LOSS = 1.0, 0.3
"""At growth: how many points of right answers, and how many percent of a text's loss, a child may be off."""
HALF = 0.5
OTHERS = ((SHALLOW, SCRATCH), (ON_FORCED, SCRATCH))
"""What is held against each other of the contenders that were not grown."""


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """By setting: `models` (means over seeds), `grown` and `stacked` (each point's), `controls`, `others`, `claims`."""
    names = sorted({row["task"] for row in rows})
    return {name: _of_setting([row for row in rows if row["task"] == name]) for name in names}


def comparisons(found: Mapping[str, Any]) -> int:
    """How many differences are judged in a summary: three to six of each point grown, two or three of each stacked, one
    of each control, the others."""
    points = [point for one in found.values() for point in one["grown"].values()]
    judged = sum(3 + sum(other in point for other in (SHALLOW, STACKED, ON_FORCED)) for point in points)
    judged += sum(2 + (AGAIN in point) for one in found.values() for point in one["stacked"].values())
    return judged + sum(len(one["controls"]) + len(one["others"]) for one in found.values())


def select(rows: Iterable[Row], kind: str, point: float | None = None) -> dict[int, Row]:
    """By seed, in order: the rows of a kind, of one point where it is given."""
    found = {row["seed"]: row for row in rows if row["kind"] == kind and point in (None, row["point"])}
    return dict(sorted(found.items()))


def _of_setting(rows: Sequence[Row]) -> dict[str, Any]:
    points = sorted({row["point"] for row in rows if row["kind"] == GROWN})
    grown = {f"{point:g}": _of_point(rows, point, points[-1]) for point in points}
    stacked = {f"{point:g}": _of_stacked(rows, point)
               for point in sorted({row["point"] for row in rows if row["kind"] == STACKED})}  # fmt: skip
    names = sorted({row["recipe"] for row in rows if row["kind"] == CONTROL})
    controls = {name: _of_control(rows, name) for name in names}
    claims = {
        "as good at growth": [point for point, one in grown.items() if one["near"]],
        "better after a tenth": [point for point, one in grown.items() if one["tenth"]["every_seed"]],
        "below both at equal FLOPs": [point for point, one in grown.items() if one["pays"]],
        "below the shallow one too": [point for point, one in grown.items()
                                      if one["pays"] and one.get(SHALLOW, {}).get("every_seed")],
        **{name: [point for point, one in grown.items() if one.get(other, {}).get("every_seed")]
           for name, other in (("below it with passes forced", ON_FORCED), ("below what was stacked", STACKED))},
        "half of scratch's tokens": [point for point, one in grown.items() if one["half"]],
        "stacked below both": [point for point, one in stacked.items() if one["pays"]],
        "stacked, its source at hand": [point for point, one in stacked.items() if one["at hand"]],
        "stacked, half of scratch's tokens": [point for point, one in stacked.items() if one["half"]],
    }
    models = {name: _of_model([row for row in rows if row["model"] == name])
              for name in dict.fromkeys(row["model"] for row in rows)}  # fmt: skip
    pairs = [(mine, other, select(rows, mine), select(rows, other)) for mine, other in OTHERS]
    others = [{"mine": mine, "other": other, **_below(one, two, _final)}
              for mine, other, one, two in pairs if one and two]  # fmt: skip
    return {"task": is_task(rows), "models": models, "grown": grown, "stacked": stacked, "controls": controls,
            "others": others, "claims": claims, "deeper": _asked_harder(rows)}  # fmt: skip


def is_task(rows: Sequence[Row]) -> bool:
    """Whether answers are right or wrong here."""
    return "accuracy_all" in next(iter(select(rows, SCRATCH).values()))["final"]


def _below(mine: Mapping[int, Row], other: Mapping[int, Row], of: Callable[[Row], float]) -> dict[str, Any]:
    """By how much `mine` is above `other`, and whether it is below at every seed."""
    differences = [of(row) - of(other[seed]) for seed, row in mine.items()]
    return {**mean(differences), "every_seed": all(one < 0 for one in differences)}


def _final(row: Row) -> float:
    return float(row["final"]["nats"])


def _of_point(rows: Sequence[Row], point: float, last: float) -> dict[str, Any]:
    """What is claimed of the children of one point."""
    mine, scratch = select(rows, GROWN, point), select(rows, SCRATCH)
    source, on, longest = select(rows, SOURCE, point), select(rows, ON, point), select(rows, ON, last)
    found: dict[str, Any] = {"recipe": [row["recipe"] for row in mine.values()]}
    pairs = [(row["step0"], source[seed]["final"]) for seed, row in mine.items()]
    if is_task(rows):
        points = [100 * (child["accuracy_all"] - before["accuracy_all"]) for child, before in pairs]
        found["step0_points"], found["near"] = mean(points), all(one >= -NEAR_POINTS for one in points)
    else:
        percent = [100 * (child["nats"] / before["nats"] - 1) for child, before in pairs]
        found["step0_percent"], found["near"] = mean(percent), all(one <= NEAR_LOSS for one in percent)
    both = {seed: row for seed, row in mine.items() if "tenth" in row and "tenth" in on[seed]}
    found["tenth"] = _below(both, on, lambda row: float(row["tenth"]["nats"])) if both else {"every_seed": False}
    found["on"], found["scratch"] = _below(mine, longest, _final), _below(mine, scratch, _final)
    for kind, at in ((SHALLOW, None), (STACKED, point), (ON_FORCED, last)):
        if other := select(rows, kind, at):
            found[kind] = _below(mine, other, _final)
    found["pays"] = found["on"]["every_seed"] and found["scratch"]["every_seed"]
    return found | _in_tokens(mine, scratch)


def _of_stacked(rows: Sequence[Row], point: float) -> dict[str, Any]:
    """What is claimed of what was stacked at one point; its source trained on is the shallow model."""
    mine, scratch = select(rows, STACKED, point), select(rows, SCRATCH)
    percent = [100 * (row["step0"]["nats"] / row["source"]["nats"] - 1) for row in mine.values()]
    found = {"step0_percent": mean(percent), "scratch": _below(mine, scratch, _final),
             SHALLOW: _below(mine, select(rows, SHALLOW), _final)}  # fmt: skip
    found["pays"] = found["scratch"]["every_seed"] and found[SHALLOW]["every_seed"]
    if again := select(rows, AGAIN, point):
        found[AGAIN] = _below(mine, again, _final)
    found["at hand"] = found[SHALLOW]["every_seed"] and found.get(AGAIN, {}).get("every_seed", False)
    return found | _in_tokens(mine, scratch)


def _in_tokens(mine: Mapping[int, Row], scratch: Mapping[int, Row]) -> dict[str, Any]:
    """`tokens`, and `half`: whether half of the model from scratch's are enough for its loss, at every seed."""
    times = tokens_to(mine, scratch)
    return {"tokens": {"shares": list(times.times), "ends": list(times.ends)},
            "half": all(time is not None and time <= HALF for time in times.times)}  # fmt: skip


def tokens_to(mine: Mapping[int, Row], scratch: Mapping[int, Row]) -> Times:
    """By seed: tokens after growth, over those of the model from scratch, to that one's final loss."""
    times, ends = [], []
    for seed, row in mine.items():
        all_of_scratch, begin = scratch[seed]["tokens"], row["curve"][0]["tokens"]
        reached = [one["tokens"] for one in row["curve"] if one["nats"] <= _final(scratch[seed])]
        times.append((min(reached) - begin) / all_of_scratch if reached else None)
        ends.append((row["tokens"] - begin) / all_of_scratch)
    return Times(tuple(times), tuple(ends))


def _of_control(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """`step0`: by how much a control is above the child of the same source at growth; `tenth`: after as many steps,
    the child above it."""
    controls = {row["seed"]: row for row in rows if row["kind"] == CONTROL and row["recipe"] == name}
    grown = select(rows, GROWN, next(iter(controls.values()))["point"])
    controls = {seed: controls[seed] for seed in sorted(controls)}
    after = {seed: row for seed, row in grown.items() if "tenth" in row and "tenth" in controls[seed]}
    found = {"step0": _above(controls, grown, "step0")}
    return found | ({"tenth": _above(after, controls, "tenth")} if after else {})


def _above(mine: Mapping[int, Row], other: Mapping[int, Row], when: str) -> dict[str, Any]:
    return mean([row[when]["nats"] - other[seed][when]["nats"] for seed, row in mine.items()])


def _of_model(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    found: dict[str, Any] = {"kind": first["kind"], "point": first["point"], "layers": first["layers"],
                             "rate": first["rate"], "curriculum": first.get("curriculum")}  # fmt: skip
    for key in ("steps", "tokens", "flops", "model_flops", "seconds", "parameters", "tokens_a_parameter"):
        found[key] = mean([row[key] for row in rows])
    for when in ("step0", "tenth", "final"):
        of = [row[when] for row in rows if when in row]
        if of:
            found[when] = _answers(of)
    return found


def _answers(of: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"nats": mean([one["nats"] for one in of])}
    if "accuracy_all" in of[0]:
        found["accuracy_all"] = mean([one["accuracy_all"] for one in of])
        found["accuracy"] = {key: mean([one["accuracy"].get(key, 0.0) for one in of]) for key in of[0]["accuracy"]}
    return found


def _asked_harder(rows: Sequence[Row]) -> list[str]:
    """The difficulties that are asked of the children and that no source was trained on."""
    return list(next((row["harder"] for row in rows if row.get("harder")), []))
