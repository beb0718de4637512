"""What tiles of queries and keys hold, and the numbers kept for each query."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array


class Queries(NamedTuple):
    """What belongs to a query: `q` [b,t,h,k], `indexer` [b,t,n,i], `weight` [b,t,n], place and segment [b,t]."""

    q: Array
    indexer: Array
    weight: Array
    position: Array
    segment: Array


class Keys(NamedTuple):
    """What belongs to a key: `k` [b,s,h,k], `v` [b,s,h,v], `indexer` [b,s,n,i], place and segment [b,s]."""

    k: Array
    v: Array
    indexer: Array
    position: Array
    segment: Array


class Selection(NamedTuple):
    """What selects the keys of a query, as in `selection`: `threshold`, `end` [b,t,h]; `sink_end` [b,t].

    Sinks are the visible keys whose index in the row is below `sink_end`.
    """

    threshold: Array
    end: Array
    sink_end: Array
