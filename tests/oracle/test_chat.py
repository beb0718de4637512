"""Chat templates are rendered, and their special tokens encoded, as transformers does."""

import importlib.util
import json

import pytest

MISSING = [name for name in ("jinja2", "transformers") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"the oracle is not installed ({', '.join(MISSING)}); make test-oracle", allow_module_level=True)

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from gt_jax.errors import Refused
from gt_jax.text.chat_template import chat_template, rendered
from gt_jax.text.tokenizers import open_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # warnings of libraries not ours
CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(count=0) %}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set seen.count = seen.count + 1 %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
{{- eos_token }} {{ seen.count }}"""
OTHERS = {
    "chatml": CHATML,
    "generation": "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}\n {% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ bos_token }}{% if tools is none %} none{% endif %}",
    "time": "{{ strftime_now('%Y') }}{{ messages | length }}",
}
MESSAGES = [{"role": "system", "content": "be <kind> & “short”"}, {"role": "user", "content": " why? <|im_end|> "}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(WordLevel({letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))} | {
        "<|im_start|>": 256, "<|im_end|>": 257, "<think>": 258}, unk_token="a"))  # fmt: skip
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", special=False)])
    made.save(str(place / "tokenizer.json"))
    return place


@pytest.mark.parametrize("name", OTHERS)
def test_text_and_ids_are_those_of_transformers(folder, name):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>",
                                                  eos_token="<|im_end|>", chat_template=OTHERS[name])  # fmt: skip
    config = {"chat_template": OTHERS[name], "bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
    text = rendered(chat_template({"tokenizer_config.json": json.dumps(config)}), MESSAGES)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ours = open_tokenizer(str(folder))
    ids = theirs.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False)
    spelled = text.replace("<s>", "")  # which is no token of the file, but one that transformers adds
    if spelled == text:
        assert ours.encode_spelled(text).tolist() == list(ids)
    assert 257 not in ours.encode(b"<|im_end|>").tolist(), "text that spells a special token stays text"
    assert ours.name_of(257) == "<|im_end|>"


def test_a_template_is_held_to_its_sandbox():
    for source, why in (("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ raise_exception('no tools') }}", "no tools"),
                        ("{{ messages.append(1) }}", "unsafe"), ("{% for %}", "chat template")):  # fmt: skip
        with pytest.raises(Refused, match=why):
            rendered(chat_template({"chat_template.jinja": source}), [])
