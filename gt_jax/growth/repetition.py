"""How much depth each layer of an adaptive model really used: `layer_repetition_factor.json`, read and checked.

A file has `_meta` and one object a layer, `layer0` to `layer{N-1}` (GROWTH.md 1). Only `k_exec` is needed; files from
before `survival` was measured, also those named `layer_repitation_factor.json`, get it rebuilt, with a warning:
- from `p_mu`: s_k = p_mu^(k-1), cut at k_exec;
- without `p_mu`: s_k = p^(k-1) with p = 0.10^(1/k_exec), cut at k_exec: the geometric decay that reaches the halting
  threshold 0.10 exactly when pass k_exec is done.
A whole number written as a float (2.0) is accepted, JSON has one kind of number. `mean_weight` is also read under its
earlier name, `expected_k`; where `passes_run` is not given it is the sum of `alive`, where that is. Other keys of a
layer are not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from gt_jax.configs.layout import Layout, parse
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import is_number, json_of, other_content
from gt_jax.growth.plan_entries import depth_of

ALPHA = (1.0, 0.7, 0.5, 0.35)
THRESHOLD = 0.10
MOST_PASSES = 64
REFERENCE_COUNTS = (2, 1, 2, 3, 2, 3, 4, 3)
NOT_MEASURED = ("reference", "every layer once")
"""What counts that no checkpoint was measured for say of themselves."""

FILE_NAME = "layer_repetition_factor.json"
EARLIER_FILE_NAME = "layer_repitation_factor.json"
_LAYER_KEY = re.compile(r"layer(0|[1-9]\d*)")
_ROUNDING = 1e-6  # how far a mean of float32 probabilities may lie above 1, or above the mean before it


@dataclasses.dataclass(frozen=True)
class LayerRepetition:
    """One layer's use of depth; figures not measured are None.

    `survival[j]` is the mean weight of pass j + 1, `mean_weight` the sum over passes. `passes_run` is how many passes a
    token runs, a mean over tokens; under halting "batch" those of its batch. `spread[j]` is the share of what pass
    j + 1 adds that differs between tokens, of a mean square `update_square[j]` (gt_jax.evaluation.spread).
    """

    k_exec: int
    survival: tuple[float, ...]
    mean_weight: float
    p_mu: float | None = None
    s_fin: float | None = None
    entropy: float | None = None
    ponder: float | None = None
    note: str | None = None
    passes_run: float | None = None
    spread: tuple[float, ...] | None = None
    update_square: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The layer's object in the file, without the figures that were not measured."""
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Repetition:
    """All layers of one adaptive model, its strengths alpha by pass, and where the counts come from.

    `warnings` says what was not in the file and had to be assumed, `sha256` is the file's; neither they nor `origin`
    count in comparisons.
    """

    layers: tuple[LayerRepetition, ...]
    alpha: tuple[float, ...] = ALPHA
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    origin: str = dataclasses.field(default="repetition", compare=False)
    warnings: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    sha256: str | None = dataclasses.field(default=None, compare=False)

    @property
    def content_hash(self) -> str | None:
        """Of the checkpoint that was measured; None where the counts do not say."""
        found = self.meta.get("content_hash")
        return found if isinstance(found, str) else None

    def refuse_another_layout(self, depth: Layout) -> None:
        """Raise `Refused` where the counts say that a model of other layers was measured than those of `depth`."""
        said = self.layout
        if said is not None and (depth_of(said) != depth_of(depth) or said.types != depth.types):
            raise Refused(f"{self.origin} was measured on a model of layout {said}; the source has {depth}; measure "
                          "this source")

    def unsaid(self, depth: Layout, alpha: tuple[float, ...] | None) -> list[str]:
        """What the counts do not say of the model that they were measured on, in words.

        Raises `Refused` where it is another than one of layers `depth` and strengths `alpha` (None: of none).
        """
        if alpha is not None and self.alpha != alpha:
            raise Refused(f"{self.origin}: _meta.alpha is {list(self.alpha)}, the source has {list(alpha)}; measure "
                          "this source")
        self.refuse_another_layout(depth)
        if self.content_hash is not None or self.meta.get("source") in NOT_MEASURED:
            return []
        return [f"{self.origin} does not say which checkpoint was measured (no _meta.content_hash): whether it was "
                "this source is not checked"]

    @property
    def layout(self) -> Layout | None:
        """Of the model that was measured; None where the counts do not say. Raises `Refused` for what is no layout."""
        said = self.meta.get("layout")
        try:
            return None if said is None else parse(str(said))
        except Refused as error:
            raise Refused(f"{self.origin}: _meta.layout: {error}") from None

    @property
    def k_exec(self) -> tuple[int, ...]:
        """Passes by layer."""
        return tuple(layer.k_exec for layer in self.layers)

    @property
    def passes_run(self) -> tuple[float, ...] | None:
        """Passes that a token runs, by layer; None where they were not measured for every layer."""
        found = tuple(layer.passes_run for layer in self.layers if layer.passes_run is not None)
        return found if len(found) == len(self.layers) else None

    def to_json(self) -> dict[str, Any]:
        """The file's object; `from_json` reads it back to an equal value."""
        layers = {f"layer{index}": layer.to_json() for index, layer in enumerate(self.layers)}
        return {"_meta": {**self.meta, "alpha": list(self.alpha)}, **layers}


