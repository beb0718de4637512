"""Continuing a text token by token: prefill of the prompt, then decoding with a cache.

Decodes with the recurrent state of the D layers and a key/value cache of the G layers; the logits equal those of the
full forward pass, but for models whose tokens depend on what is read with them (gt_jax/evaluation/read_together.py).
An adaptive model keeps one of each per pass. With a memory stream the text goes on chunk by chunk as
it was trained: states start empty, the memory is handed on.
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import Refused, refuse_all
from gt_jax.models.given import HEADING, as_array, wrong_ids, wrong_variables
from gt_jax.models.language_model import LanguageModel, apply_network, empty_cache
from gt_jax.models.layers.memory_stream import no_memory
from gt_jax.typing import Tree

NOT_FINITE = ("logits are not finite (NaN or infinite), so the model says nothing: its training diverged, or its "
              "weights are damaged")
_COLDEST = float(np.finfo(np.float32).tiny)


def sample_token(
    key: Key[Array, "*b"], logits: Float[Array, "b v"], temperature: float, top_k: int | None, top_p: float = 1.0
) -> Int[Array, " b"]:
    """A token a row from softmax(logits / temperature), of the `top_k` most likely, of these the fewest that have
    together at least `top_p`; at least one.

    `key` is one, or one a row. Temperature 0 takes the most likely, infinity any of those that are left alike.
    """
    count = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    best, ids = jax.lax.top_k(logits.astype(jnp.float32), count)
    if temperature < _COLDEST or top_p == 0:  # a float32 would round such a temperature to 0
        return ids[:, 0].astype(jnp.int32)
    scaled = (best - best[:, :1]) / temperature  # the difference first: 0 / inf is 0, and no large number overflows
    if top_p < 1:  # from the most likely down, those before which there is less than top_p
        share = jax.nn.softmax(scaled)
        scaled = jnp.where(jnp.cumsum(share, axis=-1) - share < top_p, scaled, -jnp.inf).at[:, 0].set(0.0)
    keys = key if key.ndim else jax.random.split(key, len(logits))
    place = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def sample(
    config: ModelConfig,
    variables: Tree,
    prompt: ArrayLike | Sequence[Any],
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
    seed: ArrayLike | Sequence[Any] = 0,
    tokens: int | None = None,
    rules: Rules | None = None,
) -> Int[np.ndarray, "b n"]:
    """`length` tokens after each row of `prompt` [b, p]; only the first `tokens` ids of the vocabulary are drawn.

    A `top_k` above `tokens` means all. `seed` is of the first row, the next one's is one more, or a seed a row: a row
    is drawn alike whatever the others are; where they would end each other's passes (halting "batch") each runs by
    itself. Raises `Refused` for variables of another config, a prompt that is empty or
    no whole numbers [b, p], ids outside the vocabulary, a length below 1, a temperature below 0, a top_k below 1, a
    top_p outside 0 … 1, a seed of more than 32 bits, and for logits that are not finite.

    >>> import gt_jax, numpy as np
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> variables = gt_jax.initialise(config, seed=0)
    >>> gt_jax.sample(config, variables, np.array([[100, 101, 102]]), length=3).shape
    (1, 3)
    """
    return sample_timed(
        config, variables, prompt, length, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, tokens=tokens,
        rules=rules,
    ).tokens  # fmt: skip


class Drawn(NamedTuple):
    """What `sample` draws, and the wall time of its two programs without their compilation: reading the prompt, all of
    it at once, and decoding; what runs on the device is waited for."""

    tokens: Int[np.ndarray, "b n"]
    prefill_seconds: float
    decode_seconds: float


def sample_timed(
    config: ModelConfig,
    variables: Tree,
    prompt: ArrayLike | Sequence[Any],
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
    seed: ArrayLike | Sequence[Any] = 0,
    tokens: int | None = None,
    rules: Rules | None = None,
) -> Drawn:
    """`sample`, with how long it took."""
    tokens = config.vocab if tokens is None else tokens
    prompt = as_array(prompt, "the prompt")
    wrong = wrong_ids(prompt, "the prompt", 0, config.vocab)
    rows = len(prompt) if prompt.ndim else 0
    seeds, wrong_seeds = _seeds(seed, rows)
    wrong += wrong_seeds
    wrong += ([f"tokens is {tokens!r}; it must be a whole number in 1 … {config.vocab}"]
              if not isinstance(tokens, numbers.Integral) or not 1 <= tokens <= config.vocab else [])  # fmt: skip
    refuse_all(wrong + wrong_settings(length, temperature, top_k, top_p), "cannot sample:")
    refuse_all(wrong_variables(config, variables), HEADING)
    if rows > 1 and config.adaptive is not None and config.adaptive.halting == "batch":
        alone = [sample_timed(config, variables, prompt[row : row + 1], length, temperature=temperature, top_k=top_k,
                              top_p=top_p, seed=[seeds[row]], tokens=tokens, rules=rules)
                 for row in range(rows)]  # fmt: skip
        return Drawn(np.concatenate([one.tokens for one in alone]), sum(one.prefill_seconds for one in alone),
                     sum(one.decode_seconds for one in alone))  # fmt: skip
    model = LanguageModel(config, rules or Rules())

    chunk = prompt.shape[1] + length if config.memory is None else config.memory.chunk

    def read(variables: Tree, prompt: Array) -> _State:
        return _prefill(model, variables, prompt, chunk, length)

    def decode(variables: Tree, state: _State, keys: Array) -> tuple[Array, Array]:
        by_row = jax.vmap(lambda key: jax.random.split(key, length), out_axes=1)(keys)
        first = min(length, chunk - ((prompt.shape[1] - 1) % chunk + 1))  # what the prompt's last chunk has room for
        whole, rest = divmod(length - first, chunk)

        def step(state: _State, keys: Array) -> tuple[_State, tuple[Array, Array]]:
            logits = state.logits[:, :tokens]
            token = sample_token(keys, logits, temperature, top_k, top_p)
            output = apply_network(model, variables, token[:, None], cache=state.cache, memory=state.entered)
            after = _State(output.cache, output.logits[:, -1], state.entered, output.memory)
            return after, (token, jnp.isfinite(logits).all())

        def opened(carry: tuple[Array, Any], keys: Array) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
            """A chunk that the next token opens: states start empty, the memory goes on."""
            logits, memory = carry
            empty = empty_cache(config, prompt.shape[0], len(keys))
            state, piece = jax.lax.scan(step, _State(empty, logits, memory, memory), keys)
            return (state.logits, state.left), piece

        state, piece = jax.lax.scan(step, state, by_row[:first])
        drawn, carry = [piece], (state.logits, state.left)
        if whole:  # one program for all of them, however many
            chunks = by_row[first : length - rest].reshape(whole, chunk, *by_row.shape[1:])
            carry, pieces = jax.lax.scan(opened, carry, chunks)
            drawn.append(jax.tree.map(lambda a: a.reshape(whole * chunk, *a.shape[2:]), pieces))
        if rest:
            drawn.append(opened(carry, by_row[length - rest :])[1])
        found, finite = (jnp.concatenate(parts) for parts in zip(*drawn, strict=True))
        return jnp.moveaxis(found, 0, 1), finite

    keys = jnp.stack([jax.random.key(one) for one in seeds])
    state, reading = _timed(read, variables, jnp.asarray(prompt, jnp.int32))
    (found, finite), decoding = _timed(decode, variables, state, keys)
    if not np.asarray(finite).all():
        raise Refused(NOT_FINITE)
    return Drawn(np.asarray(found), reading, decoding)


def _seeds(seed: ArrayLike | Sequence[Any], rows: int) -> tuple[list[int], list[str]]:
    """A seed a row, and what is wrong with what was given."""
    given = np.asarray(seed)
    if not np.issubdtype(given.dtype, np.integer) or given.ndim > 1:
        return [], [f"seed is {seed!r}; a whole number is needed, or one a row"]
    given = given.astype(np.int64)
    seeds: list[int] = ((given + np.arange(rows)) if given.ndim == 0 else given).tolist()
    wrong = [] if len(seeds) == rows else [f"there are {len(seeds)} seeds; the prompt has {rows} rows"]
    return seeds, wrong + [f"seed is {one}; it must lie in 0 … {2**32 - 1}" for one in seeds
                           if not 0 <= one < 2**32]  # fmt: skip  # 2**32 is 0


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of a compiled function, and the seconds that it ran."""
    program = jax.jit(work).lower(*arguments).compile()
    began = time.perf_counter()
    made = jax.block_until_ready(program(*arguments))
    return made, time.perf_counter() - began


