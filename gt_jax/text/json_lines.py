"""JSON-lines files: a document a line, of three forms that a file may mix; loss on answers only.

    {"text": "…"}                                    every next token is predicted, as in a text file
    {"prompt": "…", "answer": "…"}                   the tokens of the answer, and the end of the document behind it
    {"tokens": [5, 9, 2], "targets": [-1, 7, -1]}    ids as they are: behind 9 a 7 is expected, nothing elsewhere

"difficulty" may stand beside an answer, a whole number for all of it or one a token of "tokens". Each token of an
answer counts by itself as right or not; the end of the document behind an answer does not count. Prompt and answer are
encoded by themselves, so that the prompt has the tokens that it has when the answer is not known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import parse_json, refuse_once
from gt_jax.text.encodings import plain
from gt_jax.text.tokenizers import Tokenizer

_SHOWN = 20  # of what is wrong with a file
_FORMS = ({"text"}, {"prompt", "answer"}, {"tokens", "targets"})
_FORMS_SHOWN = '{"text"}, {"prompt", "answer"}, {"tokens", "targets"}, the last two with "difficulty" if it is known'
_DIFFICULTY = "difficulty"
_MOST = 2**31 - 1  # in int32


class Document(NamedTuple):
    """int32 [n] each: tokens, targets (-1 where nothing is predicted), difficulty (0 where none is known).

    `whole`: it stands in one row, since an answer would lose its prompt. `key` is what documents that must not be on
    both sides of the split have in common: the text, the prompt, or the tokens.
    """

    tokens: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    difficulty: Int32[np.ndarray, " n"]
    whole: bool
    key: bytes


def read_documents(path: str, tokenizer: Tokenizer, row: int) -> list[Document]:
    """The documents of a file, in its order, for rows of `row` tokens; blank lines hold none.

    Raises `Refused` that lists what is wrong by file and line number, at most 20 of it.
    """
    try:
        refuse_once(path)
        lines = plain(Path(path).read_bytes())[0].splitlines()
    except (OSError, ValueError) as error:  # ValueError: a path that holds a null byte
        raise Refused(f"file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    documents, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            documents.append(_document(_object(line), tokenizer, row))
        except _Wrong as problem:
            wrong.append(f"{path}, line {number}: {problem}")
    left = len(wrong) - _SHOWN
    refuse_all([*wrong[:_SHOWN], *([f"and {left} more lines"] if left > 0 else [])],
               f"these lines cannot be used; a line is one of {_FORMS_SHOWN}:")
    if not documents:
        raise Refused(f"file {path!r} has no document; a line is one of {_FORMS_SHOWN}")
    return documents


class _Wrong(Exception):
    """What is wrong with a line."""


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = parse_json(line, once=True)
    except ValueError as error:  # no JSON, no UTF-8, brackets beyond all measure, or a field twice
        raise _Wrong(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise _Wrong(f"it is no object, but {type(found).__name__}")
    return found


def _document(fields: dict[str, Any], tokenizer: Tokenizer, row: int) -> Document:
    names = fields.keys() - {_DIFFICULTY}
    if names not in _FORMS:
        near = next((form for form in _FORMS if form & names), None)
        wrong = f"the fields are {', '.join(sorted(map(repr, fields)))}" if fields else "there is no field"
        if near is not None and near - names:
            wrong = f"field {', '.join(sorted(map(repr, near - names)))} is missing"
        elif near is not None:
            wrong = f"field {', '.join(sorted(map(repr, names - near)))} is not known"
        raise _Wrong(wrong)
    made = _READERS[min(names)](fields, tokenizer)
    if made.whole and made.tokens.size > row:
        raise _Wrong(f"an answer longer than a row: with its prompt it has {made.tokens.size} tokens, rows have {row}; "
                     "train and the evaluating commands have --sequence-length for longer ones")
    return made


def _text(fields: dict[str, Any], tokenizer: Tokenizer) -> Document:
    if _DIFFICULTY in fields:
        raise _Wrong(f"field '{_DIFFICULTY}' stands beside a text, which asks nothing")
    tokens = np.append(_encoded(fields, "text", tokenizer), np.int32(tokenizer.end_of_document))
    targets = np.append(tokens[1:], np.int32(-1))
    return Document(tokens, targets, np.zeros_like(tokens), False, tokens.tobytes())


def _answer(fields: dict[str, Any], tokenizer: Tokenizer) -> Document:
    prompt, answer = (_encoded(fields, name, tokenizer) for name in ("prompt", "answer"))
    answer = _after(prompt, answer, (fields["prompt"] + fields["answer"]).encode(), tokenizer)
    tokens = np.concatenate([prompt, answer, [tokenizer.end_of_document]]).astype(np.int32)
    targets = np.append(tokens[1:], np.int32(-1))
    targets[: prompt.size - 1] = -1
    difficulty = _difficulty(fields, targets)
    difficulty[-2] = 0  # the end of the document is learned and no part of the answer
    return Document(tokens, targets, difficulty, True, prompt.tobytes())


def _after(
    prompt: Int32[np.ndarray, " _"], answer: Int32[np.ndarray, " _"], words: bytes, tokenizer: Tokenizer
) -> Int32[np.ndarray, " _"]:
    """The tokens of an answer that follow its prompt's: without the space that some put in front of each text."""
    if tokenizer.decode(np.append(prompt, answer)) == words:
        return answer
    try:
        whole = tokenizer.encode(words)
    except ValueError:  # both have tokens, but not what they are without a space between them
        return answer
    return whole[prompt.size :] if np.array_equal(whole[: prompt.size], prompt) and whole.size > prompt.size else answer


