"""A checkpoint carries its tokenizer, through what is made from it and wherever it goes; no other file is taken."""

import json
import shutil

import jax
import numpy as np
import pytest

from gt_jax import train
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.folders import Damaged
from gt_jax.configs.data import DataConfig
from gt_jax.configs.lineage import carried, exported
from gt_jax.configs.run import RunConfig, differences
from gt_jax.configs.tokenizer_file import carried_tokenizer, packed
from gt_jax.errors import Refused, say_once
from gt_jax.interop import to_orbax
from gt_jax.models.language_model import abstract
from gt_jax.text.tokenizers import chosen_tokenizer, open_tokenizer
from tests.support import small_model

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def write_letters(path, letters=LETTERS, **steps):
    """A tokenizer.json of single letters."""
    vocabulary = {"<|endoftext|>": 0} | {letter: 1 + index for index, letter in enumerate(letters)}
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "."}, **steps}))


def saved(place, **metadata):
    """The metadata of a checkpoint of one number, as they are read again."""
    checkpoint.save(place, {"params": {"x": np.zeros(2)}}, {"config": {"vocab": 400}, "step": 1, **metadata})
    return checkpoint.describe(place)[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where letters.json lies and a checkpoint was trained with it, by that name; what is said is said anew."""
    say_once.cache_clear()
    monkeypatch.chdir(tmp_path)
    write_letters(tmp_path / "letters.json")
    saved("model", kind="train", run={"data": {"tokenizer": "letters.json"}})
    return tmp_path


def test_it_goes_with_the_checkpoint_and_with_what_is_made_of_it(home, monkeypatch, capsys):
    written = (home / "letters.json").read_bytes()
    metadata = checkpoint.describe("model")[1]
    saved("grown", kind="grown", grown_from={"source": "model"}, lineage=carried(metadata))
    saved("fitted", kind="calibrated", calibrated={}, lineage=carried(checkpoint.describe("grown")[1]))
    (home / "letters.json").unlink()
    (home / "there").mkdir()
    for name in ("model", "grown", "fitted"):
        assert "path" not in (home / name / "_CHECKPOINT_METADATA").read_text(), "places are not those of tomorrow"
        shutil.move(home / name, home / "there" / name)
    monkeypatch.chdir("/")
    for name in ("model", "grown", "fitted"):
        place = home / "there" / name
        own = chosen_tokenizer(checkpoint.describe(place)[1], None, place)
        assert own == str(place / "tokenizer.json") and (place / "tokenizer.json").read_bytes() == written
        assert open_tokenizer(own).encode(b"cab").tolist() == [3, 1, 2]
    assert capsys.readouterr().err == ""
    (place / "tokenizer.json").write_bytes(written.replace(b"a", b"b", 1))
    with pytest.raises(Damaged, match=r"tokenizer\.json holds other bytes"):
        checkpoint.describe(place)


def test_another_file_of_the_same_name_is_not_taken_for_it(home, capsys):
    metadata = checkpoint.describe("model")[1]
    write_letters(home / "letters.json", LETTERS[::-1])
    assert open_tokenizer(chosen_tokenizer(metadata, None, "model")).encode(b"a").tolist() == [1]
    with pytest.raises(Refused, match=r"model was trained with another tokenizer: .*; leave --tokenizer out"):
        chosen_tokenizer(metadata, "letters.json", "model")
    assert capsys.readouterr().err == ""
    write_letters(home / "letters.json", normalizer={"type": "Lowercase"})  # the same tokens, but it cuts other text
    assert chosen_tokenizer(metadata, "letters.json", "model") == "letters.json"
    assert "warning: --tokenizer letters.json is another file than the tokenizer that model" in capsys.readouterr().err
    chosen_tokenizer(metadata, "letters.json", "model")
    assert capsys.readouterr().err == "", "once"


def test_what_a_checkpoint_without_its_copy_cannot_prove_is_said(home, capsys):
    old = {"config": {"vocab": 400}, "kind": "train", "run": {"data": {"tokenizer": "letters.json"}}}
    assert chosen_tokenizer(old, None, "old") == "letters.json"
    assert "note: old carries no tokenizer and notes no hash" in capsys.readouterr().err
    shutil.copy("letters.json", "same.json")
    assert chosen_tokenizer(old, "same.json", "old") == "same.json"
    assert "nothing proves that same.json is that one" in capsys.readouterr().err
    with pytest.raises(Refused, match=r"SHA-256 is .*, that of the model's own 0123"):
        chosen_tokenizer({**old, "tokenizer_file": {"name": "tokenizer.json", "sha256": "0123"}}, None, "old")
    (home / "letters.json").unlink()
    with pytest.raises(Refused, match="old was trained with it and carries no copy: say with --tokenizer where"):
        chosen_tokenizer(old, None, "old")
    with pytest.raises(Refused, match="has 29 ids, small a vocabulary of 20"):
        chosen_tokenizer({**checkpoint.describe("model")[1], "config": {"vocab": 20}}, None, "small")


def test_a_file_of_another_format_carries_it_in_its_lineage(home):
    metadata = checkpoint.describe("model")[1]
    lineage = json.loads(json.dumps(packed(exported(metadata, "model"), carried_tokenizer(metadata))))
    assert all("path" not in record.get("tokenizer_file", {}) for record in lineage)
    written = (home / "letters.json").read_bytes()
    (home / "letters.json").unlink()
    shutil.rmtree(home / "model")
    back = saved("back", kind="converted", converted_from={"source": "x.safetensors"}, lineage=lineage)
    assert (home / "back" / "tokenizer.json").read_bytes() == written
    assert "zlib" not in json.dumps(back) and chosen_tokenizer(back, None, "back").endswith("back/tokenizer.json")


def test_a_kronecker_model_of_another_format_gets_the_bytes_of_what_came_along(home, monkeypatch):
    """From any folder, also one where another tokenizer.json lies."""
    metadata = checkpoint.describe("model")[1]
    lineage = packed(exported(metadata, "model"), carried_tokenizer(metadata))
    texts = open_tokenizer("letters.json").texts()
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    write_letters(home / "elsewhere" / "tokenizer.json", LETTERS[::-1])
    known = {"kind": "converted", "config": {"vocab": 400}, "lineage": lineage}
    assert to_orbax._texts(known, None, "x.safetensors", lambda line: None) == texts
    with pytest.raises(Refused, match=r"x\.safetensors was trained with another tokenizer"):
        to_orbax._texts(known, "tokenizer.json", "x.safetensors", lambda line: None)
    assert to_orbax._texts(known, str(home / "letters.json"), "x.safetensors", lambda line: None) == texts


def test_a_run_carries_what_it_opened_though_the_file_be_replaced_meanwhile(home):
    written = (home / "letters.json").read_bytes()
    open_tokenizer("letters.json")
    write_letters(home / "letters.json", LETTERS[::-1])
    saved("later", kind="train", run={"data": {"tokenizer": "letters.json"}})
    assert (home / "later" / "tokenizer.json").read_bytes() == written


def test_a_run_is_resumed_from_any_folder_with_its_own_tokenizer_and_moved_text(home, monkeypatch):
    model = small_model("D", adaptive=False, vocab=300)
    config = RunConfig(model=model, data=DataConfig(tokenizer="letters.json", text=("a.txt",)))
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(json.dumps(config.to_json()))

    def resumed(*words):
        arguments = train.parser().parse_args([str(home / "run"), "--resume", *words])
        return train.run_config(arguments, train.default_config(arguments))

    assert resumed() == config
    with pytest.raises(Refused, match=r"no step yet that would know whether data\.text hold"):
        resumed("--text", "b.txt")
    values = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract(model))
    metadata = {"config": model.to_json(), "kind": "train", "step": 2, "run": config.to_json()}
    checkpoint.save(home / "run" / "2", values, metadata)
    assert resumed() == config
    write_letters(home / "other.json", LETTERS[::-1])
    with pytest.raises(Refused, match="was trained with another tokenizer"):  # which tasks would not know by their rows
        resumed("--tokenizer", str(home / "other.json"))
    write_letters(home / "letters.json", LETTERS[::-1])
    assert resumed().data.tokenizer == str(home / "run" / "2" / "tokenizer.json")
    monkeypatch.chdir("/")
    moved = resumed("--text", str(home / "b.txt"))
    assert moved.data.text == (str(home / "b.txt"),) and differences(config, moved) == []
    assert moved.data.tokenizer == str(home / "run" / "2" / "tokenizer.json")
