"""A picture that a command is asked for: refused before any work is done where it could not be written."""

from __future__ import annotations

import os
from pathlib import Path

from gt_jax.errors import Refused


def refuse_picture(path: Path | None) -> None:
    """Raise `Refused` for a `--picture` that exists, that is no .png, or whose folder cannot be written to."""
    if path is None:
        return
    if os.path.lexists(path):
        raise Refused(f"--picture {path} exists; name a new file")
    if path.suffix.lower() != ".png":
        raise Refused(f"--picture {path}: pictures are PNG; name it {path.with_suffix('.png').name}")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise Refused(f"--picture {path}: {path.parent} is not a folder that can be written to")
