"""What float32 means: which products name their precision themselves, and what the option does to the others."""

from __future__ import annotations

import argparse
import types

import jax
import jax.numpy as jnp
import pytest

from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices import precision
from gt_jax.training import loop
from pallas_kernels.gated_delta_rule import reference, xla
from pallas_kernels.sparse_attention.common.selection import indexer_scores
from tests.support import small_model

HIGHEST = jax.lax.Precision.HIGHEST


def products_of(jaxpr):
    """Precisions of the products with float32 factors, of a program and the programs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and "float32" in {v.aval.dtype.name for v in equation.invars}:
            yield equation.params["precision"]
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from products_of(inner)


def gradient_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    summed = lambda *a: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(*a)))  # noqa: E731
    return jax.make_jaxpr(jax.value_and_grad(summed, tuple(range(len(shapes)))))(*arguments).jaxpr


def delta_rule(implementation):
    return lambda q, k, v, g, beta, state: implementation(q, k, v, g, beta, state, None, 1.0, 16)


STATE = ((1, 32, 2, 8), (1, 32, 2, 8), (1, 32, 2, 8), (1, 32, 2), (1, 32, 2), (1, 2, 8, 8))
CASES = {
    "states, chunked": (delta_rule(xla.gated_delta_rule), STATE),
    "states, by the token": (delta_rule(reference.gated_delta_rule), STATE),
    "the scores that select keys": (indexer_scores, ((1, 8, 2, 4), (1, 8, 2, 4), (1, 8, 2), (2,))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_float32_product_of_a_state_or_a_gate_names_full_precision(name):
    """Forward and backward. Those of routers, gates and halting heads: tests/models/test_bfloat16.py."""
    function, shapes = CASES[name]
    found = list(products_of(gradient_of(function, *shapes)))
    assert (found or "token" in name) and set(found) <= {(HIGHEST, HIGHEST)}


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_the_option_is_the_precision_of_products_that_name_none(name):
    seen = []
    with precision.products(name):
        x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
        seen += products_of(jax.make_jaxpr(lambda x: x @ x)(x).jaxpr)
    wanted = {"default": None, "high": jax.lax.Precision.HIGH, "highest": HIGHEST}[name]
    assert seen == [None if wanted is None else (wanted, wanted)]
    assert jax.config.jax_default_matmul_precision is None  # nothing is left behind


def test_a_run_is_trained_with_the_precision_of_its_config(monkeypatch, tmp_path):
    seen = []

    def stopped(*_):
        seen.append(jax.config.jax_default_matmul_precision)
        raise KeyError

    monkeypatch.setattr(loop, "make_trainer", stopped)
    config = RunConfig(model=small_model("D"), train=TrainConfig(matmul_precision="highest"))
    with pytest.raises(KeyError):
        loop.train_run(tmp_path / "run", config, show=False)
    assert seen == ["highest"]


def test_a_gpu_that_rounds_to_tensorfloat_32_is_told_of_once(monkeypatch, capsys):
    for platform, capability, asked, said in (
        ("gpu", "9.0", "default", True), ("gpu", "9.0", "high", True), ("gpu", "9.0", "highest", False),
        ("gpu", "7.5", "default", False), ("cpu", None, "default", False),
        ("gpu", "gfx90a", "default", False),
    ):  # fmt: skip
        device = types.SimpleNamespace(platform=platform, device_kind="a card", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda found=device: [found])
        with precision.computing(asked):
            pass
        with precision.computing(asked, first=False):
            pass
        assert capsys.readouterr().err.count("TensorFloat-32 (10 bits) on this a card") == said


def test_a_name_that_jax_does_not_have_is_refused(capsys):
    p = argparse.ArgumentParser()
    precision.add_precision_flag(p)
    assert p.parse_args([]).matmul_precision == "default"
    with pytest.raises(SystemExit):
        p.parse_args(["--matmul-precision", "tf32"])
    assert "default" in capsys.readouterr().err
