"""Generated tasks: right answers, true difficulties, no way around the steps, and rows that depend on nothing else."""

import dataclasses
import hashlib
import itertools
import re
from collections import Counter

import numpy as np
import pytest

from gt_jax.errors import Refused
from gt_jax.tasks.draws import Draws
from gt_jax.tasks.group_words import products
from gt_jax.tasks.registry import TASKS, notation, read_task
from gt_jax.tasks.rows import HELD_OUT, TRAINING, TUNING, TaskRows, part_of

WORDS = [  # each task as it is by default, and one that is smaller, longer or of another kind
    "pointer_jumps", "pointer_jumps:easiest=3,hardest=15,symbols=20,queries=5",
    "p_hop", "p_hop:easiest=2,hardest=9,symbols=3,length=90",
    "variable_chains", "variable_chains:hardest=4,chains=3,order=shuffled",
    "variable_chains:hardest=4,chains=3,letters=20,order=backward", "variable_chains:hardest=12,chains=4",
    "addition", "addition:easiest=2,hardest=4,digits=20",
    "group_words", "group_words:group=Z2,hardest=9", "group_words:group=A5,hardest=20",
]  # fmt: skip
Answers = dict[int, tuple[str, int]]  # by place: the answer and its difficulty


def instances(words: str, count: int):
    task = read_task(words)
    return task, [task.draw(Draws(7, 9, number), task.hardest) for number in range(count)]


def solve(task, text: str) -> Answers:
    """Every question of an instance, answered from its symbols alone, step by step."""
    return {
        "pointer_jumps": solve_pointer_jumps, "p_hop": solve_p_hop, "variable_chains": solve_variable_chains,
        "addition": solve_addition, "group_words": solve_group_words,
    }[task.name](task, text)  # fmt: skip


def solve_pointer_jumps(task, text: str) -> Answers:
    *pairs, questions = text.split(".")
    f = {pair[0]: pair[1] for pair in pairs}
    assert sorted(f) == sorted(f.values()) and len(f) == task.symbols
    found, at = {}, len(text) - len(questions)
    for question in re.findall("[A-Za-z]>*", questions):
        seen = [question[0]]
        for jumps in range(1, len(question)):
            seen.append(f[seen[-1]])
            if jumps >= task.easiest:
                found[at + jumps] = (seen[-1], jumps)
        assert len(set(seen)) == len(seen), "fewer jumps would do"
        at += len(question)
    return found


def solve_p_hop(task, text: str) -> Answers:
    hops, letters = int(text[0]), text[1:]
    found = {}
    for i in range(len(letters)):
        at, places = i, [i]
        for _ in range(hops):
            before = letters.rfind(letters[at], 0, at)
            if before < 0:
                break
            at = before + 1
            places.append(at)
        else:
            assert len(set(places)) == hops + 1, "every hop leads somewhere else"
            found[1 + i] = (letters[at], hops)
    return found


def solve_variable_chains(task, text: str) -> Answers:
    pairs = [text[i:i + 2] for i in range(0, len(text), 2)]
    means = {pair[0]: pair[1] for pair in pairs if pair[0] != "?"}
    found = {}
    for place, pair in enumerate(pairs):
        if (pair[0] == "?") != (task.order != "forward"):
            continue
        at, steps = pair[1] if pair[0] == "?" else pair[0], 0
        while not at.isdigit():
            at, steps = means[at], steps + 1
        if task.order == "forward":
            assert steps == 1 or pair[1] in text[: 2 * place: 2], "a definition stands behind those it needs"
        if task.order == "backward" and steps > 1:
            needs = means[pair[1]]
            assert text[::2].index(pair[1]) < text[::2].index(needs), "a definition stands before those it needs"
        steps -= task.order == "forward"  # there the definition that is being read is at hand
        if steps >= task.easiest:
            found[2 * place + 1] = (at, steps)
    return found


def solve_addition(task, text: str) -> Answers:
    left, right = text[: text.index("=")].split("+")
    total = str(int(left) + int(right)).zfill(len(left))
    found, first = {}, text.index("=") + 1
    for place in range(len(left)):
        low = place + 1  # how far to the right one must look to know the carry
        while low < len(left) and int(left[low]) + int(right[low]) == 9:
            low += 1
        needed = max(1, min(low, len(left) - 1) - place)
        if needed >= task.easiest:
            found[first + place] = (total[place], needed)
    return found


