"""The steps by which a model came to be: every one once, from whatever metadata, in the order they happened."""

import json

from hypothesis import given
from hypothesis import strategies as st

from gt_jax.configs.lineage import LINEAGE, carried, chain, earlier, is_lineage, newest, trainings, tree_lines

RUN = {"data": {"text": ["story.txt"], "held_out": 0.2, "sequence_length": 64, "tokenizer": "bytes"},
       "train": {"optimizer": {"schedule": "wsd", "learning_rate": 0.002}}}  # fmt: skip
TRAINED = {"config": {}, "kind": "train", "step": 40, "run": RUN, "data": {"batches": 40}, "price": 0.5,
           "text": "text file 'story.txt'", "files": [{"path": "story.txt", "sha256": "a1" * 32}]}  # fmt: skip
OWN = {
    "train": TRAINED, "grown": {"config": {}, "kind": "grown", "step": 0, "grown_from": {"source": "runs/a"}},
    "calibrated": {"config": {}, "kind": "calibrated", "step": 0, "calibrated": {"grown": "grown", "text": "story"}},
    "converted": {"config": {}, "kind": "converted", "step": 7, "tokenizer": "t.json",
                  "converted_from": {"source": "there", "forms": {"w": ["float32", [1]]}}},
}  # fmt: skip


@given(st.lists(st.sampled_from(sorted(OWN)), min_size=1, max_size=6))
def test_every_step_is_there_once_in_its_order(kinds):
    metadata = None
    for kind in kinds:
        metadata = {**OWN[kind], **({} if metadata is None else {LINEAGE: carried(metadata)})}
    steps = chain(json.loads(json.dumps(metadata)))
    assert [step["kind"] for step in steps] == kinds and is_lineage(steps)
    assert earlier(metadata) == steps[:-1]
    assert len(trainings(metadata)) == kinds.count("train")
    assert not any("config" in step or LINEAGE in step for step in steps)
    assert not any("forms" in step.get("converted_from", {}) for step in steps[:-1])
    assert (newest(metadata, "grown_from") is not None) == ("grown" in kinds)
    assert sum("─ " in line or index == 0 for index, line in enumerate(tree_lines(metadata))) == len(kinds)


def test_metadata_of_earlier_versions_are_the_same_steps():
    """They kept where a model was grown from beside the run that trained it on."""
    old = {**TRAINED, "grown_from": {"source": "runs/a"}, "calibrated": {"grown": "grown"}}
    assert [step["kind"] for step in chain(old)] == ["grown", "calibrated", "train"]
    assert newest(old, "grown_from") == {"source": "runs/a"} and chain(old)[-1]["step"] == 40
    assert [step["kind"] for step in chain({"note": 1})] == ["model"]


def test_the_tree_names_text_hash_split_tokenizer_schedule_rate_price_and_counts():
    counts = {"origin": "repetition file counts.json", "sha256": "c3" * 32}
    metadata = {**OWN["grown"], "grown_from": {"source": "runs/a", "content_hash": "b2" * 32, "counts": counts},
                LINEAGE: carried(TRAINED)}  # fmt: skip
    said = "\n".join(tree_lines(metadata))
    for words in ("grown from runs/a (content b2b2b2b2b2b2)", "counts.json (sha256 c3c3", "└─ trained at step 40",
                  "story.txt (sha256 a1a1", "held out 0.2", "40 batches", "tokenizer bytes", "rows of 64",
                  "wsd schedule, learning rate 0.002, price 0.5"):  # fmt: skip
        assert words in said, said
