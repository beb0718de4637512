"""The study of recall as frozen configs: hybrids, their size and what they are trained on; a unit is an arm, all seeds.

    text        the next token of text
    needles     the answers of needle questions, their distractors rising over the first part of the run
    mixed       both: as many rows of text as "text" has, and as many needles as "needles"

So what recall costs in text is read off models that saw the same text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import contract, units
from experiments.recall_study.needles import prompt_length
from experiments.seeds_and_rates import wrong_seeds
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.data import BYTES
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.presets import groundthink
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.errors import Refused, refuse_all
from gt_jax.models.language_model import abstract

TEXT, NEEDLES, MIXED = "text", "needles", "mixed"
TRAININGS = (TEXT, NEEDLES, MIXED)
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Arm(NamedTuple):
    """A layout, the share of rows whose local path is dropped in training (0 without S layers), the training, and the
    tokens that the local path sees, 0: the study's `window`."""

    layout: str
    drop: float
    training: str
    window: int = 0

    @property
    def name(self) -> str:
        """What pages call it."""
        window = f", window {self.window}" if self.window else ""
        drop = f"{window}, local path dropped for {100 * self.drop:.0f} %" if "S" in self.layout else ""
        return f"{self.layout}{drop}, trained on {self.training}"


def arms(layout: str, drops: Sequence[float] = (0.0,), trainings: Sequence[str] = TRAININGS, window: int = 0
         ) -> tuple[Arm, ...]:  # fmt: skip
    """An arm of each."""
    return tuple(Arm(layout, drop, training, window) for training in trainings for drop in drops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallStudy(Config):
    """Arms at one size. `stages` are numbers of distractors, the last the hardest; `prompts` are tested at each place.

    `length` is the row's, 0: as long as the longest prompt. The curriculum ends after `curriculum` of the steps.
    `as_large_as`: the layout whose number of parameters all arms have, by the width of their MLPs; "": MLPs are alike.
    """

    layouts: tuple[str, ...] = ()
    drops: tuple[float, ...] = ()
    trainings: tuple[str, ...] = ()
    windows: tuple[int, ...] = ()
    as_large_as: str = ""
    text: tuple[str, ...] = ()
    tokenizer: str = BYTES
    seeds: tuple[int, ...] = (0, 1)
    width: int = 32
    heads: int = 2
    window: int = 65
    facts: int = 4
    stages: tuple[int, ...] = (0, 10, 30, 50, 57)
    length: int = 0
    rows: int = 4
    steps: int = 600
    curriculum: float = 0.5
    rate: float = 6e-3
    prompts: int = 48
    held_out_batches: int = 24

    def problems(self) -> list[str]:
        wrong = below(self, 1, "width", "heads", "window", "rows", "prompts", "held_out_batches")
        wrong += below(self, 2, "steps")
        if not len(self.layouts) == len(self.drops) == len(self.trainings) == len(self.windows):
            wrong.append("layouts, drops, trainings and windows name the arms together; they must be as long")
        wrong += [f"trainings has {name!r}; it must be one of {', '.join(TRAININGS)}"
                  for name in self.trainings if name not in TRAININGS]
        if not 1 <= self.facts <= 8:
            wrong.append(f"facts is {self.facts}; there are 8 names, it must lie in 1 to 8")
        if not self.stages or min(self.stages) < 0:
            wrong.append(f"stages is {list(self.stages)}; it must name one or more numbers of distractors")
        if self.heads >= 1 and self.width % (2 * self.heads):
            wrong.append(f"width is {self.width}; it must be a multiple of 2 * heads {2 * self.heads}")
        wrong += wrong_seeds(self.seeds)
        if not wrong and self.row < (needed := prompt_length(self.facts, max(self.stages))):
            wrong.append(f"length is {self.length}; prompts of {max(self.stages)} distractors are {needed} tokens and "
                         "would be cut")
        return wrong

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return self.length or -(-prompt_length(self.facts, max(self.stages)) // 8) * 8

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms."""
        return tuple(map(Arm, self.layouts, self.drops, self.trainings, self.windows))

    settings = arms  # what a study with --keep calls what it compares

    def of(self, arms: Sequence[Arm]) -> RecallStudy:
        """The study of other arms."""
        layouts, drops, trainings, windows = zip(*arms, strict=True) if arms else ((), (), (), ())
        return self.replace(layouts=layouts, drops=drops, trainings=trainings, windows=windows)

    def model(self, arm: Arm, vocab: int) -> ModelConfig:
        """The model: with S layers one of the GroundThink hybrids, else D layers of our own between the others.

        All have a tied and normed table, and none differs in anything but its mixers, and the MLPs that make up for
        them where `as_large_as` asks for it.
        """
        plain = self._plain(arm, vocab)
        if not self.as_large_as or arm.layout == self.as_large_as:
            return plain
        wanted, have, more = map(parameters, (
            self._plain(Arm(self.as_large_as, 0.0, TEXT), vocab), plain,
            plain.replace(mlp_width=plain.mlp_width + 1)))  # fmt: skip
        return plain.replace(mlp_width=plain.mlp_width + round((wanted - have) / (more - have)))

    def _plain(self, arm: Arm, vocab: int) -> ModelConfig:
        width, each = self.width, self.width // self.heads
        base = groundthink("DS", vocab, width, self.heads, each)
        assert base.deltanet is not None and base.sliding is not None
        common = base.replace(mlp_width=2 * width, init_std=width**-0.5)
        if "S" in arm.layout:
            seen, left = arm.window or self.window, 1 - arm.drop
            sliding = base.sliding.replace(window=seen, drop=arm.drop, evaluation_scale=left)
            return common.replace(layout=arm.layout, sliding=sliding, deltanet=base.deltanet.replace(chunk_size=32))
        most = min(64, self.row)
        return common.replace(
            layout=arm.layout, sliding=None,
            deltanet=DeltaNetConfig(self.heads, self.heads, each, each, chunk_size=32),
            gsa=GSAConfig(self.heads, each, self.heads, 8, k_base=most, k_min=most // 4, k_max=most),
            attention=AttentionConfig(self.heads, self.heads, each), resolvent=ResolventConfig(heads=self.width // 4),
        )  # fmt: skip


def parameters(config: ModelConfig) -> int:
    """How many numbers the model has beside the token table."""
    leaves = flatten(abstract(config)["params"])
    return sum(int(np.prod(leaf.shape)) for path, leaf in leaves.items() if not path.startswith("embedding/table"))


class Wanted(NamedTuple):
    """One unit: an arm trained with all seeds at once."""

    study: RecallStudy
    arm: Arm

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        window = f"window {self.arm.window} " if self.arm.window else ""
        return f"{self.arm.layout}/{self.arm.training} {window}drop {self.arm.drop:g}"


NEAR = 5  # a window that holds "Tom has a" and no other name
STATE_ARMS = (*arms("DS*2", (0.0, 0.3, 0.7)), *arms("DS*2", (0.0, 0.3, 0.7), window=NEAR), *arms("DA*2"), *arms("DG*2"))
FEW_ARMS = (Arm("DA*2", 0.0, MIXED), Arm("DS*2", 0.0, MIXED, NEAR), Arm("DS*2", 0.7, MIXED, NEAR),
            Arm("DS*2", 0.0, MIXED), Arm("DS*2", 0.7, MIXED), Arm("DG*2", 0.0, MIXED),
            Arm("DA*2", 0.0, NEEDLES), Arm("DA*2", 0.0, TEXT), Arm("DS*2", 0.0, TEXT, NEAR))
MIXER_ARMS = tuple(Arm(layout, 0.0, training) for layout in ("D*4", "DS*2", "A*4", "B*4")
                   for training in (TEXT, NEEDLES))  # fmt: skip - an S layer reads the D layer before it
EQUAL = {"as_large_as": "D*4"}
LARGE = {"width": 256, "heads": 4, "rows": 32, "steps": 6000, "rate": 2e-3, "prompts": 200, "held_out_batches": 64}
_TRY = RecallStudy(width=16, rows=2, steps=6, prompts=4, held_out_batches=2, stages=(0, 2), window=9)
SCALES: dict[str, dict[str, RecallStudy]] = {
    "state": {"minutes": _TRY.of((*arms("DS*2", (0.7,)), Arm("DA*2", 0.0, MIXED))),
              "small": RecallStudy(width=64, steps=1000, rate=4e-3).of(FEW_ARMS),
              "accelerator": RecallStudy(**LARGE).of(STATE_ARMS)},  # type: ignore[arg-type]
    "mixers": {"minutes": _TRY.replace(**EQUAL).of(MIXER_ARMS[::2]),
               "small": RecallStudy(width=64, steps=1000, rate=4e-3, stages=(0, 10, 30),
                                    **EQUAL).of(MIXER_ARMS),  # type: ignore[arg-type]
               "accelerator": RecallStudy(**LARGE, **EQUAL).of(MIXER_ARMS)},  # type: ignore[arg-type]
}  # fmt: skip


def scaled(part: str, scale: str, seeds: tuple[int, ...], text: tuple[str, ...], tokenizer: str) -> RecallStudy:
    """The study of a part and a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES[part]:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES[part])}")
    return SCALES[part][scale].replace(seeds=seeds, text=text, tokenizer=tokenizer)


def unchanged(study: RecallStudy, found: Mapping[str, Any], content: str) -> list[dict[str, Any]]:
    """The rows of a stored file whose arm `study` has too, each with what made it.

    Raises `Refused` for a file of other settings or of another text.
    """
    there = RecallStudy.from_json(found["config"])
    mine, theirs = (one.of(()).to_json() for one in (study, there))
    wrong = [f"{name} of the stored rows is {theirs.get(name)!r}; this study has {mine[name]!r}"
             for name in mine if name not in units.PLACES and theirs.get(name) != mine[name]]  # fmt: skip
    if found["content"] != content:
        wrong.append("the stored rows were made of another text; give that, or go without --keep")
    refuse_all(wrong, "--keep:")
    kept = {arm.name for arm in study.arms} & {arm.name for arm in there.arms}
    return [row for row in contract.lent(found) if row["model"] in kept]
