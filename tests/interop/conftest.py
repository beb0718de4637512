"""The contract's leaves stand in for the model's code, which takes half a minute to say the same."""

import pytest

from gt_jax.interop import expected_tensors
from tests.interop import origin


@pytest.fixture(autouse=True)
def contract_leaves(monkeypatch):
    monkeypatch.setattr(expected_tensors, "model_leaves", origin.contract)
