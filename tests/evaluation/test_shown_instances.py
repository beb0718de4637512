"""Instances for a reader: each answer below the token that asks for it, and exactly the wrong ones marked."""

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.configs.data import DataConfig
from gt_jax.evaluation.shown_instances import Instance, held_out_instances, lines_of
from gt_jax.models.language_model import LanguageModel, apply_network
from gt_jax.text.data import open_data
from gt_jax.text.tokenizers import ByteTokenizer
from tests.support import perturbed, small_model

BYTES = ByteTokenizer()


def instance(tokens: str, targets: str, said: str) -> Instance:
    """A space is no target."""
    def ids(words: str) -> np.ndarray:
        return np.array([-1 if sign == " " else ord(sign) for sign in words], np.int32)

    return Instance(ids(tokens), ids(targets), ids(said))


def test_answers_stand_below_the_tokens_that_ask_and_wrong_ones_are_marked():
    lines = lines_of("pointer_jumps", 1, instance("BCABCA2B1A", "       A B", "xxxxxxxAxC"), BYTES)
    assert lines == ["pointer_jumps, held-out instance 1: 1 of 2 answers right",
                     "  tokens  BCABCA2B1A",
                     "  right          A B",
                     "  model          A C",
                     "  wrong            ^"]  # fmt: skip
    ended = Instance(*(np.array(ids, np.int32) for ids in ([65, 66, 67], [-1, 68, BYTES.end_of_document],
                                                           [0, 69, BYTES.end_of_document])))  # fmt: skip
    assert lines_of("p", 1, ended, BYTES)[0].endswith("0 of 1 answers right"), "the end behind an answer is none"
    right = lines_of("p", 2, instance("ab", " c", "xc"), BYTES)
    assert right[0].endswith("instance 2: 1 of 1 answers right") and len(right) == 4, "no mark where nothing is wrong"


def test_what_would_break_a_line_does_not():
    long = lines_of("p", 1, instance("a\nb" * 100, "c" * 300, "d" * 300), BYTES)
    assert max(map(len, long)) <= 110 and len(long) == 1 + 3 * 4 and "\n" not in "".join(long)
    end = Instance(*(np.array([token], np.int32) for token in (65, BYTES.end_of_document, 66)))
    assert [line[10:] for line in lines_of("p", 1, end, BYTES)[1:]] == ["A", "¶", "B", "^"]

    class Words(ByteTokenizer):
        def texts(self) -> list[bytes]:
            return [b"w%d" % i for i in range(257)]

    wide = lines_of("p", 1, Instance(*(np.array(ids, np.int32) for ids in ([1, 20], [-1, 3], [0, 3]))), Words())
    assert wide[1:] == ["  tokens  w1 w20", "  right      w3", "  model      w3"]


def test_the_models_answers_are_its_most_likely_tokens():
    config = small_model("D", adaptive=False)
    variables = perturbed(config)
    data = open_data(DataConfig(tasks=("p_hop:hardest=1,symbols=3,length=15",), sequence_length=40, batch_size=2))
    part = data.parts["p_hop"]
    found = held_out_instances(config, variables, part, 3, BYTES.vocab_size)
    batch = part.held_out(2)[0]
    assert len(found) == 3 and found[2].tokens.tobytes() == batch["tokens"][1, :16].tobytes()
    tokens, segments = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids"))
    logits = jax.jit(lambda *rows: apply_network(LanguageModel(config), variables, *rows).logits)(tokens, segments)
    alone = np.asarray(logits)[0, 16:32, : BYTES.vocab_size].argmax(-1)
    np.testing.assert_array_equal(found[1].said, alone)
    np.testing.assert_array_equal(found[1].targets, batch["targets"][0, 16:32])
