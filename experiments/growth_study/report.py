"""The study's three results on disk: figures as JSON, tables as Markdown, curves as PNG."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from experiments.growth_study.picture import draw
from experiments.growth_study.results import NAME, About, Units, figures, named
from experiments.growth_study.run import Rates
from experiments.growth_study.tables import markdown
from gt_jax.files import write_atomically


def write(output: Path, about: About, units: Units, rates: Rates) -> str:
    """Write OUTPUT/growth_operators.{json,md,png}; returns the Markdown text."""
    found = figures(about.study, units)
    study, folders = named(about.study), {name: Path(name).name for name in about.study.text}
    command = " ".join(["python -m experiments.growth_operators", *(folders.get(w, w) for w in about.command)])
    text = markdown(study, units, found, rates, command)
    output.mkdir(parents=True, exist_ok=True)
    everything = {
        "config": study.to_json(), "content": about.content, "command": command, "versions": versions(),
        "machine": {"cores": _cores(), "device": _device()}, "seconds_of_this_call": about.seconds,
        "rates": rates._asdict(), "figures": found, "units": {str(seed): one for seed, one in units.items()},
    }  # fmt: skip
    write_atomically(output / f"{NAME}.json", json.dumps(everything) + "\n")
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
