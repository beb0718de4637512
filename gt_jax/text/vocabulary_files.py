"""The bytes of a vocabulary's tokens, from a JSON list or from a tokenizer.json of the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused, refuse_all


def read_tokens(path: Path) -> list[bytes]:
    """The bytes of every token in the order of the ids, UTF-8 where the file has text.

    A byte-level vocabulary is turned from its printable stand-ins to the bytes they stand for; added tokens are text.
    Raises `Refused` for a file that is neither of the two, or whose ids have gaps.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"token file {path} cannot be read: {error}") from error
    if isinstance(data, Mapping):
        return _tokenizer(path, data)
    if not isinstance(data, list) or not data or not all(isinstance(token, str) for token in data):
        raise Refused(f"token file {path} is neither a JSON list of strings nor a tokenizer.json")
    return [token.encode() for token in data]


def _tokenizer(path: Path, data: Mapping[str, Any]) -> list[bytes]:
    """The vocabulary of a tokenizer.json, its added tokens included."""
    if not isinstance(data.get("model"), Mapping) or "vocab" not in data["model"]:
        raise Refused(f"token file {path} has no vocabulary (model.vocab, as a tokenizer.json has it)")
    try:
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, Mapping):
            texts = {int(index): str(text) for text, index in vocabulary.items()}
        else:
            texts = {index: str(text) for index, (text, _) in enumerate(vocabulary)}
        added = {int(token["id"]): str(token["content"]) for token in data.get("added_tokens") or ()}
        stand_ins = _stand_ins() if _byte_level(data) else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"token file {path} is not made as a tokenizer.json is ({error!r})") from error
    found = {index: _bytes(text, stand_ins) for index, text in texts.items()}
    found |= {index: text.encode() for index, text in added.items()}
    if not found:
        raise Refused(f"token file {path} has no tokens")
    missing = [f"id {index} has no token" for index in range(len(found)) if index not in found]
    refuse_all(missing[:8], f"token file {path}: the ids are not 0 to {len(found) - 1}:")
    return [found[index] for index in range(len(found))]


def _byte_level(data: Mapping[str, Any]) -> bool:
    """Whether a step of the tokenizer's decoder or pre-tokenizer is ByteLevel."""
    steps = [data.get("decoder") or {}, data.get("pre_tokenizer") or {}]
    steps += [inner for step in list(steps) for inner in (*step.get("decoders", ()), *step.get("pretokenizers", ()))]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _stand_ins() -> dict[str, int]:
    """The byte that each printable character stands for (GPT-2): itself, or the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


def _bytes(text: str, stand_ins: Mapping[str, int]) -> bytes:
    """The bytes of a token's text; stand-ins count only where every character is one."""
    if stand_ins and all(character in stand_ins for character in text):
        return bytes(stand_ins[character] for character in text)
    return text.encode()