def _ids(fields: dict[str, Any], tokenizer: Tokenizer) -> Document:
    last = tokenizer.vocab_size - 1
    tokens, targets = _integers(fields, "tokens", 0, last), _integers(fields, "targets", -1, last)
    if tokens.size != targets.size:
        raise _Wrong(f"'tokens' are {tokens.size} and 'targets' {targets.size}; there is a target for each token, -1 "
                     "where nothing is expected")  # fmt: skip
    if not (targets >= 0).any():
        raise _Wrong("all 'targets' are -1; nothing is expected anywhere")
    return Document(tokens, targets, _difficulty(fields, targets), True, tokens.tobytes())


_READERS: dict[str, Callable[[dict[str, Any], Tokenizer], Document]] = {
    "text": _text, "answer": _answer, "targets": _ids,  # by the first of the fields' names
}  # fmt: skip


def _encoded(fields: dict[str, Any], name: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " n"]:
    words = fields[name]
    if not isinstance(words, str):
        raise _Wrong(f"field '{name}' is {_shown(words)}; it must be a string")
    try:
        ids = tokenizer.encode(words.encode())
    except ValueError as error:  # half of a surrogate pair, or nothing that the tokenizer has a token for
        raise _Wrong(f"field '{name}' cannot be encoded: {error}") from error
    if not ids.size:
        raise _Wrong(f"field '{name}' has no token; it must not be empty")
    return ids


def _integers(fields: dict[str, Any], name: str, least: int, most: int) -> Int32[np.ndarray, " n"]:
    values = fields[name]
    if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
        raise _Wrong(f"field '{name}' is {_shown(values)}; it must be a list of whole numbers")
    outside = next((value for value in values if not least <= value <= most), None)
    if outside is not None:
        raise _Wrong(f"field '{name}' has {outside}; its numbers lie in {least} … {most}")
    return np.array(values, np.int32)


def _difficulty(fields: dict[str, Any], targets: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    """The difficulty of each target, 0 where nothing is expected."""
    given = fields.get(_DIFFICULTY, 0)
    if "tokens" in fields and isinstance(given, list):
        values = _integers(fields, _DIFFICULTY, 0, _MOST)
        if values.size != targets.size:
            raise _Wrong(f"field '{_DIFFICULTY}' has {values.size} numbers; there are {targets.size} tokens")
        return np.where(targets >= 0, values, 0).astype(np.int32)
    if type(given) is not int or not 0 <= given <= _MOST:
        raise _Wrong(f"field '{_DIFFICULTY}' is {_shown(given)}; it must be a whole number in 0 … {_MOST}")
    return np.where(targets >= 0, given, 0).astype(np.int32)


def _shown(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 40 else words[:40] + " …"
