"""What `conftest.py` makes cheaper still finds what it is there for."""

import flax.linen as nn
import jax.numpy as jnp
import jaxtyping
import pytest
from beartype import beartype
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float


def made():
    """A function inside a function, as the hook of `--jaxtyping-packages` decorates it."""

    @jaxtyping.jaxtyped(typechecker=beartype)
    def inner(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
        return x

    return inner


def test_a_function_inside_a_function_is_checked_the_first_times_that_it_is_made():
    wrong = jnp.zeros(2), jnp.zeros(3)
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError):
            made()(*wrong)
    assert made()(*wrong) is wrong[0]


@jaxtyping.jaxtyped(typechecker=beartype)
def outer(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    return x


def test_a_function_of_a_module_is_checked_at_its_first_calls_in_a_file():
    wrong = jnp.zeros(2), jnp.zeros(3)
    for _ in range(4):
        with pytest.raises(jaxtyping.TypeCheckError):
            outer(*wrong)
    assert outer(*wrong) is wrong[0]


class One(nn.Module):
    @nn.compact
    def __call__(self):
        return self.param("w", nn.initializers.zeros, (3,))


def test_a_parameter_of_another_shape_than_its_module_asks_for_is_refused():
    assert One().apply({"params": {"w": jnp.ones(3)}}).tolist() == [1, 1, 1]
    with pytest.raises(ScopeParamShapeError):
        One().apply({"params": {"w": jnp.ones(2)}})
