"""The split: disjoint and complete, a sample of the text by length, the same for the same text, copies together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.configs.data import DataConfig
from gt_jax.text.split import Parts, content_keys, split_documents

HELD = 0.05


def config(row: int, held_out: float = HELD, **changes) -> DataConfig:
    return DataConfig(sequence_length=row, held_out=held_out, **changes)


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return content_keys(f"{seed} {i}".encode() for i in range(count))


def owners(ends: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Which document each span is of; it must lie within one."""
    first, last = np.searchsorted(ends, spans - np.array([[0, 1]]), side="right").T
    assert (first == last).all(), "a span lies within one document"
    return first


def long_tailed(seed: int, count: int = 800, spread: float = 1.6) -> np.ndarray:
    """Lengths of documents whose longest are a large part of the text: token-weighted mean seven times the mean."""
    return np.maximum(2, np.exp(np.random.default_rng(seed).normal(7, spread, count))).astype(np.int64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 300) | st.sampled_from((2, 5000)), min_size=1, max_size=90),
       shares=st.tuples(st.floats(0.001, 0.999), st.just(0.0) | st.floats(0.001, 0.9)), row=st.integers(2, 40),
       rule=st.sampled_from(("fill", "sample")), copies=st.booleans())  # fmt: skip
def test_parts_are_disjoint_cover_everything_and_have_a_row_each(lengths, shares, row, rule, copies):
    held_out, tuning = shares
    tuning = tuning * (1 - held_out) if rule == "sample" else 0.0
    ends = np.cumsum(lengths)
    if ends[-1] < (3 if tuning else 2) * row:
        return
    keys = content_keys(f"{i % 7} {length}".encode() if copies else b"%d" % i for i, length in enumerate(lengths))
    parts = split_documents(ends, keys, config(row, held_out, tuning=tuning, split=rule))
    covered = np.concatenate([np.arange(start, stop) for start, stop in np.concatenate(parts)])
    assert sorted(covered.tolist()) == list(range(ends[-1]))
    for spans in parts if tuning else parts[:2]:
        assert np.diff(spans).sum() >= row and (np.diff(spans) > 0).all()
        owners(ends, spans)
    assert tuning or len(parts.tuning) == 0


