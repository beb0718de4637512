"""Chat templates of converted models: a conversation becomes the text that the model was trained to answer.

- A template is a Jinja program that comes along with a model's tokenizer. It runs in Jinja's immutable sandbox, with
  the options, filters and functions that transformers gives it, and sees messages and the special tokens' names alone.
- Jinja2 is imported when a template is rendered, and only then.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from gt_jax.errors import Refused
from gt_jax.files import parse_json

_FILE, _JSON, _TOKENIZER, _SPECIAL = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json",
                                      "special_tokens_map.json")  # fmt: skip
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# what transformers needs to tell answers from questions in training; the text inside is text
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class ChatTemplate(NamedTuple):
    """The program, and what special tokens are called in it."""

    source: str
    special: dict[str, str]


def chat_template(beside: Mapping[str, str]) -> ChatTemplate | None:
    """The template among the texts that came along with a model, by file name; None where there is none.

    `chat_template.jinja` is it, else `chat_template` of `chat_template.json` or `tokenizer_config.json`; of several
    named ones the one named default. Raises `Refused` for a file that cannot be read so.
    """
    config, others = _object(beside, _TOKENIZER), _object(beside, _SPECIAL)
    source = beside.get(_FILE) or _object(beside, _JSON).get("chat_template") or config.get("chat_template")
    if isinstance(source, Sequence) and not isinstance(source, str):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, Mapping)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise Refused(f"chat_template is {type(source).__name__}; it must be the text of a template")
    found = {name: config.get(name, others.get(name)) for name in _TOKENS}
    texts = {name: one.get("content") if isinstance(one, Mapping) else one for name, one in found.items()}
    return ChatTemplate(source, {name: text for name, text in texts.items() if isinstance(text, str)})


def rendered(template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation up to where the model answers; each message has a `role` and its `content`.

    Raises `Refused` where Jinja2 is not installed, and for a template that is wrong or does not take these messages.
    """
    try:
        jinja2, sandbox = (importlib.import_module(name) for name in ("jinja2", "jinja2.sandbox"))
    except ImportError as error:
        raise Refused("--chat renders the model's chat template with the library jinja2: "
                      "pip install 'gt-jax[chat]'") from error

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=["jinja2.ext.loopcontrols"])  # fmt: skip
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    source = _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}",
                             template.source)  # fmt: skip
    try:
        text: str = environment.from_string(source).render(
            messages=[dict(one) for one in messages], tools=None, documents=None, add_generation_prompt=True,
            **template.special)  # fmt: skip
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise Refused(f"the model's chat template does not take this: {error}") from error
    return text


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as it is, where Jinja's own filter would write HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _object(beside: Mapping[str, str], name: str) -> Mapping[str, Any]:
    """A file's JSON object, {} where it did not come along."""
    if name not in beside:
        return {}
    try:
        found = parse_json(beside[name])
    except ValueError as error:
        raise Refused(f"the {name} that came along is no JSON: {error}") from error
    return found if isinstance(found, Mapping) else {}


def stop_tokens(beside: Mapping[str, str]) -> tuple[int, ...]:
    """The ids that end an answer, by the generation config that came along; () where it says none.

    Raises `Refused` for a file that says no ids.
    """
    found = _object(beside, "generation_config.json").get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool) or one < 0]:
        raise Refused(f"eos_token_id of the generation config that came along has {wrong[0]!r}; ids are whole numbers "
                      "from 0; name them with --stop-tokens")  # fmt: skip
    return tuple(dict.fromkeys(ids))
