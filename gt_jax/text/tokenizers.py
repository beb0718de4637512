"""Bytes to tokens and back: bytes themselves, a tokenizer.json (Hugging Face), a .model file (SentencePiece).

- By file, never by download. The library behind a file is imported when such a file is opened, and only then.
- The end of a document is the tokenizer's own token for it, if it has one, else one more id after the last.
- All of a text and nothing else: nothing is added at the beginning, nothing cut off or filled up at the end, whatever
  the file asks for. Special tokens that a text spells are text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, UInt

from gt_jax.configs.data import BYTES
from gt_jax.configs.tokenizer_file import (
    Known,
    TokenizerFile,
    known_tokenizer,
    read_tokenizer_file,
    refuse_other_file,
    unpacked,
)
from gt_jax.errors import Refused, say_once
from gt_jax.text.vocabulary_files import tokens_by_id, unknown_token

# Bytes and the end of a document, rounded up to whole eights as in the presets.
BYTE_VOCABULARIES = range(257, 265)
_PORTION = 1 << 22  # bytes that are encoded together
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@runtime_checkable
class Tokenizer(Protocol):
    """Ids are 0 to vocab_size - 1, `end_of_document` among them; `unknown` is what stands for text without a token."""

    vocab_size: int
    end_of_document: int
    unknown: int | None

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
    unknown: int | None = None

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

    def __init__(self, size: int, end: int | None, unknown: int | None) -> None:
        self._size, self.unknown = size, unknown
        self.end_of_document = size if end is None else end
        self.vocab_size = max(size, self.end_of_document + 1)

    def _own(self, ids: np.ndarray) -> list[int]:
        flat = [int(i) for i in np.asarray(ids).reshape(-1)]
        if flat and not (min(flat) >= 0 and max(flat) < self.vocab_size):
            raise ValueError(f"ids lie in [{min(flat)}, {max(flat)}]; the tokenizer has 0 to {self.vocab_size - 1}")
        return [i for i in flat if i != self.end_of_document]

    def _with_end(self, texts: list[bytes]) -> list[bytes]:
        return texts + [b"<|endoftext|>"] * (self.vocab_size - self._size)


class HuggingFaceTokenizer(_Text):
    """A tokenizer.json of the `tokenizers` library; `path` names it in refusals."""

    def __init__(self, content: bytes, path: str) -> None:
        library = _library("tokenizers", path)
        try:
            self._data = json.loads(content)
            self._tokenizer = library.Tokenizer.from_str(content.decode())
        except Exception as error:
            raise Refused(f"tokenizer {path} cannot be read as a tokenizer.json: {error}") from error
        found = [self._tokenizer.token_to_id(name) for name in _ENDS]
        # Not the number of tokens: ids may have gaps, and one beyond it would not fit where tokens are stored.
        size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        super().__init__(size, next((i for i in found if i is not None), None), unknown_token(self._data))
        self._path, self._hidden = path, dict[str, str]()
        self._set_to_whole_texts()
        if spelled := self._spelled():
            self._hide(spelled, library)
        self._data = {**self._data, "model": {**self._data["model"], "merges": []}}  # large, and not needed any more

    def _set_to_whole_texts(self) -> None:
        # Files of models with short rows ask for documents of so many tokens: the rest of each would be lost.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # the same text would have other tokens each time
        self._tokenizer.encode_special_tokens = True  # text that spells the end of a document does not end one

    def _special(self) -> dict[int, str]:
        """What the special tokens are called, by their ids, without the one for what is not known."""
        added = {int(one["id"]): str(one["content"]) for one in self._data.get("added_tokens") or ()
                 if one.get("special")}  # fmt: skip
        ends = [name for name in _ENDS if self._tokenizer.token_to_id(name) == self.end_of_document]
        found = added | dict.fromkeys([self.end_of_document], ends[0]) if ends else added
        return {index: name for index, name in found.items() if index != self.unknown and name}

    def _spelled(self) -> dict[int, str]:
        """Those of the special tokens that a text can spell all the same: words and pieces of the model itself."""
        return {index: name for index, name in self._special().items()
                if any(index in self._try(words) for words in (name, f"a {name} a", f"a{name}a"))}  # fmt: skip

    def _try(self, words: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(words, add_special_tokens=False).ids)
        except Exception:  # noqa: BLE001 — a model without a token for these words: it makes no special one of them
            return []

    def _hide(self, spelled: Mapping[int, str], library: Any) -> None:
        """Call these tokens what no text holds, noncharacters of Unicode; `decode` gives their names back."""
        hidden = {name: f"\U0010fffe{index}\U0010ffff" for index, name in spelled.items()}
        vocabulary = self._data["model"]["vocab"]
        renamed = ({hidden.get(text, text): index for text, index in vocabulary.items()}
                   if isinstance(vocabulary, Mapping) else
                   [[hidden.get(text, text), *rest] for text, *rest in vocabulary])  # fmt: skip
        added = [{**one, "content": hidden.get(one["content"], one["content"])}
                 for one in self._data.get("added_tokens") or ()]  # fmt: skip
        data = {**self._data, "model": {**self._data["model"], "vocab": renamed}, "added_tokens": added,
                "post_processor": None}  # fmt: skip
        try:
            self._tokenizer = library.Tokenizer.from_str(json.dumps(data))
        except Exception as error:
            raise Refused(f"tokenizer {self._path}: a text that spells {', '.join(spelled.values())} would be given "
                          f"that special token, and it cannot be told apart: {error}") from error  # fmt: skip
        self._hidden = {mark: name for name, mark in hidden.items()}
        self._set_to_whole_texts()

    def encode(self, text: bytes) -> Int32[np.ndarray, " n"]:
        words = text.decode()
        try:
            return np.array(self._tokenizer.encode(words, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises no narrower one, for a word without a token for example
            raise ValueError(str(error)) from error

    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, " _"]]:
        """`encode` of each, some megabytes at a time on all cores; raises ValueError where one cannot be encoded."""
        found: list[Int32[np.ndarray, " _"]] = []
        for portion in portions(texts):
            words = [text.decode() for text in portion]
            try:
                made = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
            except Exception as error:
                raise ValueError(str(error)) from error
            found += [np.array(one.ids, np.int32) for one in made]
        return found

    def encode_spelled(self, text: str) -> Int32[np.ndarray, " n"]:
        """The ids of a text in which special tokens are spelled out, as a chat template does: those are meant."""
        for mark, name in self._hidden.items():
            text = text.replace(name, mark)
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text.encode())
        finally:
            self._tokenizer.encode_special_tokens = True

    def name_of(self, token: int) -> str | None:
        """What an id is called in the file; None for one that it does not have."""
        name = self._tokenizer.id_to_token(token)
        return self._hidden.get(name, name)

    def decode(self, ids: np.ndarray) -> bytes:
        text: str = self._tokenizer.decode(self._own(ids), skip_special_tokens=False)
        for mark, name in self._hidden.items():
            text = text.replace(mark, name)
        return text.encode()

    def texts(self) -> list[bytes]:
        found = tokens_by_id(self._data, self._path)
        return self._with_end([found.get(index, b"<%d>" % index) for index in range(self._size)])  # ids may have gaps


class SentencePieceTokenizer(_Text):
    """A .model file of SentencePiece; `path` names it in refusals."""

    def __init__(self, content: bytes, path: str) -> None:
        sentencepiece = _library("sentencepiece", path)
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            raise Refused(f"tokenizer {path} cannot be read as a SentencePiece model: {error}") from error
        end, unknown = self._model.eos_id(), self._model.unk_id()
        super().__init__(self._model.get_piece_size(), end if end >= 0 else None, unknown if unknown >= 0 else None)

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
    return open_file(read_tokenizer_file(name))


def open_file(file: TokenizerFile) -> Tokenizer:
    """The tokenizer of a file that was read, or unpacked."""
    return _opened(file.content, file.path)


@functools.lru_cache(maxsize=4)  # the commands ask several times, and a large file takes seconds
def _opened(content: bytes, path: str) -> Tokenizer:
    if path.endswith(".model"):
        return SentencePieceTokenizer(content, path)
    return HuggingFaceTokenizer(content, path)


def tokenizer_of(metadata: Mapping[str, Any]) -> str | None:
    """The name of the tokenizer whose tokens the model of a checkpoint speaks; None where its metadata do not say.

    It is the file that the checkpoint carries, where it does.
    """
    known = known_tokenizer(metadata)
    return None if known is None else known.name


def chosen_tokenizer(metadata: Mapping[str, Any], named: str | None, path: object, flag: str = "--tokenizer") -> str:
    """The tokenizer of a checkpoint at `path`: the one it carries or was trained with, else the one that the user
    `named`.

    A model whose metadata know none speaks bytes where its vocabulary is theirs. What nothing proves is said on stderr,
    once: that a named file is the one, or that a file still is what it was when nobody carried it. Raises `Refused` for
    other models that know none, for a file whose hash is not the one noted, for a named one with other tokens, and for
    more of them than the model has.
    """
    known, vocab = known_tokenizer(metadata), metadata.get("config", {}).get("vocab")
    if named is None:
        if known is None and vocab not in BYTE_VOCABULARIES:
            raise Refused(f"{path} does not say which tokenizer its {vocab} tokens are of, and bytes would be others; "
                          f"name it with {flag}: a tokenizer.json, a SentencePiece .model, their folder, or {BYTES}")
        chosen = BYTES if known is None else _of_checkpoint(known, path, flag)
    else:
        chosen = named
        if known is not None:
            _compare(known, named, path, flag)
    if vocab is not None and (size := open_tokenizer(chosen).vocab_size) > vocab:
        if known is None and named is None:
            return chosen  # a vocabulary of 257 to 264 has room for all bytes
        what = f"{flag} {named}" if named is not None else f"tokenizer {chosen}"
        raise Refused(f"{what} has {size} ids, {path} a vocabulary of {vocab}; name its own"
                      f"{'' if named is not None else f' with {flag}'}")
    return chosen


def _of_checkpoint(known: Known, path: object, flag: str) -> str:
    """The name of the tokenizer that the checkpoint at `path` knows, whose file must be there and be its own."""
    if known.name == BYTES:
        return BYTES
    try:
        file = read_tokenizer_file(known.name)
    except Refused as error:
        raise Refused(f"{error}; {path} was trained with it and carries no copy: say with {flag} where it "
                      "is") from error
    refuse_other_file(known, file, path)
    if known.sha256 is None:
        say_once(f"note: {path} carries no tokenizer and notes no hash of it; {file.path} is taken as it lies there")
    return known.name


def _compare(known: Known, named: str, path: object, flag: str) -> None:
    """Raise `Refused` where the named tokenizer has other tokens than the known one; say what is not certain."""
    if BYTES in (known.name, named) or known.sha256 != read_tokenizer_file(named).sha256:
        own = None if known.packed is None else open_file(unpacked(known))
        if other := vocabulary_difference(known.name, named, own):
            raise Refused(f"{path} was trained with another tokenizer: {other}; leave {flag} out")
        if known.sha256 is not None:
            say_once(f"warning: {flag} {named} is another file than the tokenizer that {path} was trained with; as "
                      "far as can be told its tokens are the same, but it may cut text in other places")  # fmt: skip
        elif named not in (BYTES, known.name):
            say_once(f"warning: {path} notes no hash of the tokenizer that it was trained with ({known.name}); "
                      f"nothing proves that {named} is that one")  # fmt: skip


def vocabulary_difference(known: str, named: str, own: Tokenizer | None = None) -> str | None:
    """How the tokens of tokenizer `named` differ from those of `known`, which is `own` where it lies in no file, in
    words; None where they do not.

    None too where one of the two is not there any more: nothing can be said then.
    """
    if known == named and own is None:
        return None
    try:
        texts, others = (own or open_tokenizer(known)).texts(), open_tokenizer(named).texts()
    except Refused:
        return None
    if texts == others:
        return None
    common = sum(one == other for one, other in zip(texts, others, strict=False))
    return f"{known} has {len(texts)} tokens, {named} {len(others)}, of which {common} stand for the same bytes"


def continuation(tokenizer: Tokenizer, prompt: np.ndarray, drawn: np.ndarray) -> bytes:
    """What the ids `drawn` add to the text of the ids `prompt`.

    Both are decoded as one: by itself the first piece of a continuation would lose its space.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt.reshape(-1), drawn.reshape(-1)]))
    return whole[len(before):] if whole.startswith(before) else tokenizer.decode(drawn)


