"""What a model loses on the way out: logits and loss on a text, as it is and as it comes back from what is written.

- x + g Delta(x), Delta(x) = A(x) + M(x + A(x)), goes out as x + g A(x) + g M(x + g A(x)): the MLP reads another input.
- Tensors that go out in a narrower dtype than ours are rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.opened import Opened
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused
from gt_jax.models.forward import forward
from gt_jax.text.round_trip import lost
from gt_jax.text.tokenizers import chosen_tokenizer, open_tokenizer

OUTPUT = re.compile(r".*/(mixer/output|mlp/((shared|experts)/)?down)/(w|b)")
LAST_NORM = re.compile(r".*/(mixer|mlp)_post_norm/scale")
ROWS, LENGTH = 4, 256


def carries_gain(path: str, post_norm: bool) -> bool:
    """Whether a tensor of a layer is the last that its mixer or MLP is multiplied by."""
    return bool((LAST_NORM if post_norm else OUTPUT).fullmatch(path))


def scaled_by(value: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """gain value, in float32, rounded once."""
    return (value.astype(np.float32) * gain.astype(np.float32)).astype(value.dtype)


def fold_cost(opened: Opened, text: bytes, back: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
              say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """{"logits": largest difference by largest logit, "loss": nats a token, "loss_folded", "tokens"} on a text.

    `back` gives the folded leaves, by path, as they come back from the dtypes that they go out in. The whole model is
    held up to three times: as it is, as it comes back, and in the forward pass. Raises `Refused` for a text that the
    tokenizer does not take, or of fewer than two tokens.
    """
    name = chosen_tokenizer(opened.metadata, None, opened.folder)
    tokenizer = open_tokenizer(name)
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:  # no UTF-8, or nothing that the tokenizer has a token for
        raise Refused(f"the text of --approximate cannot be encoded by tokenizer {name}: {error}") from error
    if missing := lost(tokenizer, [text], [ids]):
        say(f"note: the text of --approximate{missing}")
    ids = ids[: ROWS * LENGTH]
    if len(ids) < 2:
        raise Refused(f"the text has {len(ids)} tokens; at least 2 are needed to measure a loss on")
    length = min(LENGTH, len(ids))
    rows = jnp.asarray(ids[: len(ids) // length * length].reshape(-1, length))
    model = checkpoint.load_model(opened.folder)
    statistics = {"statistics": model.statistics} if model.statistics else {}
    leaves = {f"params/{path}": leaf for path, leaf in flatten(folded(opened.config, model.params)).items()}
    before, after = (
        forward(opened.config, jax.tree.map(jnp.asarray, {**variables, **statistics}), rows).logits
        for variables in ({"params": model.params}, nest(back(leaves))))
    losses = [float(_loss(logits, rows)) for logits in (before, after)]
    difference = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
    return {"logits": difference, "loss": losses[0], "loss_folded": losses[1], "tokens": int(rows.size)}


def folded(config: ModelConfig, params: Any) -> Any:
    """Parameters with gains of 1 in place of those that are neither 0 nor 1, which their projections carry."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    made = dict(leaves)
    for path, value in leaves.items():
        match = re.match(r"segment(\d+)/layer(\d+)/", path)
        if match is None:
            continue
        kind = config.depth.segments[int(match[1])].pattern[int(match[2])]
        gain = leaves[f"{match[0]}gain"]
        carried = np.where(gain == 0, 1, gain)
        if path.endswith("/gain"):
            made[path] = np.where(gain == 0, gain, 1).astype(gain.dtype)
        elif carries_gain(f"params/{path}", config.has_post_norm(kind)):
            made[path] = scaled_by(value, carried.reshape(-1, *[1] * (value.ndim - 1)))
    return nest(made)


def _loss(logits: jax.Array, rows: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows[:, 1:, None], axis=-1)
    return -jnp.mean(chosen)
