"""Bytes to tokens and back: bytes themselves, a tokenizer.json (Hugging Face), a .model file (SentencePiece).

- By file, never by download. The library behind a file is imported when such a file is opened, and only then.
- The end of a document is the tokenizer's own token for it, if it has one, else one more id after the last.
- All of a text and nothing else: nothing is added at the beginning, nothing cut off or filled up at the end, whatever
  the file asks for. Special tokens that a text spells are text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from gt_jax.configs import lineage
from gt_jax.configs.data import BYTES
from gt_jax.errors import Refused

# Bytes and the end of a document, rounded up to whole eights as in the presets.
BYTE_VOCABULARIES = range(257, 265)
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@runtime_checkable
class Tokenizer(Protocol):
    """Ids are 0 to vocab_size - 1, `end_of_document` among them."""

    vocab_size: int
    end_of_document: int

    def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
        """The ids of a document, without its end; raises ValueError for bytes that it cannot take."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of ids of any shape, ends of documents left out."""
        ...

    def texts(self) -> list[bytes]:
        """The bytes that each id stands for by itself, as the Kronecker embedding reads them."""
        ...


class ByteTokenizer:
    """A token a byte, and one for the end of a document."""

    end_of_document = 256
    vocab_size = 257

    def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
        """The bytes as ids 0 to 255; no end of document is added."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of integer `ids`, of any shape, without the ends of documents; raises ValueError for other ids."""
        flat = np.asarray(ids).reshape(-1)
        if flat.size and not (flat.min() >= 0 and flat.max() < self.vocab_size):
            raise ValueError(f"ids lie in [{flat.min()}, {flat.max()}]; bytes and the end of a document are 0 to 256")
        return flat[flat != self.end_of_document].astype(np.uint8).tobytes()

    def texts(self) -> list[bytes]:
        """One byte each; the end of a document has a text of its own."""
        from gt_jax.text.token_bytes import default_texts

        return default_texts(self.vocab_size)


class _Text:
    """What tokenizers of text, not bytes, have in common."""

    def __init__(self, size: int, end: int | None) -> None:
        self._size = size
        self.end_of_document = size if end is None else end
        self.vocab_size = max(size, self.end_of_document + 1)

    def _own(self, ids: np.ndarray) -> list[int]:
        flat = [int(i) for i in np.asarray(ids).reshape(-1)]
        if flat and not (min(flat) >= 0 and max(flat) < self.vocab_size):
            raise ValueError(f"ids lie in [{min(flat)}, {max(flat)}]; the tokenizer has 0 to {self.vocab_size - 1}")
        return [i for i in flat if i != self.end_of_document]

    def _with_end(self, texts: list[bytes]) -> list[bytes]:
        return texts[: self._size] + [b"<|endoftext|>"] * (self.vocab_size - len(texts[: self._size]))