def weights(lengths: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log length of the document of each span, and the tokens of the span."""
    return np.log(lengths[owners(np.cumsum(lengths), spans)]), np.diff(spans)[:, 0].astype(float)


def compared(part: str, settings: DataConfig, texts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By text: the part's share of the tokens; how far its mean log length (by token) is from the text's, in standard
    errors of a sample of documents; and the largest distance of the two distributions, times the root of its size."""
    shares, misses, distances = [], [], []
    for seed in range(texts):
        lengths = long_tailed(seed)
        ends = np.cumsum(lengths)
        own, tokens = weights(lengths, getattr(split_documents(ends, keys_of(len(lengths), seed), settings), part))
        shares.append(tokens.sum() / ends[-1])
        freedom = tokens.sum() ** 2 / np.square(tokens).sum()  # how many documents of one length would say as much
        mean = np.average(np.log(lengths), weights=lengths)
        spread = np.sqrt(np.average((np.log(lengths) - mean) ** 2, weights=lengths))
        misses.append((np.average(own, weights=tokens) - mean) / (spread / np.sqrt(freedom)))
        grid = np.sort(np.log(lengths))
        of_text = np.cumsum(np.sort(lengths)) / ends[-1]
        of_part = np.array([tokens[own <= x + 1e-9].sum() for x in grid]) / tokens.sum()
        distances.append(np.abs(of_text - of_part).max() * np.sqrt(freedom))
    return np.array(shares), np.array(misses), np.array(distances)


@pytest.mark.parametrize("part", ["held_out", "tuning"])
def test_a_part_has_the_lengths_of_the_text(part):
    shares, misses, distances = compared(part, config(64, tuning=HELD), texts=40)
    np.testing.assert_allclose(shares, HELD, rtol=0.2)
    assert abs(np.mean(misses)) < 0.3 and np.abs(misses).max() < 1
    assert max(distances) < 1.36, "Kolmogorov and Smirnov's 5 % bound"


def test_the_earlier_rule_passes_over_long_documents():
    """So the test above tells the two apart."""
    _, misses, distances = compared("held_out", config(64, split="fill"), texts=10)
    assert np.mean(misses) < -0.5 and np.abs(misses).max() > 1.5 and max(distances) > 1.36


def test_of_a_very_long_document_the_end_is_held_out():
    lengths = np.full(400, 3000)
    lengths[7] = 1_000_000
    stop = int(lengths[:8].sum())
    training, held_out, tuning = split_documents(np.cumsum(lengths), keys_of(400), config(64, tuning=0.02))
    for spans, wanted in ((training, [stop - 1_000_000, stop - 70_000]), (held_out, [stop - 50_000, stop]),
                          (tuning, [stop - 70_000, stop - 50_000])):  # fmt: skip
        assert wanted in spans.tolist()
    np.testing.assert_allclose(np.diff(held_out).sum(), HELD * lengths.sum(), rtol=0.01)


def test_whole_documents_where_they_are_alike_and_even_pieces_where_there_is_one():
    keys = keys_of(400)
    whole = split_documents(np.cumsum(np.full(400, 3000)), keys, config(256)).held_out
    assert len(whole) == HELD * 400 and (np.diff(whole) == 3000).all()
    one = split_documents(np.array([1_115_394]), keys[:1], config(256)).held_out
    assert len(one) >= 4 and np.diff(one).max() <= 65536
    np.testing.assert_allclose(np.diff(one).sum() / 1_115_394, HELD, atol=0.005)


def test_the_same_documents_give_the_same_split_whatever_their_order():
    lengths, keys = long_tailed(1), keys_of(800)
    settings = config(64, tuning=0.1)

    def chosen(order: np.ndarray) -> list[set[int]]:
        split = split_documents(np.cumsum(lengths[order]), keys[order], settings)
        return [set(order[owners(np.cumsum(lengths[order]), spans)].tolist()) for spans in split]

    forward = chosen(np.arange(800))
    assert chosen(np.arange(800)) == forward == chosen(np.random.default_rng(0).permutation(800))
    other = split_documents(np.cumsum(lengths), keys_of(800, seed=1), settings)
    assert set(owners(np.cumsum(lengths), other.held_out).tolist()) != forward[1]
    plain = split_documents(np.cumsum(lengths), keys, config(64))
    np.testing.assert_array_equal(plain.held_out, split_documents(np.cumsum(lengths), keys, settings).held_out)


def test_copies_of_a_document_are_in_one_part():
    documents = [b"%d " % (i % 60) * 50 for i in range(180)]  # each three times
    lengths = np.array([len(document) + 1 for document in documents])
    split = split_documents(np.cumsum(lengths), content_keys(documents), config(16, 0.2, tuning=0.2))
    found = [{documents[i] for i in owners(np.cumsum(lengths), spans)} for spans in split]
    assert all(found) and not any(found[a] & found[b] for a, b in ((0, 1), (0, 2), (1, 2)))


def test_golden_splits():
    """What a checkpoint calls held out must not change between versions: neither rule may move by a token."""
    lengths = [3169, 3, 277, 63, 75, 107, 7, 104, 40, 21687, 208, 87, 97, 54, 30, 82, 305, 103, 624, 109, 153, 1508,
               336, 69, 112, 333, 2704, 99, 102, 667, 39, 95, 557, 354, 170, 405, 2, 686, 35, 12, 224, 424, 76, 29,
               154, 137, 1222, 455, 198, 786, 109, 37, 356, 355, 107, 45, 209, 3, 417, 310]  # fmt: skip
    keys = keys_of(len(lengths))

    def split(rule: str) -> Parts:
        return split_documents(np.cumsum(lengths), keys, config(16, 0.1, split=rule))

    assert split("fill").held_out.tolist() == FILLED
    assert split("sample").held_out.tolist() == SAMPLED
    for rule in ("fill", "sample"):
        even = split_documents(np.array([1000]), keys[:1], config(16, 0.2, split=rule)).held_out
        assert even.tolist() == [[200, 250], [450, 500], [700, 750], [950, 1000]]


def test_a_single_long_document_holds_out_twenty_places():
    """An interval is over places there: four of them bound little. The earlier rule keeps its four."""
    for rule, places in (("fill", 4), ("sample", 20)):
        held_out = split_documents(np.array([40_000]), keys_of(1), config(16, 0.1, split=rule)).held_out
        assert len(held_out) == places and np.diff(held_out).sum() == pytest.approx(4_000, rel=0.02)


FILLED = [[3169, 3172], [3694, 3701], [3805, 3845], [25924, 25978], [26395, 26498], [26498, 27122], [29228, 29297],
          [32446, 32545], [33448, 34005], [34359, 34529], [34934, 34936], [34936, 35622], [35622, 35657],
          [35657, 35669], [36393, 36422], [36713, 37935], [39520, 39876], [40338, 40383], [40592, 40595]]  # fmt: skip
SAMPLED = [[2853, 3169], [3587, 3694], [23364, 25532], [26090, 26395], [28742, 28892], [32176, 32446], [34936, 35622],
           [37813, 37935], [39374, 39483], [40338, 40383], [40592, 40595]]  # fmt: skip