def solve_group_words(task, text: str) -> Answers:
    size = {"Z2": 2, "S3": 3, "A5": 5}[task.group]
    even = [p for p in itertools.permutations(range(size))
            if task.group != "A5" or round(np.linalg.det(np.eye(size)[list(p)])) == 1]
    signs = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    product, found = tuple(range(size)), {}
    for place, sign in enumerate(text):
        product = tuple(even[signs.index(sign)][i] for i in product)
        if place + 1 >= task.easiest:
            found[place] = (signs[even.index(product)], place + 1)
    return found


@pytest.mark.parametrize("words", WORDS)
def test_answers_and_difficulties_are_those_of_a_plain_solver(words):
    task, drawn = instances(words, 25)
    for one in drawn:
        text = bytes(one.tokens.tolist()).decode("ascii")
        asked = {int(i): (chr(one.targets[i]), int(one.difficulty[i])) for i in np.flatnonzero(one.targets >= 0)}
        assert asked == solve(task, text)
        assert ((one.difficulty > 0) == (one.targets >= 0)).all()
        assert len(text) <= task.longest
        assert set(text.encode()) | {ord(answer) for answer, _ in asked.values()} <= set(task.alphabet)
    assert max(len(one.tokens) for one in drawn) == task.longest


@pytest.mark.parametrize("words", WORDS)
def test_difficulties_are_all_there_and_none_beyond(words):
    task, drawn = instances(words, 150)
    found = Counter(np.concatenate([one.difficulty[one.difficulty > 0] for one in drawn]).tolist())
    assert set(found) == set(range(task.easiest, task.hardest + 1))
    low = task.draw(Draws(1, 1, 1), task.easiest)
    assert set(low.difficulty[low.difficulty > 0].tolist()) <= {task.easiest}, "what a curriculum begins with"


@pytest.mark.parametrize(("words", "chance"), [
    ("pointer_jumps", 1 / 15), ("p_hop", 1 / 3), ("variable_chains", 1 / 6),
    ("variable_chains:order=shuffled,hardest=4", 1 / 6), ("addition", 1 / 2), ("group_words", 1 / 6),
])  # fmt: skip
def test_no_way_around_the_steps(words, chance):
    """Guesses that look nothing up are right as often as chance: the commonest answer, a neighbour, the last answer."""
    _, drawn = instances(words, 200)
    guesses: dict[str, list[bool]] = {name: [] for name in ("itself", "before", "after", "last answer", "commonest")}
    commonest = Counter(np.concatenate([one.targets[one.targets >= 0] for one in drawn]).tolist()).most_common(1)[0][0]
    for one in drawn:
        places = np.flatnonzero(one.difficulty > 1)  # one step is what stands near
        for i in places.tolist():
            earlier = one.targets[:i][one.targets[:i] >= 0]
            guesses["itself"].append(one.tokens[i] == one.targets[i])
            guesses["before"].append(one.tokens[i - 1] == one.targets[i])
            guesses["after"].append(i + 1 < one.tokens.size and one.tokens[i + 1] == one.targets[i])
            guesses["last answer"].append(earlier.size > 0 and earlier[-1] == one.targets[i])
            guesses["commonest"].append(commonest == one.targets[i])
    for name, right in guesses.items():
        assert np.mean(right) < 1.35 * chance + 0.01, name


def test_a_carry_is_as_likely_as_none_at_every_difficulty():
    """Whoever adds the two digits of a place and looks no further is right at about half of the places of any run."""
    task, drawn = instances("addition", 600)
    right: dict[int, list[bool]] = {}
    for one in drawn:
        left, _, total = bytes(one.tokens.tolist()).decode().partition("+")
        for place in range(1, task.digits + 1):  # the first has no digits of its own
            local = (int(left[place]) + int(total[place])) % 10
            at = len(left) + 1 + len(left) + 1 + place
            if place < task.digits:
                right.setdefault(int(one.difficulty[at]), []).append(chr(one.targets[at]) == str(local))
    assert set(right) == set(range(1, task.hardest + 1))
    for depth, found in right.items():
        # a little above: a run down to the last place gets no carry
        assert abs(np.mean(found) - 0.54) < 0.06 + 4 * 0.5 / np.sqrt(len(found)), depth


