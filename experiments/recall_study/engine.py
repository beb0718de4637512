"""Trains one arm with all seeds at once and asks it everything: one call makes one unit, a row a seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.recall_study.material import material, training_rows
from experiments.recall_study.needles import Needles, Test, Vocabulary
from experiments.recall_study.states import INTACT, REST, SWAPPED, ZEROED, Reader, modes_of
from experiments.recall_study.study import MIXED, NEEDLES, PLACES, TEXT, RecallStudy, Wanted, parameters
from experiments.several_seeds import fit, stacked
from gt_jax.evaluation.confidence_intervals import ratio_interval
from gt_jax.evaluation.proportions import proportion_interval
from gt_jax.typing import Tree

CURVE = 20
AT_THE_FACT = (INTACT, SWAPPED, REST, ZEROED)
"""The modes whose cut is right after the asked fact, too: what came later then tells what it read before."""


def make(wanted: Wanted) -> dict[str, Any]:
    """The unit: training, then answers by number of distractors and place, the state test, and bits per byte."""
    study, arm = wanted.study, wanted.arm
    source = material(study.text, study.tokenizer, study.row, study.rows)
    config, words = study.model(arm, source.words.size), source.words
    parts = (TEXT, NEEDLES) if arm.training == MIXED else (arm.training,)
    needles = [_needles(study, words, seed) for seed in study.seeds]
    texts = [training_rows(study.text, study.tokenizer, study.row, study.rows, seed) for seed in study.seeds]

    def batches(step: int) -> dict[str, np.ndarray]:
        progress = step / max(1.0, study.curriculum * study.steps)
        made = {TEXT: lambda index: _rows(texts[index], step, study.rows),
                NEEDLES: lambda index: needles[index].batch(step, study.rows, progress)}  # fmt: skip
        return stacked([_joined([made[part](index) for part in parts]) for index in range(len(study.seeds))])

    began = time.monotonic()
    seeds = study.seeds
    trained = fit(config, seeds=seeds, rates=(study.rate,) * len(seeds), steps=study.steps, batches=batches,
                  parts=len(parts))  # fmt: skip
    asked = Asked(study, words, trained.variables)
    by_stage, tests = asked.by_stage(config), asked.state_tests(config)
    bits = source.bits(config, trained.variables, source.batches("held-out", study.held_out_batches))
    seconds = time.monotonic() - began
    every = max(1, study.steps // CURVE)
    rows = [{"task": arm.training, "model": arm.name, "seed": seed, "layout": arm.layout, "drop": arm.drop,
             "window": arm.window, "parameters": parameters(config), "mlp_width": config.mlp_width,
             "rate": study.rate, "steps": study.steps, "bits_per_byte": bits[index],
             "accuracy": {stage: {place: found[index] for place, found in places.items()}
                          for stage, places in by_stage.items()},
             "state": {cut: {mode: found[index] for mode, found in modes.items()} for cut, modes in tests.items()},
             "curve": [round(float(value), 4) for value in trained.curve[::every, index]]}
            for index, seed in enumerate(seeds)]  # fmt: skip
    return {"rows": rows, "line": f"{_said(rows)} in {seconds:.0f} s"}


def _said(rows: Sequence[dict[str, Any]]) -> str:
    follow = " and ".join(f"{100 * row['state']['question'][SWAPPED]['follows']['value']:.0f}" for row in rows)
    right = " and ".join(f"{100 * row['state']['question'][INTACT]['stays']['value']:.0f}" for row in rows)
    bits = " and ".join(f"{row['bits_per_byte']:.3f}" for row in rows)
    return f"{right} % right, {follow} % follow the swapped state, {bits} bits per byte"


def _needles(study: RecallStudy, words: Vocabulary, seed: int) -> Needles:
    return Needles(words, study.facts, study.stages, study.row, seed)


def _rows(rows: Any, step: int, count: int) -> dict[str, np.ndarray]:
    found = [rows[step * count + row] for row in range(count)]
    return {name: np.stack([one[name] for one in found]) for name in ("tokens", "targets", "segment_ids")}


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


TEST_SEED = 2**31
"""Prompts of tests are of no training's seed."""


class Asked:
    """What a trained model answers; all seeds are asked the same prompts."""

    def __init__(self, study: RecallStudy, words: Vocabulary, variables: Tree) -> None:
        self._study, self._words, self._variables = study, words, variables
        self._needles = Needles(words, study.facts, study.stages, study.row, TEST_SEED)

    def tests(self, distractors: int) -> list[Test]:
        """The prompts of one difficulty, by place."""
        return [self._needles.test(place, distractors, self._study.prompts) for place in PLACES]

    def by_stage(self, config: Any) -> dict[str, dict[str, list[float]]]:
        """The share of right answers by number of distractors, by place, by seed."""
        found: dict[str, dict[str, list[float]]] = {}
        for distractors in self._study.stages:
            found[str(distractors)] = {}
            for test in self.tests(distractors):
                reader = Reader(config, self._study.row)
                caches = reader.remembered(self._variables, test.prompts)
                picked = self.picked(reader.logits(self._variables, caches, test.questions))
                found[str(distractors)][f"{test.place:g}"] = np.mean(picked == test.answers, axis=1).tolist()
        return found

    def picked(self, logits: np.ndarray) -> np.ndarray:
        """The most likely of the 8 colours [s, n]."""
        colours = self._words.colours
        return colours[np.argmax(logits[:, :, colours], axis=-1)]

    def state_tests(self, config: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """By cut and mode, by seed: the shares that `stays` with the prompt's colour and `follows` the twin's.

        `costs` are points lost against the intact cache, of the same prompts. All intervals are over prompts.
        """
        modes, tests = modes_of(config), self.tests(max(self._study.stages))
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for cut, asked in (("question", modes), ("fact", tuple(mode for mode in AT_THE_FACT if mode in modes))):
            picked: dict[str, list[np.ndarray]] = {mode: [] for mode in asked}
            for test in tests:
                at = test.prompts.shape[1] if cut == "question" else test.told
                reader = Reader(config, self._study.row)
                for mode, logits in reader.by_mode(self._variables, test, at, asked).items():
                    picked[mode].append(self.picked(logits))
            mine = np.concatenate([test.answers for test in tests])
            twins = np.concatenate([test.others for test in tests])
            chosen = {mode: np.concatenate(each, axis=1) for mode, each in picked.items()}
            found[cut] = {mode: [_shares(colours, chosen[INTACT][index], mine, twins)
                                 for index, colours in enumerate(each)] for mode, each in chosen.items()}  # fmt: skip
        return found


def _shares(picked: np.ndarray, intact: np.ndarray, mine: np.ndarray, twins: np.ndarray) -> dict[str, Any]:
    ones = np.ones(len(mine))
    right = (picked == mine).astype(np.float64)
    lost = (intact == mine).astype(np.float64) - right
    return {"stays": proportion_interval(right, ones).to_json(),
            "follows": proportion_interval((picked == twins).astype(np.float64), ones).to_json(),
            "costs": ratio_interval(lost, ones).to_json()}  # fmt: skip
