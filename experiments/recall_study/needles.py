"""Needle questions: "Tom has a red ball." among sentences that say nothing of it, and then "Tom has a" what?

    facts and distractors in any order     Tom has a red ball. The dog ran. Mia has a blue hat. …
    questions                              Tom has a [red] ball. Mia has a [blue] …

- Eight names, objects and colours; each fact of a prompt has a name of its own, so it has one answer, a token.
- A question is the fact's own beginning: what has learned from text alone to go on as before can answer it too.
- In training every fact is asked once, and the answers are the only targets. In a test one fact is asked, whose place
  among the others is given; of each prompt there is a twin whose asked fact has another colour and is else the same.
- Nothing is cut: what does not fit a row is refused (`Needles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from gt_jax.errors import Refused
from gt_jax.tasks.draws import Draws
from gt_jax.text.tokenizers import Tokenizer

NAMES = ("Tom", "Lily", "Tim", "Sue", "Ben", "Mia", "Max", "Sam")
OBJECTS = ("ball", "hat", "car", "box", "cup", "doll", "book", "bike")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "pink", "brown")
ANIMALS = ("dog", "bird", "cat", "fish", "cow", "pig", "bear", "fox")
VERBS = ("ran", "sat", "slept", "sang", "ate", "left", "came", "jumped")
FRAME = ("has", "a", "The", ".")
WORDS = (*COLOURS, *NAMES, *OBJECTS, *ANIMALS, *VERBS, *FRAME)
FACT, DISTRACTOR, QUESTION, ANSWER_AFTER = 6, 4, 6, 2
"""Tokens of a fact, of a distractor and of a question with its answer; the answer follows this token of a question."""
_STREAM = 71


class Vocabulary(NamedTuple):
    """The token of each of `WORDS`, and how many tokens there are in all."""

    ids: Int32[np.ndarray, " words"]
    size: int

    @property
    def colours(self) -> Int32[np.ndarray, " 8"]:
        """The tokens of the answers."""
        return self.ids[: len(COLOURS)]

    def of(self, *words: str) -> Int32[np.ndarray, " n"]:
        """The tokens of these words."""
        return self.ids[[WORDS.index(word) for word in words]]


def vocabulary(tokenizer: Tokenizer, name: str) -> Vocabulary:
    """Each word's one token inside a sentence; raises `Refused` where a tokenizer has none."""
    start = tokenizer.encode(b"Tom").tolist()
    ids, wrong = [], []
    for word in WORDS:
        found = tokenizer.encode(f"Tom{'' if word == '.' else ' '}{word}".encode()).tolist()
        if found[: len(start)] != start or len(found) != len(start) + 1 or found[-1] == tokenizer.unknown:
            wrong.append(word)
        ids.append(found[-1])
    if wrong:
        raise Refused(f"tokenizer {name} has no single token for {', '.join(wrong)}: answers are one token, and all "
                      "prompts of one length. The 4,096 pieces of TinyStories have them; without --tokenizer the words "
                      "are tokens of their own beside bytes")
    return Vocabulary(np.array(ids, np.int32), tokenizer.vocab_size)


def beside_bytes(bytes_size: int) -> Vocabulary:
    """The words as tokens of their own after `bytes_size` others, which are the bytes of text."""
    return Vocabulary(np.arange(bytes_size, bytes_size + len(WORDS), dtype=np.int32), bytes_size + len(WORDS))


class Test(NamedTuple):
    """Prompts whose asked fact stands at one place, and their twins; `place` 0 is the beginning, 1 the end.

    `prompts` and `twins` are [n, t], without the question; `questions` [n, 3]; `answers` and `others` [n] the tokens of
    the colour asked for and of the twin's. The asked fact ends before token `told`.
    """

    place: float
    distractors: int
    prompts: Int32[np.ndarray, "n t"]
    twins: Int32[np.ndarray, "n t"]
    questions: Int32[np.ndarray, "n q"]
    answers: Int32[np.ndarray, " n"]
    others: Int32[np.ndarray, " n"]
    told: int


