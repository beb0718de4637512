"""Growth of a lambda stack: which copy of a layer mixes with the embedding, and where skips start and end.

Before layer l the stack mixes x <- a x + b x0, once, whatever the number of its passes. So the first copy of a layer
has the source's a and b, and every other copy a = 1 and b = 0:

    x_1 = a x + b x0,    x_{j+1} = x_j + c_j Delta(x_j)

- This is the recurrence itself: exact where a layer's copies stand in its order (carry gain). Copies of strength 0
  change nothing at all, wherever they stand.
- To deal a and b out, a^(1/n) and b (a^(1/n) - 1) / (a - 1) to each of n copies, comes to the same x where all updates
  are 0, but the first update then reads a^(1/n) x + ... and all but the last are multiplied by powers of a. The error
  is of first order in Delta, where with the first copy alone it is 0. (b / n instead of the second is not even exact
  without updates, but where a is 1.)

A skip (i, j) adds the output of layer i before the mixing of layer j, or behind the last layer, also once: in the
child before the first copy of j, or behind the last. Where nothing stands between the copies of i, its output is that
of the last of them. Where layers are copied together as a group and the skip stays in it, the first copies keep it:
exact where the others add nothing. A skip that leaves such a group is refused, but from its last layer: nowhere in the
child is layer i done and the others not.
"""

from __future__ import annotations

from collections.abc import Sequence

from gt_jax.growth.plan_entries import Plan

Skips = Sequence[Sequence[int]]


def grown_skips(skips: Skips, plan: Plan) -> tuple[tuple[int, int], ...]:
    """The skips of the child, by target layer, in the source's order; those of `cannot_keep_skips` must be none."""
    return tuple((start, end) for start, end, _ in (_place(pair, plan) for pair in skips))


def cannot_keep_skips(skips: Skips, plan: Plan) -> list[str]:
    """Why skips have no place in the child of a plan: a line for each of them that has none."""
    return [f"stack.skips has {list(pair)}: {why}" for pair in skips if (why := _place(pair, plan)[2])]


def _place(skip: Sequence[int], plan: Plan) -> tuple[int, int, str]:
    """(from, to) of a skip in the child, and what is in the way or ""."""
    source, target = skip
    first = {entry.source: at for at, entry in enumerate(plan.entries) if entry.copy == 1}
    first[len(plan.source_layout)] = len(plan.entries)  # behind the last layer
    if absent := [layer for layer in (source, target) if layer not in first]:
        return 0, 0, f"layer {' and layer '.join(map(str, absent))} has no first copy in the plan"
    group = _group(source, plan)
    members = {plan.entries[at].source for at in group}
    if target in members:
        start = first[source]
        while start + 1 < len(plan.entries) and plan.entries[start + 1].source == source:
            start += 1
    elif plan.entries[group[-1]].source == source:
        start = group[-1]
    else:
        others = ", ".join(str(layer) for layer in sorted(members - {source}))
        return 0, 0, (f"it leaves the part that is copied as a whole: passes of layer {source} stand among those of "
                      f"layers {others}, and nowhere before layer {target} is layer {source} done alone; --plan layer "
                      "keeps the passes of each layer together")
    if start >= first[target]:
        return 0, 0, f"in the plan layer {source} is done at {start}, after layer {target} begins at {first[target]}"
    return start, first[target], ""


def _group(layer: int, plan: Plan) -> list[int]:
    """The target layers of all source layers whose copies stand among those of `layer`, in order; no identities."""
    ranges: dict[int, list[int]] = {}
    for at, entry in enumerate(plan.entries):
        if entry.copy > 0:
            ranges.setdefault(entry.source, []).append(at)
    begin, end = ranges[layer][0], ranges[layer][-1]
    while True:
        touching = [places for places in ranges.values() if places[0] <= end and places[-1] >= begin]
        wider = min(places[0] for places in touching), max(places[-1] for places in touching)
        if wider == (begin, end):
            return [at for at in range(begin, end + 1) if plan.entries[at].copy > 0]
        begin, end = wider