class HuggingFaceTokenizer(_Text):
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        tokenizers = _library("tokenizers", path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise Refused(f"tokenizer {path} cannot be read as a tokenizer.json: {error}") from error
        # Files of models with short rows ask for documents of so many tokens: the rest of each would be lost.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # the same text would have other tokens each time
        self._tokenizer.encode_special_tokens = True  # text that spells the end of a document does not end one
        self._path = path
        found = [self._tokenizer.token_to_id(name) for name in _ENDS]
        # Not the number of tokens: ids may have gaps, and one beyond it would not fit where tokens are stored.
        size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        super().__init__(size, next((i for i in found if i is not None), None))

    def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
        words = text.decode()
        try:
            return np.array(self._tokenizer.encode(words, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises no narrower one, for a word without a token for example
            raise ValueError(str(error)) from error

    def decode(self, ids: np.ndarray) -> bytes:
        text: str = self._tokenizer.decode(self._own(ids), skip_special_tokens=False)
        return text.encode()

    def texts(self) -> list[bytes]:
        from gt_jax.text.vocabulary_files import read_tokens

        return self._with_end(read_tokens(self._path))


class SentencePieceTokenizer(_Text):
    """A .model file of SentencePiece."""

    def __init__(self, path: Path) -> None:
        sentencepiece = _library("sentencepiece", path)
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise Refused(f"tokenizer {path} cannot be read as a SentencePiece model: {error}") from error
        end = self._model.eos_id()
        super().__init__(self._model.get_piece_size(), end if end >= 0 else None)

    def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
        return np.array(self._model.encode(text.decode()), np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        text: str = self._model.decode(self._own(ids))
        return text.encode()

    def texts(self) -> list[bytes]:
        def text(index: int) -> bytes:
            piece: str = self._model.id_to_piece(index)
            return bytes([int(piece[1:-1], 16)]) if self._model.is_byte(index) else piece.replace("▁", " ").encode()

        return self._with_end([text(index) for index in range(self._size)])


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, a tokenizer.json, a SentencePiece .model, or a folder that holds one; raises `Refused` for others."""
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if not os.path.exists(name):  # unlike Path's, it takes words that are too long for a name
        raise Refused(f"tokenizer {name!r} is neither {BYTES!r} nor a file or folder; nothing is downloaded")
    if path.is_dir():
        inside = [path / file for file in ("tokenizer.json", "tokenizer.model") if (path / file).is_file()]
        if not inside:
            raise Refused(f"tokenizer folder {name} has neither tokenizer.json nor tokenizer.model")
        path = inside[0]
    if path.suffix not in (".json", ".model"):
        raise Refused(f"tokenizer {name} must be a tokenizer.json or a SentencePiece .model file")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def tokenizer_of(metadata: Mapping[str, Any]) -> str | None:
    """The name of the tokenizer whose tokens the model of a checkpoint speaks; None where its metadata do not say."""
    for record in reversed(lineage.chain(metadata)):
        if isinstance(run := record.get("run"), Mapping):
            return str(run.get("data", {}).get("tokenizer", BYTES))
        if isinstance(name := record.get("tokenizer"), str):
            return name
    return None


def chosen_tokenizer(metadata: Mapping[str, Any], named: str | None, path: object, flag: str = "--tokenizer") -> str:
    """The tokenizer of a checkpoint at `path`: the one it was trained with, else the one that the user `named`.

    A model whose metadata know none speaks bytes where its vocabulary is theirs. Raises `Refused` for other models that
    know none, and for a named one with other tokens, or more of them than the model has.
    """
    known, vocab = tokenizer_of(metadata), metadata.get("config", {}).get("vocab")
    if named is None:
        if known is None and vocab not in BYTE_VOCABULARIES:
            raise Refused(f"{path} does not say which tokenizer its {vocab} tokens are of, and bytes would be others; "
                          f"name it with {flag}: a tokenizer.json, a SentencePiece .model, their folder, or {BYTES}")
        return known or BYTES
    if known and (other := vocabulary_difference(known, named)):
        raise Refused(f"{path} was trained with another tokenizer: {other}; leave {flag} out")
    if vocab is not None and (size := open_tokenizer(named).vocab_size) > vocab:
        raise Refused(f"{flag} {named} has {size} ids, {path} a vocabulary of {vocab}; name its own")
    return named


def vocabulary_difference(known: str, named: str) -> str | None:
    """How the tokens of tokenizer `named` differ from those of `known`, in words; None where they do not.

    None too where one of the two is not there any more: nothing can be said then.
    """
    if known == named:
        return None
    try:
        texts, others = open_tokenizer(known).texts(), open_tokenizer(named).texts()
    except Refused:
        return None
    if texts == others:
        return None
    common = sum(one == other for one, other in zip(texts, others, strict=False))
    return f"{known} has {len(texts)} tokens, {named} {len(others)}, of which {common} stand for the same bytes"


def encode_all(tokenizer: Tokenizer, name: str, documents: Sequence[bytes]) -> list[Int32[np.ndarray, " _"]]:
    """The ids of each document; raises `Refused` naming the first document that the tokenizer cannot take."""
    encoded = []
    for index, document in enumerate(documents):
        try:
            encoded.append(tokenizer.encode(document))
        except UnicodeDecodeError as error:
            raise Refused(f"document {index} is not UTF-8 (byte {error.start}), tokenizer {name} takes text; "
                          f"use --tokenizer {BYTES}") from error  # fmt: skip
        except ValueError as error:
            raise Refused(f"document {index} cannot be encoded by tokenizer {name}: {error}; take one that has a token "
                          f"for what it does not know, or --tokenizer {BYTES}") from error  # fmt: skip
    return encoded


def _library(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"tokenizer {path} needs the library {name}: pip install 'gt-jax[tokenizers]'") from error
