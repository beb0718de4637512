"""Continuing a text token by token: prefill of the prompt, then decoding with a cache.

Decodes with the recurrent state of the D layers and a key/value cache of the G layers; the logits equal those of the
full forward pass. An adaptive model keeps one of each per pass. With a memory stream the text goes on chunk by chunk as
it was trained: states start empty, the memory is handed on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import refuse_all
from gt_jax.models.language_model import LanguageModel, apply_network, empty_cache
from gt_jax.models.layers.memory_stream import no_memory
from gt_jax.typing import Tree


def sample_token(key: Array, logits: Float[Array, "b v"], temperature: float, top_k: int | None) -> Int[Array, " b"]:
    """A token from softmax(logits / temperature) over the `top_k` most likely; the most likely at temperature 0."""
    if top_k is not None:
        floor = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


def sample(
    config: ModelConfig,
    variables: Tree,
    prompt: Int[np.ndarray, "b p"],
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
    tokens: int | None = None,
    rules: Rules | None = None,
) -> Int[np.ndarray, "b n"]:
    """`length` tokens after each row of `prompt`; only the first `tokens` ids of the vocabulary are drawn.

    Raises `Refused` for an empty prompt, a length below 1, a negative temperature or a top_k outside 1 … tokens.

    >>> import gt_jax, numpy as np
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> variables = gt_jax.initialise(config, seed=0)
    >>> gt_jax.sample(config, variables, np.array([[100, 101, 102]]), length=3).shape
    (1, 3)
    """
    tokens = config.vocab if tokens is None else tokens
    wrong = [] if prompt.shape[1] else ["the prompt is empty; give at least one token"]
    wrong += [] if length >= 1 else [f"length is {length}; it must be at least 1"]
    wrong += [] if temperature >= 0 else [f"temperature is {temperature}; it must be 0 or more"]
    if top_k is not None and not 1 <= top_k <= tokens:
        wrong.append(f"top_k is {top_k}; it must lie in 1 … {tokens}")
    refuse_all(wrong, "cannot sample:")
    model = LanguageModel(config, rules or Rules())

    def run(variables: Tree, prompt: Array, key: Array) -> Array:
        chunk = prompt.shape[1] + length if config.memory is None else config.memory.chunk
        state, filled = _prefill(model, variables, prompt, chunk, length)
        keys, done, drawn = jax.random.split(key, length), 0, []

        def step(state: _State, key: Array) -> tuple[_State, Array]:
            token = sample_token(key, state.logits[:, :tokens], temperature, top_k)
            output = apply_network(model, variables, token[:, None], cache=state.cache, memory=state.entered)
            return _State(output.cache, output.logits[:, -1], state.entered, output.memory), token

        while done < length:
            if filled == chunk:  # the next token opens a chunk: states start empty, the memory goes on
                empty = empty_cache(config, prompt.shape[0], min(chunk, length - done))
                state, filled = state._replace(cache=empty, entered=state.left), 0
            steps = min(chunk - filled, length - done)
            state, piece = jax.lax.scan(step, state, keys[done : done + steps])
            filled, done = filled + steps, done + steps
            drawn.append(piece)
        return jnp.moveaxis(jnp.concatenate(drawn), 0, 1)

    return np.asarray(jax.jit(run)(variables, jnp.asarray(prompt, jnp.int32), jax.random.key(seed)))


class _State(NamedTuple):
    """Where decoding stands: the cache of this chunk, logits of the next token, the memory it began with and leaves.

    Both memories are None without a memory stream.
    """

    cache: Tree
    logits: Array
    entered: Any
    left: Any


def _prefill(model: LanguageModel, variables: Tree, prompt: Array, chunk: int, length: int) -> tuple[_State, int]:
    """The state after the prompt and how many tokens of its last chunk it fills; chunks before leave their memory."""
    c, start = model.config, 0
    memory = None if c.memory is None else no_memory(prompt.shape[0], c.width, c.compute_dtype)
    while prompt.shape[1] - start > chunk:
        memory = apply_network(model, variables, prompt[:, start : start + chunk], memory=memory).memory
        start += chunk
    rest = prompt[:, start:]
    cache = empty_cache(model.config, prompt.shape[0], min(chunk, rest.shape[1] + length))
    output = apply_network(model, variables, rest, cache=cache, memory=memory)
    return _State(output.cache, output.logits[:, -1], memory, output.memory), rest.shape[1]
