"""What every config of the library shares: JSON both ways, all problems of its fields reported at once."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import read_json

C = TypeVar("C", bound="Config")


class Config:
    """Shared behaviour of the dataclasses below: JSON both ways, all problems reported at once."""

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each, naming field, value and what would be right."""
        return []

    def __post_init__(self) -> None:
        # first: `problems` compares values of the right types, and every comparison with NaN is false
        wrong = self._take_types()
        wrong += [f"{field.name} is {value}; it must be finite" for field in dataclasses.fields(self)  # type: ignore[arg-type]
                  if not _finite(value := getattr(self, field.name))]
        refuse_all(wrong or self.problems(), f"{type(self).__name__} is not valid:")

    def _take_types(self) -> list[str]:
        """Each field as its type has it, a list as a tuple, a dtype by its name: equal configs are equal, and hash."""
        wrong = []
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            try:
                if isinstance(value, Mapping):
                    raise TypeError("it is a mapping; `from_json` reads those")
                object.__setattr__(self, name, _typed(hint, value))
            except (TypeError, Refused) as error:
                wrong.append(f"{name}: {error}")
        return wrong

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal config."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls: type[C], data: Mapping[str, Any]) -> C:
        """Read `to_json`'s object; raises `Refused` that lists unknown fields and fields of the wrong type."""
        hints = _hints(cls)
        names = list(hints)
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        wrong = [f"unknown field {key!r}" for key in data if key not in names]
        wrong += [f"field {name!r} is missing" for name in required if name not in data]
        values = {}
        for name in names:
            if name in data:
                try:
                    values[name] = _typed(hints[name], data[name])
                except (TypeError, Refused) as error:  # a nested config refuses by itself
                    wrong.append(f"field {name!r}: {error}")
        refuse_all(wrong, f"{cls.__name__} does not read from this JSON (fields are {', '.join(names)}):")
        return cls(**values)

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed, validated again; raises `Refused` for a field that there is not."""
        known = _hints(type(self))
        refuse_all([f"unknown field {name!r}" for name in changes if name not in known],
                   f"{type(self).__name__} cannot be changed so (fields are {', '.join(known)}):")  # fmt: skip
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def read_object(path: Path, flag: str) -> dict[str, Any]:
    """The JSON object in a file that `flag` names; raises `Refused` for anything else."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise Refused(f"{flag} {path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        found = type(data).__name__
        raise Refused(f"{flag} {path} is not a JSON object of config fields; it has no JSON object, but {found}")
    return data


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config's JSON with the fields of `changes`, object by object."""
    result = dict(base)
    for name, value in changes.items():
        old = base.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _read_hints(of: Any) -> dict[str, Any]:
    """The types of a config class's fields, in their order."""
    hints = typing.get_type_hints(of)
    return {field.name: hints[field.name] for field in dataclasses.fields(of)}


_hints: Callable[[Any], dict[str, Any]] = functools.cache(_read_hints)  # read once: a config is made often


def _finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    """`value` as `hint` (a scalar type, Literal, tuple[float, ...], a config or config | None), or as JSON has that."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in args:
        return None if value is None else _typed(next(a for a in args if a is not type(None)), value)
    if origin is Literal:
        if value in args:
            return args[args.index(value)]
        raise TypeError(f"{value!r} is not one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(args[0], item) for item in value)
        raise TypeError(f"{value!r} is not a list")
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return hint.from_json(value)
        raise TypeError(f"{value!r} is not an object")
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):  # NumPy's
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TypeError("it is a whole number beyond 64 bits")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise TypeError(f"{value!r} is not {hint.__name__}")


def below(config: Config, minimum: int, *names: str) -> list[str]:
    """One line for each named field below `minimum`."""
    values = {name: getattr(config, name) for name in names}
    return [f"{name} is {value}; it must be at least {minimum}" for name, value in values.items() if value < minimum]


def changed_by_file(model: Any, path: Path, **more: Any) -> Any:
    """`model` with the fields that a JSON file names, and `more`, checked together: a layout and what it does without.

    Raises `Refused` for a file or fields that do not fit.
    """
    changes = read_object(path, "--model")
    try:
        return type(model).from_json(merged(model.to_json(), {**changes, **more}))
    except Refused as error:
        raise Refused(f"--model {path}: {error}") from error


def refuse_overruled(path: Path | None, said: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `Refused` where a flag says otherwise of a field than the file of --model, which names it.

    `said` has, by flag in their order, the JSON of what the config is after it, or of the fields that the flag sets.
    """
    if path is None:
        return
    named, found = read_object(path, "--model"), dict[str, str]()
    for flag, fields in said.items():
        for field, there, here in _other_values(named, fields):
            found.setdefault(field, f"{field} is {json.dumps(there)} in {path}, and {flag} makes it "
                                    f"{json.dumps(here)}; leave out one of them")  # fmt: skip
    refuse_all(list(found.values()), "--model and other flags do not say the same:")


def _other_values(named: Mapping[str, Any], fields: Mapping[str, Any], place: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value, other value) of what both JSON objects have, and have otherwise."""
    found: list[tuple[str, Any, Any]] = []
    for name in [name for name in named if name in fields]:
        there, here = named[name], fields[name]
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += _other_values(there, here, f"{place}{name}.")
        elif there != here:
            found.append((f"{place}{name}", there, here))
    return found
