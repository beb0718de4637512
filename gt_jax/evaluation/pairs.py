"""Two checkpoints before their values are read: can they be compared, and is one grown from the other?"""

from __future__ import annotations

import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.lineage import newest
from gt_jax.errors import Refused
from gt_jax.evaluation.model_files import Checkpoint
from gt_jax.growth.plan import Plan
from gt_jax.growth.provenance import changed_content_hash, grown_plan
from gt_jax.text.tokenizers import chosen_tokenizer, tokenizer_of, vocabulary_difference

TOKENS = ("statistics/embedding/token_bytes", "statistics/embedding/token_length")


def incomparable(source: Checkpoint, target: Checkpoint, tokenizer: str | None = None) -> list[str]:
    """Why the two do not speak of the same tokens, as far as is known; `tokenizer` is what the user named, if anything.

    Where a table is no help, a target that does not say what its tokens are is a reason too.
    """
    if source.config.vocab != target.config.vocab:
        return [f"vocab is {source.config.vocab} in {source.path} and {target.config.vocab} in {target.path}"]
    if not all(path in one.tensors for path in TOKENS for one in (source, target)):  # a table knows no bytes
        try:
            named = chosen_tokenizer(target.metadata, tokenizer, target.path)
        except Refused as reason:
            return [str(reason)]
        known = tokenizer_of(source.metadata)
        differ = None if known is None else vocabulary_difference(known, named)
        return [f"{target.path} was trained with another tokenizer than {source.path}: {differ}"] if differ else []
    (text, length), (other, other_length) = (
        [checkpoint.load_paths(one.folder, TOKENS)[path] for path in TOKENS] for one in (source, target)
    )
    width = min(text.shape[1], other.shape[1])  # a model may keep fewer bytes of a long token
    same = (text[:, :width] == other[:, :width]).all(axis=1)
    same &= np.minimum(length, width) == np.minimum(other_length, width)
    if same.all():
        return []
    return [f"{np.count_nonzero(~same)} of {len(same)} tokens stand for other bytes ({TOKENS[0]}), the first is token "
            f"{int(np.argmin(same))}; compare models of one tokenizer"]  # fmt: skip


def plan_between(source: Checkpoint, target: Checkpoint) -> tuple[Plan | None, str | None]:
    """The plan by which `target` was grown from `source`, or None and why its layers stand for no pass of that one."""
    plan, wrong = grown_plan(target.metadata), None
    if plan is None:
        return None, f"{target.path} was not grown (its metadata has no grown_from): no layer stands for a pass"
    if plan.source_layout != source.config.depth:
        wrong = f"one of layout {plan.source_layout}; {source.path} has {source.config.layout}"
    elif plan.target_layout != target.config.depth:
        wrong = f"one by a plan for layout {plan.target_layout}; it has {target.config.layout} now"
    elif (found := changed_content_hash(target.metadata, source.folder)) is not None:
        grown = newest(target.metadata, "grown_from")
        wrong = (f"{grown.get('source')}, whose values are others (hash {grown['content_hash'][:12]}; {source.path}: "
                 f"{found[:12]})")  # fmt: skip
    return (plan, None) if wrong is None else (
        None, f"{target.path} was grown from another source, {wrong}: no layer stands for a pass")  # fmt: skip
