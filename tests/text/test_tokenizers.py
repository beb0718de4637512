"""Tokenizers by file: what is read is what the library reads, the text comes back, wrong files are refused."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from gt_jax import train
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.presets import tiny_3b
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.evaluation.loading import data_config
from gt_jax.evaluation.model_files import open_checkpoint
from gt_jax.evaluation.pairs import incomparable
from gt_jax.grow import main as grow
from gt_jax.models.language_model import initialise
from gt_jax.sample import main as sample
from gt_jax.text.batches import open_text
from gt_jax.text.tokenizers import ByteTokenizer, open_tokenizer, tokenizer_of, vocabulary_difference
from gt_jax.text.vocabulary_files import read_tokens
from gt_jax.training.loop import train_run, with_token_bytes
from tests.support import perturbed, small_model

STORY = "Once upon a time a small net grew deep, and was glad of it – très deep.\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A byte-level BPE with an end token, and a SentencePiece model with byte fallback; both of the story."""
    folder = tmp_path_factory.mktemp("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([STORY] * 8, trainer)
    (folder / "hf").mkdir()
    bpe.save(str(folder / "hf" / "tokenizer.json"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([STORY] * 64), model_writer=model, vocab_size=300, byte_fallback=True,
        character_coverage=1.0, minloglevel=2, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False,
    )  # fmt: skip
    (folder / "sp.model").write_bytes(model.getvalue())
    (folder / "story.txt").write_text(STORY * 60)
    return folder


@pytest.mark.parametrize("name", ["hf", "sp.model", "bytes"])
def test_text_comes_back_and_every_id_has_a_text(name, files):
    tokenizer = open_tokenizer(name if name == "bytes" else str(files / name))
    ids = tokenizer.encode(STORY.encode())
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(np.append(ids, tokenizer.end_of_document)) == STORY.encode()
    texts = tokenizer.texts()
    assert len(texts) == tokenizer.vocab_size
    assert b"".join(texts[i] for i in ids) == STORY.encode()
    with pytest.raises(ValueError, match="ids lie in"):
        tokenizer.decode(np.array([tokenizer.vocab_size]))


def test_ids_are_those_of_the_library(files):
    library = tokenizers.Tokenizer.from_file(str(files / "hf" / "tokenizer.json"))
    ours = open_tokenizer(str(files / "hf"))
    assert ours.encode(STORY.encode()).tolist() == library.encode(STORY).ids
    assert ours.end_of_document == library.token_to_id("<|endoftext|>")
    model = sentencepiece.SentencePieceProcessor(model_file=str(files / "sp.model"))
    theirs = open_tokenizer(str(files / "sp.model"))
    assert theirs.encode(STORY.encode()).tolist() == model.encode(STORY)
    assert theirs.end_of_document == model.eos_id()


def test_an_end_of_document_that_the_text_spells_is_text(files, tmp_path):
    """Else a document that speaks of it would be two, and what is independent would be counted wrongly."""
    tokenizer = open_tokenizer(str(files / "hf"))
    ids = tokenizer.encode(b"a <|endoftext|> b")
    assert tokenizer.end_of_document not in ids and tokenizer.decode(ids) == b"a <|endoftext|> b"
    (tmp_path / "speaks.txt").write_text("It ends with <|endoftext|> they say.\n" * 40)
    text = open_text(DataConfig(text=(str(tmp_path / "speaks.txt"),), tokenizer=str(files / "hf"), sequence_length=16))
    assert np.count_nonzero(text.tokens == tokenizer.end_of_document) == text.documents == 1


def test_ids_that_a_file_leaves_out_are_counted(tmp_path):
    """The vocabulary of the model must hold the largest id; how many there are does not say it."""
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 5}, [])).save(str(tmp_path / "gaps.json"))
    tokenizer = open_tokenizer(str(tmp_path / "gaps.json"))
    assert tokenizer.encode(b"ab").tolist() == [0, 5]
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (6, 7)


