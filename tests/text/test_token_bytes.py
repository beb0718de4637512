"""What tokens stand for: the bytes of a text's tokens are the text, for every kind; no text makes a special one."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.evaluation.scoring import byte_lengths
from gt_jax.text.batches import open_text
from gt_jax.text.json_lines import read_documents
from gt_jax.text.tokenizers import continuation, open_tokenizer
from gt_jax.text.vocabulary_files import tokens_by_id

TEXT = "The mill, très vieux, turns.\n\tМельница 水車が回る चक्की 🙂 the  mill  turns — 'ok'!\nThe end"
WORDS = "the mill turns, the old mill turns again."
CHARACTERS = sorted(set(TEXT + WORDS))


def metaspace(tokenizer):
    """The steps of a Llama file."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def llama():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"themil", "th", "▁th", "▁the"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    made = metaspace(tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def byte_level():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return made


def unigram():
    scores = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁the", -1.0), ("mill", -1.0), ("▁t", -2.0)]
    scores += [(one, -4.0) for one in [*CHARACTERS, *"</>"] if one not in " "]
    made = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def with_word_ends():
    pieces = ["<unk>", *(one + end for one in CHARACTERS if not one.isspace() for end in ("", "</w>"))]
    made = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [],
                                           unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return made


def word_piece():
    pieces = ["[UNK]", "[SEP]", "the", "mill", "turn", "##s", "old", "again", ",", "."]
    made = tokenizers.Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)},
                                                 unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.add_special_tokens(["[SEP]"])
    return made


def joined_words():
    """Words that were cut at spaces, and no decoder: the library joins them with spaces."""
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, **{word: 1 + index for index, word in enumerate(
        sorted({*WORDS.split()}))}}, unk_token="<unk>"))  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def sentence_piece(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.splitlines()[1], WORDS] * 40), model_writer=model, vocab_size=340,
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@pytest.mark.parametrize(("make", "text", "words"), [
    (byte_level, TEXT, TEXT), (llama, TEXT, " " + TEXT), (unigram, TEXT, " " + TEXT),
    (with_word_ends, WORDS, WORDS + " "),  # a space after each word, where a file says so
    (word_piece, WORDS, " " + WORDS),  # a space before each: its text has single ones
    (joined_words, WORDS, " " + WORDS), (sentence_piece, TEXT, " " + TEXT),
])  # fmt: skip
def test_the_bytes_of_a_texts_tokens_are_the_text(make, text, words, tmp_path):
    """At most a space before or after it is not there: bits per byte and Kronecker codes are of these bytes."""
    if make is sentence_piece:
        make(tmp_path)
    else:
        make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    ids, texts = tokenizer.encode(text.encode()), tokenizer.texts()
    assert b"".join(texts[i] for i in ids) == words.encode()
    assert byte_lengths(tokenizer)[ids].sum() == len(words.encode())
    assert tokenizer.decode(ids) == text.encode()
    for cut in range(1, len(ids)):  # decoded as it comes, nothing is lost but a character that is not whole yet
        added = continuation(tokenizer, ids[:1], ids[1:cut + 1])
        assert text.encode().startswith((tokenizer.decode(ids[:1]) + added).rstrip("\ufffd".encode()))


def test_what_is_unknown_stands_for_no_bytes_that_are_counted(tmp_path):
    word_piece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    ids = tokenizer.encode(b"the wheel")
    assert ids.tolist()[1] == tokenizer.unknown == 0
    assert byte_lengths(tokenizer)[ids].tolist() == [4, 0]


def test_an_answer_follows_its_prompt_without_a_space_of_its_own(tmp_path):
    """Encoded by itself the answer would begin with one: the model would learn another text than is asked of it."""
    llama().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    line = {"prompt": "2+2=", "answer": "4"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    (document,) = read_documents(str(tmp_path / "a.jsonl"), tokenizer, 32)
    assert tokenizer.decode(document.tokens) == b"2+2=4"
    assert tokenizer.decode(document.targets[document.targets >= 0]) == b"4"


def whole_words():
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "<pad>": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>"])
    return made


@pytest.mark.parametrize(("make", "spelled"), [(unigram, {1}), (whole_words, {1, 3}), (llama, {1, 2})])
def test_no_text_makes_a_special_token_though_the_models_own_words_spell_it(make, spelled, tmp_path):
    """Pieces of a Unigram model and words of a list are found in text by the model itself, whatever is switched off."""
    made = make()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.end_of_document in spelled
    ids = tokenizer.encode(b"a </s> a <pad> <s> a")
    assert not spelled & set(ids.tolist())
    if make is unigram:
        assert tokenizer.decode(ids).startswith(b"a </s> a ")
    plain = "the mill"
    assert tokenizer.encode(plain.encode()).tolist() == made.encode(plain, add_special_tokens=False).ids
    others = np.array(sorted(spelled - {tokenizer.end_of_document}), int)
    assert tokenizer.decode(others).strip() in (b"<pad>", b"<s>", b"")


def test_ids_that_a_file_leaves_out_have_texts_of_their_own(tmp_path):
    tokenizers.Tokenizer(models.BPE({"a": 0, "b": 3}, [])).save(str(tmp_path / "gaps.json"))
    tokenizer = open_tokenizer(str(tmp_path / "gaps.json"))
    assert tokenizer.texts() == [b"a", b"<1>", b"<2>", b"b", b"<|endoftext|>"]
    assert byte_lengths(tokenizer)[tokenizer.encode(b"ab")].sum() == 2


@pytest.mark.parametrize(("steps", "texts"), [
    ({"decoder": {"type": "Metaspace", "replacement": "_"}}, [b" a", b"##b", b"c</w>"]),
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, [b" a", b"##b", b"c</w>"]),
    ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False}}, [b" _a", b"b", b" c</w>"]),
    ({"decoder": {"type": "Sequence", "decoders": [{"type": "Strip", "content": "_", "start": 1, "stop": 0}]}},
     [b"a", b"##b", b"c</w>"]),
    ({"decoder": {"type": "Replace", "pattern": {"Regex": "^#+"}, "content": "-"}}, [b"_a", b"-b", b"c</w>"]),
    ({}, [b"_a", b"b", b"c "]),
])  # fmt: skip
def test_each_step_of_a_file_is_read(steps, texts):
    model = {"vocab": {"_a": 0, "##b": 1, "c</w>": 2}}
    marks = {} if steps else {"continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}
    assert list(tokens_by_id({"model": model | marks, **steps}, "it").values()) == texts


def test_a_step_that_cannot_be_read_is_refused():
    data = {"model": {"vocab": {"a": 0}}, "decoder": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}
    with pytest.raises(Refused, match="token file it is not made as a tokenizer"):
        tokens_by_id(json.loads(json.dumps(data)), "it")


def test_what_does_not_come_back_is_said_once_with_its_share(tmp_path):
    made = word_piece()
    made.normalizer = normalizers.Lowercase()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join(["the mill turns"] * 6 + ["The mill", "the  wheel"]))
    data = DataConfig(text=(str(tmp_path / "b.txt"),), tokenizer=str(tmp_path), sequence_length=8)
    assert open_text(data).summary().count("do not come back from their tokens as they were") == 1
    assert "3.57 % of the tokens are the unknown one, which counts no bytes" in open_text(data).summary()
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert open_text(data).summary().endswith("held out")
