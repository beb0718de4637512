"""The shapes of the delta rule that are measured, and numbers for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOKENS = (2048, 8192, 32768)
HEADS = ((16, 16), (16, 32), (16, 64))  # of queries and keys; of values
WIDTH = 128
DECODED = (1, 64)  # rows that take one token each


class Case(NamedTuple):
    """One shape; with one token a row it is a step of decoding, from a state."""

    rows: int
    tokens: int
    heads: int
    value_heads: int
    width: int = WIDTH

    @property
    def decodes(self) -> bool:
        return self.tokens == 1

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.tokens}, {self.heads}/{self.value_heads} heads"


class Inputs(NamedTuple):
    """Unit queries and keys, values, log decays, betas, the state before, and the gradient that comes in; float32."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    state: np.ndarray
    d_output: np.ndarray


def cases(tokens: tuple[int, ...] = TOKENS, heads: tuple[tuple[int, int], ...] = HEADS) -> list[Case]:
    """Whole rows of every length and number of heads, then steps of decoding."""
    whole = [Case(1, t, h, hv) for t in tokens for h, hv in heads]
    return whole + [Case(rows, 1, h, hv) for rows in DECODED for h, hv in heads]


def make_inputs(case: Case) -> Inputs:
    """Drawn from a fixed seed."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    rows, tokens, heads, values, width = case
    q, k = (draw(rows, tokens, heads, width) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, d_output = (draw(rows, tokens, values, width) for _ in range(2))
    g = -0.1 * rng.standard_exponential((rows, tokens, values), np.float32)
    beta = rng.random((rows, tokens, values), np.float32)
    return Inputs(q, k, v, g, beta, draw(rows, values, width, width), d_output)