def read(path: str | Path, alpha: Sequence[float] = ALPHA) -> Repetition:
    """Read a file of pass counts; raises `Refused` naming the file and every key that is wrong.

    `alpha` are the strengths by pass for a file that does not say them in `_meta.alpha`.
    """
    path = Path(path)
    if path.is_dir():
        raise Refused(f"repetition file {path} is a directory; name a JSON file, for example {path / FILE_NAME}")
    try:
        content = path.read_bytes()
        if (kind := other_content(content)) is not None:
            raise Refused(f"repetition file {path} is not JSON: it is {kind}")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        earlier = path.with_name(EARLIER_FILE_NAME)
        hint = f"; there is a {earlier}" if earlier.is_file() else ""
        raise Refused(f"repetition file {path} does not exist{hint}; "
                      f"`python -m gt_jax.measure` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"repetition file {path} cannot be read: {error}") from None
    repeated: list[str] = []
    try:
        data = json_of(text, object_pairs_hook=lambda pairs: _object(pairs, repeated))
    except ValueError as error:
        raise Refused(f"repetition file {path} is not JSON: {error}") from None
    refuse_all([f"key {key!r} appears twice" for key in repeated], f"repetition file {path} is not valid:")
    counts = from_json(data, f"repetition file {path}", alpha)
    return dataclasses.replace(counts, sha256=hashlib.sha256(text.encode()).hexdigest())


def _object(pairs: Sequence[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated += sorted({key for key in keys if keys.count(key) > 1})
    return dict(pairs)


def from_json(data: Any, origin: str = "repetition", alpha: Sequence[float] = ALPHA) -> Repetition:
    """Check a parsed file as `read` does; `origin` opens the messages."""
    if not isinstance(data, Mapping):
        raise Refused(f"{origin} is not an object with the keys layer0, layer1, ...")
    wrong: list[str] = []
    warnings: list[str] = []
    meta = data.get("_meta", {})
    if not isinstance(meta, Mapping):
        wrong.append(f"_meta is {meta!r}; an object is needed")
        meta = {}
    strengths = _alpha(meta.get("alpha", list(alpha)), wrong)
    layers = []
    for index in range(_layer_count(data, wrong)):
        if (key := f"layer{index}") in data:
            layers.append(_layer(key, data[key], len(strengths), wrong, warnings))
    refuse_all(wrong, f"{origin} is not valid:")
    rest = {name: value for name, value in meta.items() if name != "alpha"}
    complete = tuple(layer for layer in layers if layer is not None)
    return Repetition(complete, strengths, rest, origin, tuple(warnings))


def reference(alpha: Sequence[float] = ALPHA) -> Repetition:
    """The counts every example uses, 2,1,2,3 | 2,3,4,3, with the survival that `survival_from_threshold` gives."""
    layers = []
    for count in REFERENCE_COUNTS:
        survival = _padded(survival_from_threshold(count), len(alpha))
        layers.append(LayerRepetition(count, survival, math.fsum(survival)))
    return Repetition(tuple(layers), tuple(alpha), {"source": NOT_MEASURED[0]}, "the reference repetition")


def whole_passes(layers: int, times: int) -> Repetition:
    """`layers` that each run `times`, for every token, at full strength: what a model without recurrence is repeated
    by, which has no counts of its own."""
    layer = LayerRepetition(times, (1.0,) * times, float(times))
    return Repetition((layer,) * layers, (1.0,) * times, {"source": NOT_MEASURED[1]}, "a plain model's passes")


def survival_from_threshold(k_exec: int) -> tuple[float, ...]:
    """s_k = 0.10^((k-1)/k_exec) for k = 1..k_exec: what remains is the threshold 0.10 once the last pass is done."""
    return tuple(THRESHOLD ** (k / k_exec) for k in range(k_exec))


def survival_from_probability(p: float, k_exec: int) -> tuple[float, ...]:
    """s_k = p^(k-1) for k = 1..k_exec: every gate continues with the first gate's mean probability."""
    return tuple(float(p) ** k for k in range(k_exec))


def _padded(survival: Sequence[float], passes: int) -> tuple[float, ...]:
    return (*survival, *[0.0] * (passes - len(survival)))


def _alpha(values: Any, wrong: list[str]) -> tuple[float, ...]:
    if isinstance(values, list) and values and all(is_number(value) and value > 0 for value in values):
        return tuple(float(value) for value in values)
    wrong.append(f"_meta.alpha is {values!r}; a list of positive numbers is needed, for example {list(ALPHA)}")
    return ALPHA


def _layer_count(data: Mapping[str, Any], wrong: list[str]) -> int:
    """One past the highest layer; names the layers missing below it and the keys that mean nothing."""
    found = {int(match[1]) for key in data if (match := _LAYER_KEY.fullmatch(key))}
    unknown = [key for key in data if not _LAYER_KEY.fullmatch(key) and not key.startswith("_")]
    wrong += [f"unknown key {key!r}; keys are layer0, layer1, ... and _meta" for key in unknown]
    count = max(found, default=-1) + 1
    looked_at = min(count, len(found) + 8)  # "layer999999999" must not list a billion missing ones
    missing = [f"layer{index}" for index in range(looked_at) if index not in found]
    if missing or not found:
        wrong.append(f"{', '.join(missing) or 'layer0'} missing; layers are layer0 to layer{{N-1}} without a gap")
    return looked_at


def _layer(key: str, data: Any, passes: int, wrong: list[str], warnings: list[str]) -> LayerRepetition | None:
    if not isinstance(data, Mapping):
        wrong.append(f"{key} is {data!r}; an object with k_exec is needed")
        return None
    before = len(wrong)
    k_exec = _count(f"{key}.k_exec", data, wrong)
    figures = {name: _figure(f"{key}.{name}", data.get(name), name == "p_mu", wrong)
               for name in ("p_mu", "s_fin", "entropy", "ponder")}
    mean_weight, passes_run = _mean_weight(key, data, wrong), _passes_run(key, data, wrong)
    spread, update_square = _between_tokens(key, data, wrong)
    note = data.get("note")
    if note is not None and not isinstance(note, str):
        wrong.append(f"{key}.note is {note!r}; a text is needed")
    if k_exec is None or len(wrong) > before:
        return None
    length = max(passes, k_exec)
    if data.get("survival") is None:
        survival = _padded(_rebuilt(key, k_exec, figures["p_mu"], warnings), length)
    else:
        survival = _survival(f"{key}.survival", data["survival"], length, wrong)
    mean_weight = math.fsum(survival) if mean_weight is None else mean_weight
    return LayerRepetition(k_exec, survival, mean_weight, note=note, passes_run=passes_run, spread=spread,
                           update_square=update_square, **figures)


def _mean_weight(key: str, data: Mapping[str, Any], wrong: list[str]) -> float | None:
    """Under either of its names."""
    given = {name: _figure(f"{key}.{name}", data.get(name), False, wrong) for name in ("mean_weight", "expected_k")}
    now, earlier = given.values()
    _in_range(f"{key}.mean_weight", earlier if now is None else now, wrong)
    if now is not None and earlier is not None and now != earlier:
        wrong.append(f"{key}.mean_weight is {now}, {key}.expected_k {earlier}; the second is the earlier name of the "
                     "first, give one of them")
    return earlier if now is None else now


def _passes_run(key: str, data: Mapping[str, Any], wrong: list[str]) -> float | None:
    """As given, else the sum of `alive`; None where there is neither."""
    given, alive = _figure(f"{key}.passes_run", data.get("passes_run"), False, wrong), data.get("alive")
    if given is not None or alive is None:
        _in_range(f"{key}.passes_run", given, wrong)
        return given
    if not (isinstance(alive, list) and alive and all(map(_share, alive))):
        wrong.append(f"{key}.alive is {alive!r}; a list of numbers from 0 to 1 is needed, one a pass")
        return None
    wrong += _rising(f"{key}.alive", alive)
    summed = math.fsum(alive)
    _in_range(f"{key}.passes_run, the sum of alive,", summed, wrong)
    return summed


def _between_tokens(
    key: str, data: Mapping[str, Any], wrong: list[str]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """`spread` and `update_square`, one number a pass each; None for both where a file has neither."""
    spread, size = data.get("spread"), data.get("update_square")
    if spread is None and size is None:
        return None, None
    if _sizes(spread) and _sizes(size) and len(spread) == len(size):
        return tuple(map(float, spread)), tuple(map(float, size))
    wrong.append(f"{key}.spread is {spread!r}, {key}.update_square {size!r}; two lists of numbers, 0 or more, are "
                 "needed, one number a pass in each")
    return None, None


def _sizes(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(is_number(value) and value >= 0 for value in values)


def _in_range(key: str, passes: float | None, wrong: list[str]) -> None:
    if passes is not None and not 0 < passes <= MOST_PASSES:
        wrong.append(f"{key} is {passes}; a number above 0, at most {MOST_PASSES}, is needed")


def _rebuilt(key: str, k_exec: int, p_mu: float | None, warnings: list[str]) -> tuple[float, ...]:
    if p_mu is None:
        warnings.append(f"{key} has neither survival nor p_mu: survival rebuilt as 0.10^((k-1)/{k_exec}), "
                        f"cut at k_exec {k_exec}")
        return survival_from_threshold(k_exec)
    warnings.append(f"{key} has no survival: rebuilt from p_mu as {p_mu}^(k-1), cut at k_exec {k_exec}")
    return survival_from_probability(p_mu, k_exec)


def _count(key: str, data: Mapping[str, Any], wrong: list[str]) -> int | None:
    if "k_exec" not in data:
        wrong.append(f"{key} is missing; a whole number from 1 to {MOST_PASSES} is needed")
        return None
    value = data["k_exec"]
    if is_number(value) and value == int(value) and 1 <= value <= MOST_PASSES:
        return int(value)
    wrong.append(f"{key} is {value!r}; a whole number from 1 to {MOST_PASSES} is needed")
    return None


def _share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1 + _ROUNDING


def _figure(key: str, value: Any, share: bool, wrong: list[str]) -> float | None:
    if value is None:
        return None
    if _share(value) if share else is_number(value):
        return min(float(value), 1.0) if share else float(value)
    wrong.append(f"{key} is {value!r}; a {'number from 0 to 1' if share else 'finite number'} is needed")
    return None


def _survival(key: str, values: Any, length: int, wrong: list[str]) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != length:
        count = f"{len(values)} values" if isinstance(values, list) else repr(values)
        wrong.append(f"{key} is {count}; a list of {length} numbers is needed, one a pass")
        return ()
    outside = [f"{key}[{index}] is {value!r}; a number from 0 to 1 is needed"
               for index, value in enumerate(values) if not _share(value)]
    wrong += outside or _rising(key, values)
    return tuple(min(float(value), 1.0) for value in values) if not outside else ()


def _rising(key: str, values: Sequence[int | float]) -> list[str]:
    return [f"{key}[{index + 1}] is {after}, above the {before} before it; {key.rpartition('.')[2]} cannot rise"
            for index, (before, after) in enumerate(pairwise(values)) if after > before + _ROUNDING]
