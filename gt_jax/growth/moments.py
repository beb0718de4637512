"""The optimizer's second moments of a grown model: of each weight those of the weight that it is a copy of.

- Adam divides by the root of v, the running mean of a weight's squared gradient. With v = 0 its first steps are as long
  as the rate allows in every weight at once, and the loss rises; with the source's v they are as long as before.
- A copy of strength c gets about c / (sum of strengths) of the source's gradient. v is copied as it is all the same: it
  then is too large at first, so the copy moves less, and forgets that in 1 / (1 - b2) = 20 steps.
- The first moments are left out: they begin at 0, which warms the step up over 1 / (1 - b1) = 10 steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gt_jax.checkpoints.moments import SECOND, UPDATES, stored_moments
from gt_jax.growth import rules
from gt_jax.growth.transform import Abstract, Leaf, Part

_PARAMS = "params/"


def moment_leaves(stored: Abstract, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Second moments and count of updates of the child whose tensors are `leaves`; () where the source holds not all.

    `stored` are all tensors of the source's checkpoint. Each is a copy, block by block, in float32.
    """
    found = stored_moments(stored)
    parameters = [leaf for leaf in leaves if leaf.path.startswith(_PARAMS)]
    needed = {part.source.removeprefix(_PARAMS) for leaf in parameters for part in leaf.parts}
    if found is None or found.lacking({name: stored[_PARAMS + name] for name in needed}, stored):
        return ()
    made = [Leaf(UPDATES, rules.GLOBAL, (Part(found.updates, None, 1.0, None),), (),
                 np.dtype(stored[found.updates].dtype), ())]
    for leaf in parameters:
        parts = tuple(part._replace(source=found.second[part.source.removeprefix(_PARAMS)], coefficient=1.0)
                      for part in leaf.parts)
        path = f"{SECOND}/{leaf.path.removeprefix(_PARAMS)}"
        made.append(Leaf(path, rules.COPIED, parts, leaf.shape, np.dtype(np.float32), leaf.old_shape))
    return tuple(made)
