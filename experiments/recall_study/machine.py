"""Checks of the machine: in-context recall, memorisation and parity at a size at which the outcomes are known.

    recall        pairs of a key and a value, drawn anew for every row, then the keys again (MQAR, arXiv 2312.04927)
    noisy_recall  the same with tokens that mean nothing between the pairs (MAD, arXiv 2403.17844)
    memorisation  keys whose values are the same in every row, which so have to be in the weights (MAD)
    parity        of the ones so far (arXiv 2411.12537: a delta rule needs beta up to 2)

What should come out: D, G and A recall; D with beta up to 1 guesses parity, with beta up to 2 it does not.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recall_study.study import Arm, RecallStudy
from experiments.several_seeds import fit, stacked
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused
from gt_jax.models.language_model import LanguageModel, apply_network
from gt_jax.tasks.draws import Draws

RECALL, NOISY, MEMORISATION, PARITY = "recall", "noisy_recall", "memorisation", "parity"
TASKS = (RECALL, NOISY, MEMORISATION, PARITY)
MODELS = {"D": "D*2", "D, beta to 2": "D*2", "D/S": "DS", "G": "G*2", "A": "A*2"}
NEGATIVE = "D, beta to 2"
KEYS = VALUES = 16
NOISE = 8
VOCAB = KEYS + VALUES + NOISE
_STREAM, _HELD_OUT = 83, 84


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineStudy(Config):
    """Every model on every task; `pairs` of a row of recall, `length` tokens of a row of parity."""

    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0, 1)
    width: int = 32
    heads: int = 2
    pairs: int = 8
    length: int = 32
    rows: int = 32
    steps: int = 600
    rate: float = 8e-3
    held_out_rows: int = 128

    def problems(self) -> list[str]:
        wrong = below(self, 1, "width", "heads", "rows", "held_out_rows") + below(self, 2, "steps", "length")
        if not 1 <= self.pairs <= KEYS:
            wrong.append(f"pairs is {self.pairs}; there are {KEYS} keys, it must lie in 1 to {KEYS}")
        wrong += [f"tasks has {name!r}; it must be one of {', '.join(TASKS)}" for name in self.tasks
                  if name not in TASKS]  # fmt: skip
        return wrong

    def model(self, name: str) -> ModelConfig:
        """The model of a name of `MODELS`: two layers, embeddings of unit size."""
        row = self.length if self.length % 8 == 0 else 8 * (self.length // 8 + 1)
        sizes = RecallStudy(width=self.width, heads=self.heads, length=max(64, row), facts=1, stages=(0,))
        config = sizes.model(Arm(MODELS[name], 0.0, ""), VOCAB)
        if name != NEGATIVE:
            return config
        assert config.deltanet is not None
        return config.replace(deltanet=config.deltanet.replace(beta_max=2.0))


class Check(NamedTuple):
    """One unit: a model on a task, all seeds at once."""

    study: MachineStudy
    task: str
    model: str

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"{self.task}/{self.model}"


SCALES = {
    "minutes": MachineStudy(width=16, rows=4, steps=6, held_out_rows=8),
    "small": MachineStudy(),
    "accelerator": MachineStudy(width=128, rows=128, steps=4000, length=128, rate=2e-3, held_out_rows=512),
}


def scaled(scale: str, seeds: tuple[int, ...]) -> MachineStudy:
    """The checks of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return SCALES[scale].replace(seeds=seeds)


def drawn(study: MachineStudy, task: str, seed: int, stream: int, first: int, rows: int) -> dict[str, np.ndarray]:
    """Rows [rows, t] of a task: tokens, targets where something is asked, segment ids."""
    made = [_row(study, task, Draws(seed, stream, first + row)) for row in range(rows)]
    tokens, targets = (np.stack([one[index] for one in made]).astype(np.int32) for index in (0, 1))
    return {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens)}


def _row(study: MachineStudy, task: str, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    if task == PARITY:
        ones = draws.below(2, study.length)
        return ones, np.cumsum(ones) % 2
    keys = draws.permutation(KEYS)[: study.pairs]
    if task == MEMORISATION:
        tokens = np.concatenate([keys, keys[draws.permutation(study.pairs)]])
        return tokens, KEYS + (7 * tokens + 3) % VALUES  # the same in every row, and told in none
    values = draws.below(VALUES, study.pairs)
    told = np.stack([keys, KEYS + values], axis=1)
    if task == NOISY:
        noise = KEYS + VALUES + draws.below(NOISE, 2 * study.pairs).reshape(-1, 2)
        told = np.concatenate([told, noise], axis=1)
    order = draws.permutation(study.pairs)
    tokens = np.concatenate([told.reshape(-1), keys[order]])
    targets = np.concatenate([np.full(told.size, -1), KEYS + values[order]])
    return tokens, targets


def guess(task: str) -> float:
    """The share that is right by chance."""
    return 0.5 if task == PARITY else 1 / VALUES


def make(wanted: Check) -> dict[str, Any]:
    """The unit: a row a seed with the share of right answers, of parity in the last quarter of a row."""
    study, task, config = wanted.study, wanted.task, wanted.study.model(wanted.model)
    seeds, began = study.seeds, time.monotonic()

    def batches(step: int) -> dict[str, np.ndarray]:
        return stacked([drawn(study, task, seed, _STREAM, step * study.rows, study.rows) for seed in seeds])

    trained = fit(config, seeds=seeds, rates=(study.rate,) * len(seeds), steps=study.steps, batches=batches)
    batch = drawn(study, task, 0, _HELD_OUT, 0, study.held_out_rows)
    network = LanguageModel(config)

    def logits(variables: Any) -> Any:
        return apply_network(network, variables, jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])).logits

    picked = np.asarray(jax.jit(jax.vmap(logits))(trained.variables)).argmax(axis=-1)
    late = np.arange(batch["targets"].shape[1]) >= (3 * study.length // 4 if task == PARITY else 0)
    asked = (batch["targets"] >= 0) & late
    right = [float(np.mean((one == batch["targets"])[asked])) for one in picked]
    rows = [{"task": task, "model": wanted.model, "seed": seed, "accuracy": value, "chance": guess(task),
             "loss": round(float(np.mean(trained.curve[-max(1, study.steps // 20):, index])), 4)}
            for index, (seed, value) in enumerate(zip(seeds, right, strict=True))]  # fmt: skip
    shares = " and ".join(f"{100 * value:.0f}" for value in right)
    return {"rows": rows, "line": f"{shares} % right in {time.monotonic() - began:.0f} s"}
