"""Rules that would give wrong outputs are refused."""

import pytest

from gt_jax.devices.sharding import Rules
from gt_jax.errors import Refused


def test_tokens_are_not_cut_over_an_axis_that_cuts_what_they_are_multiplied_with():
    """Each device of the axis would add its share for tokens of its own."""
    with pytest.raises(Refused) as error:
        Rules(batch=("data", "fsdp", "expert", "tensor"), vocab=None)
    lines = str(error.value).splitlines()
    assert [line.split(";")[0] for line in lines[1:]] == [
        "  - heads and batch are both cut over 'tensor'", "  - mlp and batch are both cut over 'tensor'",
        "  - experts and batch are both cut over 'expert'"]  # fmt: skip
    with pytest.raises(Refused, match="experts and batch"):
        Rules(batch=("data", "fsdp", "expert"))
    for experts in (None, "fsdp"):
        assert Rules(batch=("data", "expert"), experts=experts).spec("batch")[0] == ("data", "expert")