def test_a_document_with_a_word_that_the_vocabulary_lacks_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("a b c " * 40)
    config = DataConfig(text=(str(tmp_path / "text.txt"),), tokenizer=str(tmp_path / "words.json"), sequence_length=8)
    with pytest.raises(Refused, match=r"document 0 cannot be encoded by tokenizer .*words.json: .*UNK"):
        open_text(config)


def test_a_text_of_tokens_has_their_ids_and_says_so(files):
    config = DataConfig(text=(str(files / "story.txt"),), tokenizer=str(files / "hf"), sequence_length=16)
    text = open_text(config)
    tokenizer = open_tokenizer(config.tokenizer)
    assert text.tokens[-1] == tokenizer.end_of_document and text.characters == len((STORY * 60).encode())
    assert tokenizer.decode(text.tokens) == (STORY * 60).encode()
    assert f"{len(text.tokens):,} tokens of {config.tokenizer}" in text.summary()


def test_what_cannot_be_used_is_refused(files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    (tmp_path / "broken.model").write_bytes(b"no model")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    for name, words in (("gpt2", "nothing is downloaded"), ("a" * 300, "nothing is downloaded"),
                        (str(tmp_path / "empty"), "neither tokenizer.json nor"),
                        (str(tmp_path / "tokenizer.json"), "cannot be read as a tokenizer.json"),
                        (str(tmp_path / "broken.model"), "cannot be read as a SentencePiece model"),
                        (str(files / "story.txt"), "must be a tokenizer.json or")):  # fmt: skip
        with pytest.raises(Refused, match=words):
            open_tokenizer(name)
    with pytest.raises(Refused, match=r"document 0 is not UTF-8 \(byte 3\)"):
        open_text(DataConfig(text=(str(tmp_path / "latin.txt"),), tokenizer=str(files / "hf"), sequence_length=16))


def with_words(folder, vocabulary, **unknown):
    """A tokenizer.json that knows these words and no others, by its path."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, **unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    return str(folder / "words.json")


def test_a_document_keeps_all_its_tokens_whatever_the_file_asks_for(files, tmp_path):
    """Truncated, the rest of a document would never be trained on; by dropout its tokens would differ each time."""
    library = tokenizers.Tokenizer.from_file(str(files / "hf" / "tokenizer.json"))
    wanted = library.encode(STORY).ids
    library.enable_truncation(8)
    library.enable_padding(length=400, pad_id=1)
    library.model.dropout = 0.9
    library.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] == pytest.approx(0.9)
    assert open_tokenizer(str(tmp_path)).encode(STORY.encode()).tolist() == wanted


def test_ids_with_gaps_fit_the_vocabulary(tmp_path):
    """Of 2 tokens one is id 70,000: counted, they would be stored in 16 bits as another id."""
    path = with_words(tmp_path, {"deep": 0, "net": 70000}, unk_token="deep")
    (tmp_path / "text.txt").write_text("net deep " * 40)
    text = open_text(DataConfig(text=(str(tmp_path / "text.txt"),), tokenizer=path, sequence_length=8))
    assert text.tokenizer.vocab_size == 70002 and text.tokens[:2].tolist() == [70000, 0]


def test_a_word_without_a_token_is_refused(tmp_path):
    path = with_words(tmp_path, {"deep": 0}, unk_token="[UNK]")
    (tmp_path / "text.txt").write_text("deep net " * 40)
    with pytest.raises(Refused, match=r"document 0 cannot be encoded by tokenizer .*words.json"):
        open_text(DataConfig(text=(str(tmp_path / "text.txt"),), tokenizer=path, sequence_length=8))


@pytest.mark.parametrize(("data", "says"), [
    ({"model": {"vocab": {"a": 0}}, "decoder": "ByteLevel"}, "not made as a tokenizer.json is"),
    ({"model": {"vocab": {"a": 0}}, "pre_tokenizer": {"pretokenizers": None}}, "not made as a tokenizer.json is"),
    ({"model": {"vocab": {}}}, "has no tokens"), ({"model": {"vocab": {"a": 1}}}, "id 0 has no token"),
])  # fmt: skip
def test_a_file_of_tokens_that_is_none_is_refused(tmp_path, data, says):
    (tmp_path / "tokens.json").write_text(json.dumps(data))
    with pytest.raises(Refused, match=f"(?s)token file .*tokens.json.*{says}"):
        read_tokens(tmp_path / "tokens.json")


def test_a_vocabulary_that_is_too_small_is_refused_and_nothing_is_written(files, tmp_path):
    data = DataConfig(text=(str(files / "story.txt"),), tokenizer=str(files / "hf"), sequence_length=128)
    with pytest.raises(Refused, match=r"model.vocab is 264; tokenizer .* so it must be at least 300"):
        train_run(tmp_path / "run", RunConfig(model=tiny_3b(), data=data), show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_kronecker_embedding_reads_the_bytes_of_the_tokenizers_tokens(files):
    model = tiny_3b().replace(vocab=304, layout="D", hyper=None, moe=None, mtp=None, memory=None, adaptive=None)
    data = DataConfig(text=(str(files / "story.txt"),), tokenizer=str(files / "hf"), sequence_length=16)
    config, text = RunConfig(model=model, data=data), open_text(data)
    told = with_token_bytes(initialise(model, 0), config, text)["statistics"]["embedding"]
    texts = text.tokenizer.texts()
    for i in (0, 5, 299):
        length = int(told["token_length"][i])
        assert bytes(np.asarray(told["token_bytes"][i, :length])) == texts[i][:32]
    assert told["token_bytes"].shape[0] == 304
    assert ByteTokenizer().texts()[65] == b"A"


def test_a_model_keeps_its_tokenizer_when_it_is_grown_trained_on_and_sampled(files, tmp_path):
    """Its ids would be other words: another tokenizer is refused, and the default is the model's own, not bytes."""
    own, other = str(files / "hf"), str(files / "sp.model")
    model = small_model("D", adaptive=False, vocab=600)
    run = RunConfig(model=model, data=DataConfig(tokenizer=own)).to_json()
    variables = perturbed(model)
    for name, tokenizer in (("source", own), ("another", other)):
        run["data"]["tokenizer"] = tokenizer
        metadata = {"config": model.to_json(), "kind": "train", "step": 1, "run": run}
        checkpoint.save(tmp_path / name, variables, metadata)
    source, grown, another = (tmp_path / name for name in ("source", "grown", "another"))
    assert grow([str(source), str(grown), "--plan", "identity", "--no-check"]) == 0
    metadata = checkpoint.describe(grown)[1]
    carried = grown / "tokenizer.json"
    assert tokenizer_of(metadata) == data_config(metadata, None).tokenizer == str(carried)
    assert carried.read_bytes() == (files / "hf" / "tokenizer.json").read_bytes()
    assert tokenizer_of({"config": {}}) is None

    def started(*words):
        return train.default_config(train.parser().parse_args(["new", "--start", str(grown), *words]))

    assert started().data.tokenizer == str(carried)
    for wrong in (lambda: started("--tokenizer", other),
                  lambda: sample([str(grown), "--tokenizer", "bytes", "--prompt", "a"])):  # fmt: skip
        with pytest.raises(Refused, match=r"was trained with another tokenizer: .*; leave --tokenizer out"):
            wrong()
    with pytest.raises(Refused, match="--prompt cannot be encoded"):
        sample([str(grown), "--prompt", "\udcff"])  # what a shell hands on of bytes that are no UTF-8
    (difference,) = incomparable(open_checkpoint(grown), open_checkpoint(another))
    assert f"{another} was trained with another tokenizer than {grown}" in difference
    assert not incomparable(open_checkpoint(grown), open_checkpoint(source))
    checkpoint.save(tmp_path / "unknown", variables, {"config": model.to_json(), "kind": "model"})
    pair = open_checkpoint(grown), open_checkpoint(tmp_path / "unknown")
    assert "unknown does not say which tokenizer its 600 tokens are of" in incomparable(*pair)[0]
    assert not incomparable(*pair, own) and "with another tokenizer" in incomparable(*pair, other)[0]
    assert vocabulary_difference(own, str(files / "hf" / "tokenizer.json")) is None  # the same by another name
    assert vocabulary_difference("gone.json", other) is None