def portions(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Documents in runs of some megabytes, one document at least."""
    portion: list[bytes] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += len(document)
        if size >= _PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def encode_all(
    tokenizer: Tokenizer, name: str, documents: Sequence[bytes], first: int = 0
) -> list[Int32[np.ndarray, " _"]]:  # fmt: skip
    """The ids of each document, on all cores where the library behind the tokenizer can.

    Raises `Refused` naming the first document that the tokenizer cannot take; they are counted from `first`.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        try:
            return tokenizer.encode_batch(documents)
        except ValueError:
            pass  # which document it is, one by one
    encoded = []
    for index, document in enumerate(documents, first):
        try:
            encoded.append(tokenizer.encode(document))
        except UnicodeDecodeError as error:
            raise Refused(f"document {index} is not UTF-8 (byte {error.start}), tokenizer {name} takes text; "
                          f"use --tokenizer {BYTES}") from error  # fmt: skip
        except ValueError as error:
            raise Refused(f"document {index} cannot be encoded by tokenizer {name}: {error}; take one that has a token "
                          f"for what it does not know, or --tokenizer {BYTES}") from error  # fmt: skip
    return encoded


def laid_out(
    encoded: Sequence[Int32[np.ndarray, " _"]], tokenizer: Tokenizer
) -> tuple[UInt[np.ndarray, " n"], Int64[np.ndarray, " documents"]]:  # fmt: skip
    """The ids of documents one behind another, each with its end, and where each ends."""
    ends = np.cumsum([len(ids) + 1 for ids in encoded], dtype=np.int64)
    tokens = np.full(ends[-1], tokenizer.end_of_document, token_dtype(tokenizer))
    for ids, end in zip(encoded, ends.tolist(), strict=True):
        tokens[end - 1 - len(ids):end - 1] = ids
    return tokens, ends


def token_dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    """The narrowest that holds all ids."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _library(name: str, path: object) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"tokenizer {path} needs the library {name}: pip install 'gt-jax[tokenizers]'") from error