def wrong_settings(length: int, temperature: float, top_k: int | None, top_p: float) -> list[str]:
    """What is wrong with the settings of `sample`, one line each."""
    if not isinstance(length, numbers.Integral):
        return [f"length is {length!r}; it must be a whole number"]
    wrong = [] if length >= 1 else [f"length is {length}; it must be at least 1"]
    wrong += [] if length < 2**31 else [f"length is {length}; it must be below 2**31"]  # positions are int32
    wrong += [] if temperature >= 0 else [f"temperature is {temperature}; it must be 0 or more"]
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or top_k < 1):
        wrong.append(f"top_k is {top_k!r}; it must be a whole number of at least 1, or None for all")
    return wrong + ([] if 0 <= top_p <= 1 else [f"top_p is {top_p}; it must lie in 0 … 1"])


class _State(NamedTuple):
    """Where decoding stands: the cache of this chunk, logits of the next token, the memory it began with and leaves.

    Both memories are None without a memory stream.
    """

    cache: Tree
    logits: Array
    entered: Any
    left: Any


def _prefill(model: LanguageModel, variables: Tree, prompt: Array, chunk: int, length: int) -> _State:
    """The state after the prompt, which is read in one pass; with a memory stream chunk by chunk, each in one."""
    c, (rows, read) = model.config, prompt.shape
    memory = None if c.memory is None else no_memory(rows, c.width, c.compute_dtype)
    whole = (read - 1) // chunk  # the chunk that is decoded from is read by itself

    def one(memory: Any, piece: Array) -> tuple[Any, None]:
        return apply_network(model, variables, piece, memory=memory).memory, None

    if whole:
        pieces = prompt[:, : whole * chunk].reshape(rows, whole, chunk)
        memory, _ = jax.lax.scan(one, memory, jnp.moveaxis(pieces, 1, 0))
    rest = prompt[:, whole * chunk :]
    cache = empty_cache(model.config, prompt.shape[0], min(chunk, rest.shape[1] + length))
    output = apply_network(model, variables, rest, cache=cache, memory=memory)
    return _State(output.cache, output.logits[:, -1], memory, output.memory)