class Needles:
    """Prompts of `facts` facts in rows of `length` tokens; raises `Refused` for a stage that a row would cut."""

    def __init__(self, words: Vocabulary, facts: int, stages: Sequence[int], length: int, seed: int) -> None:
        self._words, self._facts, self._stages, self.length, self._seed = words, facts, tuple(stages), length, seed
        needed = prompt_length(facts, max(stages))
        if needed > length:
            raise Refused(f"a prompt of {facts} facts and {max(stages)} distractors with its questions is {needed} "
                          f"tokens; rows of {length} would cut it")
        names = words.of(*NAMES), words.of(*OBJECTS), words.of(*COLOURS)
        self._names, self._objects, self._colours = names
        self._animals, self._verbs = words.of(*ANIMALS), words.of(*VERBS)
        self._has, self._a, self._the, self._stop = words.of(*FRAME)

    def batch(self, step: int, rows: int, progress: float) -> dict[str, Int32[np.ndarray, "b t"]]:
        """Training rows of step `step`, as many instances in each as fit; the stages up to `progress` (0 to 1)."""
        found = [self._row(step * rows + row, progress) for row in range(rows)]
        return {name: np.stack([one[index] for one in found])
                for index, name in enumerate(("tokens", "targets", "segment_ids"))}  # fmt: skip

    def _row(self, number: int, progress: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        draws = Draws(self._seed, _STREAM, number)
        open_stages = min(len(self._stages), 1 + int(progress * len(self._stages)))
        distractors = self._stages[int(draws.below(open_stages, 1)[0])]
        size = prompt_length(self._facts, distractors)
        row = np.zeros((3, self.length), np.int32)
        row[1] = -1
        for segment in range(self.length // size):
            at = slice(segment * size, (segment + 1) * size)
            row[0, at], row[1, at] = self._instance(draws, distractors)
            row[2, at] = segment + 1
        return row[0], row[1], row[2]

    def _instance(self, draws: Draws, distractors: int) -> tuple[np.ndarray, np.ndarray]:
        facts = self._drawn(draws)
        order = draws.permutation(self._facts + distractors)
        sentences = [*facts, *self._noise(draws, distractors)]
        told = [sentences[index] for index in order.tolist()]
        asked = [facts[index] for index in draws.permutation(self._facts).tolist()]
        tokens = np.concatenate([*told, *asked])
        targets = np.full_like(tokens, -1)
        for question in range(self._facts):
            at = len(tokens) - (self._facts - question) * QUESTION + ANSWER_AFTER
            targets[at] = tokens[at + 1]
        return tokens, targets

    def _drawn(self, draws: Draws) -> list[np.ndarray]:
        """The facts, each of another name."""
        names = self._names[draws.permutation(len(NAMES))[: self._facts]]
        objects = self._objects[draws.below(len(OBJECTS), self._facts)]
        colours = self._colours[draws.below(len(COLOURS), self._facts)]
        return [np.array([name, self._has, self._a, colour, thing, self._stop], np.int32)
                for name, colour, thing in zip(names, colours, objects, strict=True)]  # fmt: skip

    def _noise(self, draws: Draws, count: int) -> list[np.ndarray]:
        animals, verbs = self._animals[draws.below(8, count)], self._verbs[draws.below(8, count)]
        return [np.array([self._the, animal, verb, self._stop], np.int32)
                for animal, verb in zip(animals, verbs, strict=True)]  # fmt: skip

    def test(self, place: float, distractors: int, count: int) -> Test:
        """`count` prompts with `distractors` of them, the asked fact at `place`; their random numbers are their own."""
        made = [self._pair(place, distractors, number) for number in range(count)]
        prompts, twins, questions, answers, others = (np.stack([one[index] for one in made]) for index in range(5))
        before = round(place * distractors) * DISTRACTOR + round(place * (self._facts - 1)) * FACT
        return Test(place, distractors, prompts, twins, questions, answers, others, before + FACT)

    def _pair(self, place: float, distractors: int, number: int) -> tuple[np.ndarray, ...]:
        draws = Draws(self._seed, _STREAM + 1 + round(1000 * place) + 2000 * distractors, number)
        asked, *others = self._drawn(draws)
        shift = int(draws.below(len(COLOURS) - 1, 1)[0]) + 1
        other = self._colours[(np.flatnonzero(self._colours == asked[3])[0] + shift) % len(COLOURS)]
        noise = self._noise(draws, distractors)
        cut, facts_before = round(place * distractors), round(place * (self._facts - 1))
        before = _mixed(draws, [*noise[:cut], *others[:facts_before]])
        after = _mixed(draws, [*noise[cut:], *others[facts_before:]])
        twin = asked.copy()
        twin[3] = other
        prompt, changed = (np.concatenate([*before, one, *after]) for one in (asked, twin))
        return prompt, changed, asked[: ANSWER_AFTER + 1], asked[3], other


def _mixed(draws: Draws, sentences: list[np.ndarray]) -> list[np.ndarray]:
    return [sentences[index] for index in draws.permutation(len(sentences)).tolist()]


def prompt_length(facts: int, distractors: int) -> int:
    """Tokens of a prompt with a question about every fact."""
    return facts * (FACT + QUESTION) + distractors * DISTRACTOR
