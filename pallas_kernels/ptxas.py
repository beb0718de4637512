"""Where NVIDIA's assembler is; imports no JAX, whose settings may still have to be made."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path


def find_ptxas() -> str | None:
    """The assembler that compiles kernels: on the PATH, in CUDA's folder, or in the wheel of NVIDIA."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        folders += [Path(str(file.locate())).parent for file in files if file.name == "ptxas"]
    found = (shutil.which("ptxas", path=path) for path in (None, *map(str, folders)))
    return next((path for path in found if path), None)
