"""The bytes of a vocabulary's tokens, from a JSON list or from a tokenizer.json of the tokenizers library.

A token stands for the bytes that its file's decoder makes of it within a text, not for the letters it is written with:
`Ġthe` (byte level) and `▁the` (metaspace) are four bytes, `<0x0A>` is one, `##ing` (WordPiece) three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import read_json

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What the library's WordPiece decoder joins where it cleans up, in its order.
_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
            (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip

Step = Callable[[str], str]


def read_tokens(path: Path) -> list[bytes]:
    """The bytes of every token in the order of the ids, UTF-8 where the file has text.

    Raises `Refused` for a file that is neither of the two, or whose ids have gaps.
    """
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise Refused(f"token file {path} cannot be read: {error}") from error
    if isinstance(data, Mapping):
        found = tokens_by_id(data, path)
        missing = [f"id {index} has no token" for index in range(len(found)) if index not in found]
        refuse_all(missing[:8], f"token file {path}: the ids are not 0 to {len(found) - 1}:")
        return [found[index] for index in range(len(found))]
    if not isinstance(data, list) or not data or not all(isinstance(token, str) for token in data):
        raise Refused(f"token file {path} is neither a JSON list of strings nor a tokenizer.json")
    return [token.encode() for token in data]


def tokens_by_id(data: Mapping[str, Any], path: object) -> dict[int, bytes]:
    """The bytes of every token of a parsed tokenizer.json, its added tokens included; `path` names it in refusals."""
    if not isinstance(data.get("model"), Mapping) or "vocab" not in data["model"]:
        raise Refused(f"token file {path} has no vocabulary (model.vocab, as a tokenizer.json has it)")
    try:
        texts = _vocabulary(data["model"])
        added = {int(token["id"]): token for token in data.get("added_tokens") or ()}
        read = _reader(data)
        found = {index: read(text) for index, text in texts.items()}
        # Added tokens are text; those that a text can be merged to beside it are read as it is.
        found |= {index: str(token["content"]).encode() for index, token in added.items()
                  if token.get("special", True) or index not in texts}  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise Refused(f"token file {path} is not made as a tokenizer.json is ({error!r})") from error
    if not found:
        raise Refused(f"token file {path} has no tokens")
    return found


def unknown_token(data: Mapping[str, Any]) -> int | None:
    """The id for what a parsed tokenizer.json has no token for; None where it has none."""
    model = data.get("model")
    if not isinstance(model, Mapping):
        return None
    vocabulary, index = model.get("vocab"), model.get("unk_id")
    if isinstance(vocabulary, Mapping):
        index = vocabulary.get(model.get("unk_token"))
    return index if isinstance(index, int) else None


def _vocabulary(model: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return {int(index): str(text) for text, index in vocabulary.items()}
    return {index: str(text) for index, (text, _) in enumerate(vocabulary)}


def _reader(data: Mapping[str, Any]) -> Callable[[str], bytes]:
    """What the bytes of a token's text are, by the steps of the file."""
    decoder, split = _steps(data.get("decoder")), _steps(data.get("pre_tokenizer"))
    normalizer, model = _steps(data.get("normalizer")), data["model"]
    stand_ins = _stand_ins() if _has([*decoder, *split, *normalizer], "ByteLevel") else {}
    fallback = model.get("byte_fallback") or _has(decoder, "ByteFallback")
    steps = _decoding(decoder) if decoder else _undoing(model, split, normalizer)

    def read(text: str) -> bytes:
        if stand_ins and all(character in stand_ins for character in text):
            return bytes(stand_ins[character] for character in text)
        if fallback and (byte := _BYTE.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        for step in steps:
            text = step(text)
        return text.encode()

    return read


def _steps(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a section of the file, those of sequences one after the other."""
    if section is None:
        return []
    if section.get("type") != "Sequence" and not any(name in section for name in _INNER):
        return [section]
    return [one for name in _INNER for inner in section.get(name, ()) for one in _steps(inner)]


_INNER = ("decoders", "pretokenizers", "normalizers")


def _has(steps: list[Mapping[str, Any]], kind: str) -> bool:
    return any(step.get("type") == kind for step in steps)


def _decoding(decoder: list[Mapping[str, Any]]) -> list[Step]:
    """What a decoder does to a token within a text: what strips the ends of the whole text, after `Fuse`, does not."""
    kinds = [step.get("type") for step in decoder]
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    found = [_decoded(step) for place, step in enumerate(decoder) if place < fused or step.get("type") != "Strip"]
    return [step for step in found if step is not None]


def _decoded(step: Mapping[str, Any]) -> Step | None:
    """A step of a decoder as a function of a token's text; None for one that changes none."""
    match step.get("type"):
        case "Replace":
            return _replaced(step["pattern"], step["content"])
        case "Metaspace":
            return lambda text: text.replace(step["replacement"], " ")
        case "BPEDecoder":
            return lambda text: text.replace(step["suffix"], " ")
        case "CTC":
            return lambda text: text.replace(step["pad_token"], "").replace(step["word_delimiter_token"], " ")
        case "WordPiece":
            return lambda text: _word_piece(text, step["prefix"], step.get("cleanup", True))
        case "Strip":
            return lambda text: _stripped(text, step["content"], step["start"], step["stop"])
    return None


def _undoing(
    model: Mapping[str, Any], split: list[Mapping[str, Any]], normalizer: list[Mapping[str, Any]]
) -> list[Step]:
    """The same for a file without a decoder: what its other steps write for a space, the marks of parts of words."""
    spaces = [step["replacement"] for step in split if step.get("type") == "Metaspace"]
    spaces += [step["content"] for step in normalizer if step.get("type") == "Replace"
               and step["pattern"] == {"String": " "}]  # fmt: skip
    spaces += [model["end_of_word_suffix"]] if model.get("end_of_word_suffix") else []
    found = [_replaced({"String": mark}, " ") for mark in spaces if mark]
    prefix = model.get("continuing_subword_prefix")
    if not spaces and model.get("type") == "WordLevel" and any(_has(split, kind) for kind in _DROPS_SPACES):
        found.append(lambda text: " " + text)  # the library joins words so that were cut at spaces
    return [*found, _unmarked(prefix)] if prefix else found


_DROPS_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")


def _unmarked(prefix: str) -> Step:
    return lambda text: text.removeprefix(prefix)


def _replaced(pattern: Mapping[str, str], content: str) -> Step:
    if "String" in pattern:
        return lambda text: text.replace(pattern["String"], content)
    found = re.compile(pattern["Regex"])
    return lambda text: found.sub(lambda match: content, text)


def _word_piece(text: str, prefix: str, cleanup: bool) -> str:
    text = text.removeprefix(prefix) if text.startswith(prefix) else " " + text
    for spaced, joined in _CLEANED if cleanup else ():
        text = text.replace(spaced, joined)
    return text


def _stripped(text: str, content: str, start: int, stop: int) -> str:
    for _ in range(start):
        text = text.removeprefix(content)
    for _ in range(stop):
        text = text.removesuffix(content)
    return text


def _stand_ins() -> dict[str, int]:
    """The byte that each printable character stands for (GPT-2): itself, or the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(rest)}
