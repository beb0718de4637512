"""Cases that the suite leaves to `make exhaustive`."""

from __future__ import annotations

from typing import Any

import pytest


def rarely(*values: Any) -> Any:
    """A case of a `parametrize` for `make exhaustive` alone: another of its kind stands in the suite."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
