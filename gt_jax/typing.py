"""The notation table of the whole library, and the array aliases built on it.

| letter | axis |
|---|---|
| b | batch (rows of packed text) |
| t | tokens of a row; s where keys are meant and differ from queries |
| d | model width |
| h | heads; hv value heads (a multiple of h), hi indexer heads |
| k, v | key and value width of a head |
| f | hidden width of the MLP |
| n | blocks of a segment (leading axis of every stacked parameter); streams of hyper-connections |
| e | experts |
| l | layers |
| p | passes of adaptive depth |

Float means float32 or the compute dtype; states, gates, norms and softmax are float32 whatever the compute dtype.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, Int

Activations: TypeAlias = Float[Array, "b t d"]
State: TypeAlias = Float[Array, "b t *n d"]
Tokens: TypeAlias = Int[Array, "b t"]
PerToken: TypeAlias = Float[Array, "b t"]
Scalar: TypeAlias = Float[Array, ""]
Tree: TypeAlias = Any
"""A nested dict of arrays (or of their shapes)."""
