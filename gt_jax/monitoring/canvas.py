"""matplotlib as every picture here has it: its own defaults, no backend, names shown as they are.

The environment may name a backend that is not installed (a notebook's MPLBACKEND), a matplotlibrc may ask for TeX, and
a name may hold dollars: none of them keeps a picture from being drawn, or changes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """matplotlib with its defaults while the context lasts; also a decorator, `@own_settings()`, of what draws."""
    backend = os.environ.pop("MPLBACKEND", None)  # read, and refused, when matplotlib is imported
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def plain_text(text: str) -> str:
    """A name as matplotlib has to be told it to show just that.

    Dollars begin no mathematics, a `_` in front hides nothing from a legend, and what is no character (a file name in
    another encoding) is escaped.
    """
    shown = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
