"""A picture that a command is asked for: refused before any work is done where it could not be written."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

from gt_jax.errors import Refused
from gt_jax.files import write_atomically, wrong_place


def write_picture(draw: Callable[[io.BytesIO], object], path: Path) -> None:
    """The file of what `draw` draws, whole or not at all; raises FileExistsError where one has come meanwhile."""
    image = io.BytesIO()
    draw(image)
    write_atomically(path, image.getvalue(), replace=False)


def refuse_picture(path: Path | None) -> None:
    """Raise `Refused` for a `--picture` that exists, that is no .png, or that cannot be written where it would lie."""
    if path is None:
        return
    if os.path.lexists(path):
        raise Refused(f"--picture {path} exists; name a new file")
    if path.suffix.lower() != ".png":
        raise Refused(f"--picture {path}: pictures are PNG; name it {path.with_suffix('.png').name}")
    if problem := wrong_place(path):
        raise Refused(f"--picture {path}: {problem}")
