"""All cases of the report. An operation joins with a module that has `cases()`, and its name here."""

from __future__ import annotations

from experiments.kernels_measured import (
    gated_delta_rule,
    gated_delta_rule_decode,
    hyper_connections,
    sparse_attention,
)
from experiments.kernels_measured.cases import Case

OPERATIONS = (gated_delta_rule, gated_delta_rule_decode, sparse_attention, hyper_connections)


def all_cases() -> dict[str, Case]:
    """By name; raises ValueError for a name given twice."""
    found = [case for operation in OPERATIONS for case in operation.cases()]
    names = [case.name for case in found]
    if len(set(names)) < len(names):
        raise ValueError(f"the names of cases must differ, got {names}")
    return dict(zip(names, found, strict=True))
