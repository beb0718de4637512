"""Which implementation of the gated delta rule is chosen on a GPU, and what is said where its kernels cannot run."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptxas
from pallas_kernels.arguments import check_kinds, whole_problems
from pallas_kernels.gated_delta_rule import api, pallas_gpu
from pallas_kernels.gated_delta_rule.api import gated_delta_rule

HOPPER, AMPERE, BLACKWELL = (
    ("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA B200", "10.0")
)  # fmt: skip


def tokens(length=100, key_width=128, value_width=128, dtype=jnp.bfloat16):
    keys, values = jnp.zeros((1, length, 1, key_width), dtype), jnp.zeros((1, length, 2, value_width), dtype)
    gates = jnp.zeros((1, length, 2))
    return keys, keys, values, gates, gates


@pytest.fixture
def on_card(monkeypatch):
    """Compile for a card that is not here, with an installation that lacks nothing."""

    def pretend(card):
        monkeypatch.setattr(api, "target_device", lambda: ("gpu", card[0]))
        monkeypatch.setattr(api, "compute_capability", lambda: card[1])
        monkeypatch.setattr(pallas_gpu, "LEAST_JAX", (0, 1))
        monkeypatch.setattr(pallas_gpu, "find_ptxas", lambda: "ptxas")
        api._say_once.cache_clear()

    return pretend


def best(*arguments, chunk_size=64):
    return api._best(*arguments[:3], chunk_size)


def test_the_kernels_are_chosen_on_hopper(on_card, caplog):
    on_card(HOPPER)
    assert best(*tokens()) == "pallas_gpu"
    assert best(*tokens(key_width=256, value_width=200)) == "pallas_gpu"
    assert not caplog.messages
    assert best(*tokens(length=1)) == "xla"  # one step of the reference
    assert best(*tokens(dtype=jnp.float32)) == "xla"
    assert "float32 tokens" in caplog.text


@pytest.mark.parametrize("card", [AMPERE, BLACKWELL])
def test_other_cards_take_the_xla_path_and_say_so_once(on_card, caplog, card):
    on_card(card)
    assert [best(*tokens()) for _ in range(3)] == ["xla"] * 3
    (message,) = caplog.messages
    assert f"{card[0]} of compute capability {card[1]}, the kernels are for 9.0" in message
    with pytest.raises(ValueError, match=f"compute capability {card[1]}, the kernels are for 9.0"):
        gated_delta_rule(*tokens(), implementation="pallas_gpu")


def test_what_the_installation_lacks_is_said(on_card, monkeypatch, caplog):
    on_card(HOPPER)
    monkeypatch.setattr(pallas_gpu, "LEAST_JAX", (99, 1))
    monkeypatch.setattr(pallas_gpu, "find_ptxas", lambda: None)
    assert best(*tokens()) == "xla"
    assert "is too old: these kernels need 99.1" in caplog.text and "there is no ptxas: install" in caplog.text
    with pytest.raises(ValueError, match="there is no ptxas: install nvidia-cuda-nvcc"):
        gated_delta_rule(*tokens(), implementation="pallas_gpu")


def test_ptxas_is_found_where_cuda_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(ptxas.importlib.metadata, "files", lambda name: [])
    assert ptxas.find_ptxas() is None
    program = tmp_path / "bin" / "ptxas"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert ptxas.find_ptxas() == str(program)


def test_a_cpu_has_no_kernels_of_a_gpu():
    with pytest.raises(ValueError, match="'pallas_gpu' needs a GPU, this is for cpu, where there are reference, xla"):
        gated_delta_rule(*tokens(), implementation="pallas_gpu")


def test_what_the_kernels_do_not_do_is_said(on_card, caplog):
    on_card(HOPPER)
    with pytest.raises(ValueError) as caught:
        gated_delta_rule(*tokens(key_width=257, value_width=300), chunk_size=32, implementation="pallas_gpu")
    for part in ("chunk_size 32 must be 64", "k (1, 100, 1, 257) is wider than 256", "v (1, 100, 2, 300) is wider"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="q must be float32 or bfloat16, got float16"):
        gated_delta_rule(*tokens(dtype=jnp.float16), implementation="pallas_gpu")
    needs = r"across needs \d+,\d+ bytes of shared memory for k padded to 256 and v to 128 in float32, a block has"
    with pytest.raises(ValueError, match=f"{needs} 232,448: narrower heads, or bfloat16, would fit"):
        gated_delta_rule(*tokens(key_width=256, dtype=jnp.float32), implementation="pallas_gpu")


def test_kinds_of_arguments_are_said_before_shapes():
    kinds = check_kinds({"q": [[1.0]], "v": np.ones((1, 2), np.int32), "g": np.ones((0, 2)), "state": None},
                        {"segment_ids": np.ones((1, 2))})  # fmt: skip
    assert not kinds.arrays and kinds.problems == [
        "q must be an array, got list", "v must be float32 or bfloat16, got int32",
        "g must have at least one element an axis, got (0, 2)", "segment_ids must be int32, got float64",
    ]  # fmt: skip
    assert whole_problems({"window": 2.5, "k_max": 4}) == ["window 2.5 must be a whole number"]
