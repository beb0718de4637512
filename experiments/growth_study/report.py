"""The study's three results on disk: figures as JSON, tables as Markdown, curves as PNG; written, or made anew."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.growth_study.operators import OPERATORS
from experiments.growth_study.picture import draw
from experiments.growth_study.results import NAME, About, Units, figures, named
from experiments.growth_study.run import CONTROLS, Rates
from experiments.growth_study.study import StudyConfig
from experiments.growth_study.tables import markdown
from gt_jax.configs.json_config import read_object
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import write_atomically


def write(output: Path, about: About, units: Units, rates: Rates) -> str:
    """Write OUTPUT/growth_operators.{json,md,png} of a run; returns the Markdown text."""
    study, folders = named(about.study), {name: Path(name).name for name in about.study.text}
    command = " ".join(["python -m experiments.growth_operators", *(folders.get(w, w) for w in about.command)])
    return _written(output, {
        "config": study.to_json(), "content": about.content, "command": command, "versions": versions(),
        "machine": {"cores": _cores(), "device": _device()}, "seconds_of_this_call": about.seconds,
        "rates": rates._asdict(), "units": {str(seed): one for seed, one in units.items()},
    })  # fmt: skip


def render(output: Path) -> str:
    """Make the three anew from what OUTPUT/growth_operators.json holds of a run, by the rules of today; the text.

    Nothing is trained. Raises `Refused` where there is no such file, or it is no study's.
    """
    file = output / f"{NAME}.json"
    stored = read_object(file, "--output")
    keys = ("config", "content", "command", "versions", "machine", "seconds_of_this_call", "rates", "units")
    if missing := [key for key in keys if key not in stored]:
        raise Refused(f"{file} is no result of this study: it has no {', '.join(missing)}")
    study = StudyConfig.from_json(stored["config"])
    wrong = []
    for seed in map(str, study.seeds):
        wanted = {"source", "analysis", *(one.name for one in OPERATORS), *CONTROLS}
        if missing := sorted(wanted - set(stored["units"].get(seed, {}))):
            wrong.append(f"seed {seed} has no {', '.join(missing)}")
    wrong += [f"seed {seed} is none of the config's" for seed in stored["units"] if seed not in map(str, study.seeds)]
    refuse_all(wrong, f"{file} is of another version of this study, or not whole:")
    return _written(output, {key: stored[key] for key in keys})


def _written(output: Path, run: Mapping[str, Any]) -> str:
    """Figures, tables and curves of a run, written to `output`."""
    study, rates = StudyConfig.from_json(run["config"]), Rates(**run["rates"])
    units: Units = {int(seed): one for seed, one in run["units"].items()}
    found = figures(study, units)
    text = markdown(study, units, found, rates, run["command"])
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / f"{NAME}.json", json.dumps({**run, "figures": found}) + "\n")
    write_atomically(output / f"{NAME}.md", text)
    draw(study, units, found, output / f"{NAME}.png")
    return text


def versions() -> dict[str, str]:
    """What computed it."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "optax", "numpy")}}


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def _device() -> str:
    import jax

    return str(jax.devices()[0].device_kind)