@pytest.mark.parametrize("words", ["variable_chains", "group_words", "p_hop"])
def test_an_answer_is_not_told_by_what_comes_later(words):
    """What a later token shows could be used instead of the steps: behind a question nothing depends on the answer."""
    _, drawn = instances(words, 400)
    place = int(np.median(np.flatnonzero(np.mean([one.targets >= 0 for one in drawn], axis=0) > 0.9)))
    pairs = [(int(one.targets[place]), int(one.tokens[place + 1])) for one in drawn if one.targets[place] >= 0]
    table = np.zeros((128, 128))
    for answer, after in pairs:
        table[answer, after] += 1
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    statistic = ((table - expected) ** 2 / expected).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("group", ["Z2", "S3", "A5"])
def test_groups_are_groups(group):
    table = products(group)
    size = len(table)
    assert size == {"Z2": 2, "S3": 6, "A5": 60}[group]
    assert all(sorted(row) == list(range(size)) for row in (*table.tolist(), *table.T.tolist()))
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 200))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])


GOLDEN = {  # of row 3: the same on every machine and with every numpy, or a resumed run goes on with other data
    "pointer_jumps": "7caf5ac058d9b895", "p_hop": "40864a429b5df23d", "variable_chains": "094afb184dab49a7",
    "addition": "19d68774cd157a60", "group_words": "0f4f0ab70432cd2f",
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_a_function_of_seed_and_number(name):
    task = read_task(name)
    rows, again, other = (TaskRows(task, 256, seed, 0.05) for seed in (5, 5, 6))
    third = {key: value.copy() for key, value in rows[3].items()}
    rows[0], again[7]
    for of in (rows, again):
        np.testing.assert_equal(of[3], third)
    assert not np.array_equal(other[3]["tokens"], third["tokens"])
    assert not np.array_equal(rows[4]["tokens"], third["tokens"])
    held_out = TaskRows(task, 256, 5, 0.05, part=HELD_OUT)[3]
    assert not np.array_equal(held_out["tokens"], third["tokens"])
    digest = hashlib.sha256(b"".join(third[key].astype("<i4").tobytes() for key in sorted(third))).hexdigest()
    assert digest[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", TASKS)
def test_rows_hold_whole_instances(name):
    task = read_task(name)
    row = TaskRows(task, 3 * task.longest + 5, 0, 0.05)[0]
    assert all(value.dtype == np.int32 and value.shape == (3 * task.longest + 5,) for value in row.values())
    segments = row["segment_ids"]
    count = int(segments.max())
    assert count >= 3 and (segments[-5:] == 0).all() and (row["targets"][segments == 0] == -1).all()
    for segment in range(1, count + 1):
        here = segments == segment
        text = bytes(row["tokens"][here].tolist()).decode("ascii")
        found = {i: (chr(t), int(d)) for i, (t, d) in enumerate(zip(row["targets"][here].tolist(),
                                                                   row["difficulty"][here].tolist(), strict=True)) if d}
        assert found == solve(task, text)


def drawn_in(part: int, rows: int, **changes) -> set[bytes]:
    """The instances of rows of a task that has 216 different ones, over several seeds."""
    task = read_task("group_words:hardest=3")
    found = set()
    for seed in range(3):
        for index in range(rows):
            row = TaskRows(task, 30, seed, changes.get("held_out", 0.2), changes.get("tuning", 0.0), part)[index]
            found |= {row["tokens"][row["segment_ids"] == s].tobytes() for s in range(1, row["segment_ids"].max() + 1)}
    return found


def test_nothing_held_out_is_ever_trained_on():
    training, held_out = drawn_in(TRAINING, 60), drawn_in(HELD_OUT, 40)
    assert not training & held_out and len(training | held_out) == 216
    assert 0.1 < len(held_out) / 216 < 0.3
    kept = drawn_in(TRAINING, 60, tuning=0.2)
    tuning = drawn_in(TUNING, 40, tuning=0.2)
    assert drawn_in(HELD_OUT, 40, tuning=0.2) == held_out, "a tuning part changes nothing of the held-out part"
    assert not tuning & (held_out | kept) and tuning | held_out | kept == training | held_out


def test_the_split_knows_no_options_and_no_schedule():
    """A longer task, other difficulties or a curriculum hold out the same instances: what is held out stays unseen."""
    task = read_task("group_words:hardest=3")
    for index in range(40):
        one = task.draw(Draws(0, 0, index), 3)
        long = dataclasses.replace(task, hardest=6).draw(Draws(0, 0, index), 3)
        np.testing.assert_equal(one, long)
        assert part_of(one, 0.2) == part_of(long, 0.2)
        assert part_of(one, 0.1) != HELD_OUT or part_of(one, 0.2) == HELD_OUT, "a larger share holds out more"


def test_the_curriculum_rises_evenly_and_stays():
    task = read_task("variable_chains:easiest=2,hardest=6,chains=3")
    rows = TaskRows(task, 128, 1, 0.05, curriculum=50)
    top = [int(rows[index]["difficulty"].max()) for index in range(60)]
    assert top == [2 + 4 * min(index, 50) // 50 for index in range(60)]
    plain = TaskRows(task, 128, 1, 0.05)
    assert int(plain[0]["difficulty"].max()) == 6
    np.testing.assert_equal(rows[55], plain[55])
    early = TaskRows(task, task.longest, 1, 0.05, curriculum=50)[0]
    assert early["segment_ids"].max() == 2, "short instances fill a row that one of the longest would fill"


@pytest.mark.parametrize("words", WORDS)
def test_the_notation_says_everything(words):
    task = read_task(words)
    assert read_task(notation(task)) == task and all(field.name in notation(task) for field in dataclasses.fields(task))


@pytest.mark.parametrize(("words", "says"), [
    ("jumps", "task 'jumps' is not known; the tasks are pointer_jumps, p_hop, variable_chains, addition, group_words"),
    ("p_hop:hops=3,length=x,length=70", "'hops=3' is no option"),
    ("p_hop:length=x", "length is 'x'; it must be a whole number"),
    ("p_hop:length=70,length=70", "length is given twice"), ("p_hop:hardest", "'hardest' is no option"),
    ("pointer_jumps:hardest=8,symbols=8", "symbols is 8"), ("pointer_jumps:symbols=53", "symbols is 53"),
    ("pointer_jumps:queries=0", "queries is 0"), ("pointer_jumps:easiest=0", "1 <= easiest 0 <= hardest 8"),
    ("addition:easiest=5,hardest=4", "1 <= easiest 5 <= hardest 4"), ("addition:hardest=13", "digits is 12"),
    ("p_hop:hardest=10", "hardest is 10"), ("p_hop:symbols=2", "symbols is 2"), ("p_hop:length=27", "length is 27"),
    ("variable_chains:chains=1", "chains is 1"), ("variable_chains:hardest=9", "chains 6 x (hardest 9 + 1)"),
    ("variable_chains:order=up", "'up'"),
    ("variable_chains:chains=11", "chains is 11"), ("group_words:group=S5", "'S5'"),
])  # fmt: skip
def test_what_is_no_task_is_refused(words, says):
    with pytest.raises(Refused) as error:
        read_task(words)
    assert says in str(error.value)


def test_all_that_is_wrong_with_a_task_is_said_at_once():
    with pytest.raises(Refused) as error:
        read_task("pointer_jumps:hardest=60,symbols=60,queries=0")
    assert all(name in str(error.value) for name in ("60 jumps lead", "symbols is 60", "queries is 0"))


def test_rows_that_hold_no_instance_and_tasks_of_hardly_any_are_refused():
    with pytest.raises(Refused, match=r"rows of 83 tokens are too short for task pointer_jumps.*have up to 84"):
        TaskRows(read_task("pointer_jumps"), 83, 0, 0.05)
    with pytest.raises(Refused, match="too few different instances: none of 40,000 is held out"):
        TaskRows(read_task("group_words:group=Z2,hardest=1"), 8, 0, 1e-3, part=HELD_OUT)[0]
    with pytest.raises(Refused, match=r"a share of 1e-09 of task group_words.* is too little .*at least 4e-05"):
        TaskRows(read_task("group_words:group=Z2"), 99, 0, 1e-9, part=HELD_OUT)
