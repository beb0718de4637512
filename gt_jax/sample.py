"""`python -m gt_jax.sample CHECKPOINT`: continue texts, one token at a time, or show a model's answers to a task.

    python -m gt_jax.sample runs/a --prompt "def "
    python -m gt_jax.sample runs/a --prompt "def " --prompt "class " --top-p 0.9 --stop "\n\n" --json
    python -m gt_jax.sample runs/a --task pointer_jumps:hardest=4 --instances 3

- --chat puts each prompt into the chat template that came along with a converted model, as what its user says.
- The stop tokens of the generation config that came along end a text; --stop-tokens names others, or none.
- Prefill and decoding are timed apart, without their compilation; the rates are said on standard error.
- Without --prompt a model that was trained on tasks or JSON lines alone answers held-out instances of these.
- An empty prompt starts a document. Each prompt is continued as it would be alone, with a seed of its own, one more
  than the one before it has.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from gt_jax.devices.precision import add_precision_flag, computing
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Refused, deliver, refuse_all, run_command, say
from gt_jax.files import local_name, local_path
from gt_jax.options import whole

PROMPT = "def "
INSTANCES = 3
DRAWN = {"length": 200, "temperature": 0.8, "top_k": 40, "top_p": 1.0}
"""How a text is continued where no option says otherwise."""
_OF_TEXT = (*DRAWN, "seed", "stop", "stop_tokens")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=local_path, help="checkpoint or run directory")
    p.add_argument("--prompt", action="append", metavar="TEXT", help=f"text to continue ({PROMPT!r}); may be given "
                   "several times")  # fmt: skip
    p.add_argument("--task", action="append", metavar="NAME[:OPTION=VALUE,…]", help="show answers to held-out "
                   "instances of this task; may be given several times")  # fmt: skip
    p.add_argument("--instances", type=whole, metavar="N", help=f"of each task ({INSTANCES})")
    p.add_argument("--tokenizer", type=local_name,
                   help="bytes, a file or a folder (default: what the checkpoint was trained with)")
    p.add_argument("--length", type=whole, help="tokens to write (200)")
    p.add_argument("--temperature", type=float, help="0 takes the most likely token, inf any of those that --top-k and "
                   "--top-p leave (0.8)")  # fmt: skip
    p.add_argument("--top-k", type=whole, metavar="K", help="draw from the K most likely tokens (40); a K above the "
                   "vocabulary is all of it")  # fmt: skip
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that have together a "
                   "probability of P (1, all)")  # fmt: skip
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given "
                   "several times (the end of a document ends it always)")  # fmt: skip
    p.add_argument("--stop-tokens", metavar="IDS|none", help="ids that end a text, for example 3,4 (default: those of "
                   "the generation config that came along with the model)")  # fmt: skip
    p.add_argument("--chat", action="store_true",
                   help="each prompt is what a user says, in the model's chat template (needs jinja2)")
    p.add_argument("--seed", type=whole, help="of what is drawn for the first prompt (0)")
    add_precision_flag(p)
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_cache_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prompts with their continuations up to the end of the document, or instances with their answers."""
    arguments = parser().parse_args(argv)
    wrong = [] if not (arguments.prompt and arguments.task) else [
        "--prompt continues a text, --task shows answers; leave one out"]
    if arguments.instances is not None and arguments.instances < 1:
        wrong.append(f"--instances is {arguments.instances}; at least one can be shown")
    if arguments.instances is not None and arguments.prompt:
        wrong.append("--instances is how many of a task are shown, and has no meaning with --prompt")
    wrong += ["--chat needs what the user says; give it by --prompt"] if arguments.chat and not arguments.prompt else []
    stop_tokens = "none" if arguments.stop_tokens is None else arguments.stop_tokens
    if not re.fullmatch(r"none|\d{1,9}(,\d{1,9})*", stop_tokens):
        wrong.append(f"--stop-tokens {arguments.stop_tokens!r} is neither none nor ids such as 3,4")
    wrong += ["--stop is empty; every text begins with it"] if "" in arguments.stop else []
    wrong += [f"--{name} cannot be encoded: {text!r} is not UTF-8; your terminal or its source has another encoding"
              for name, texts in (("prompt", arguments.prompt or ()), ("stop", arguments.stop)) for text in texts
              if not _is_text(text)]
    refuse_all(wrong, "nothing can be sampled so:")
    keep_programs(arguments)
    from gt_jax.evaluation.generation import wrong_settings
    from gt_jax.evaluation.model_files import load, open_checkpoint
    from gt_jax.text.tokenizers import chosen_tokenizer, open_tokenizer

    settings: dict[str, Any] = {name: default if (given := getattr(arguments, name)) is None else given
                for name, default in DRAWN.items()}  # fmt: skip
    refuse_all(wrong_settings(**settings), "cannot sample:")
    asks = None if arguments.prompt is not None else _questions(arguments, open_checkpoint(arguments.checkpoint))
    if asks is None and arguments.instances is not None:
        raise Refused(f"--instances {arguments.instances} is how many of a task are shown; {arguments.checkpoint} "
                      "continues texts: name a task with --task, or leave it out")
    if asks is not None:
        refuse_all([f"--{name.replace('_', '-')} is of texts that are continued; answers are the likeliest tokens. "
                    "Leave it out, or continue a text: --prompt" for name in _OF_TEXT
                    if getattr(arguments, name) not in (None, [])], "nothing can be sampled so:")  # fmt: skip
    config, variables, metadata = load(arguments.checkpoint)
    tokenizer = open_tokenizer(chosen_tokenizer(metadata, arguments.tokenizer, arguments.checkpoint))
    if tokenizer.vocab_size > config.vocab:
        raise Refused(f"the tokenizer has {tokenizer.vocab_size} ids, {arguments.checkpoint} a vocabulary of "
                      f"{config.vocab}; name the one it was trained with by --tokenizer")  # fmt: skip
    try:
        with computing(arguments.matmul_precision):
            if asks is not None:
                found, lines = _answers(config, variables, asks, arguments.instances or INSTANCES)
            else:
                found, lines = _continued(config, variables, tokenizer, metadata, arguments, settings)
    except Refused as error:
        raise Refused(f"{arguments.checkpoint}: {error}") from error
    about = {"checkpoint": str(arguments.checkpoint), "step": metadata.get("step")}
    deliver(json.dumps({**about, **found}, allow_nan=False) if arguments.json else "\n".join(lines))
    return 0


def _is_text(text: str) -> bool:
    """Whether a word of the command line is Unicode; Python keeps bytes of another encoding as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _questions(arguments: argparse.Namespace, checkpoint: Any) -> Any:
    """The `Data` that --task names, or that the model was trained on where that is without text; else None."""
    from gt_jax.configs.data import TEXT
    from gt_jax.evaluation.loading import data_config
    from gt_jax.text.data import open_data
    from gt_jax.text.flags import read_tasks

    named = {"tasks": read_tasks(arguments.task or ()), "tokenizer": arguments.tokenizer}
    data = data_config(checkpoint.metadata, named, arguments.checkpoint)
    return None if TEXT in data.parts else open_data(data)


def _answers(config: Any, variables: Any, data: Any, count: int) -> tuple[dict[str, Any], list[str]]:
    """Held-out instances with what the model says, as JSON and as lines for a reader."""
    from gt_jax.evaluation.shown_instances import held_out_instances, lines_of

    shown: list[dict[str, Any]] = []
    lines: list[str] = []
    for name, part in data.parts.items():
        found = held_out_instances(config, variables, part, count, data.tokenizer.vocab_size)
        for number, instance in enumerate(found, 1):
            lines += [*lines_of(name, number, instance, data.tokenizer), ""]
            shown.append({"part": name, "instance": number,
                          **{field: value.tolist() for field, value in instance._asdict().items()}})  # fmt: skip
    return {"instances": shown}, lines


def _continued(config: Any, variables: Any, tokenizer: Any, metadata: Any, arguments: argparse.Namespace,
               settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The continuation of every prompt, as JSON and as lines for a reader; prompts of one length go together."""
    import numpy as np

    from gt_jax.evaluation.generation import sample_timed
    from gt_jax.evaluation.read_together import read_together
    from gt_jax.monitoring.metrics import json_values

    given = [PROMPT] if arguments.prompt is None else arguments.prompt
    beside = _beside(metadata)
    if (note := read_together(config)) is not None:
        say(f"note: {note}")
    prompts = [_chat(text, tokenizer, beside, arguments) if arguments.chat else _tokens(text, tokenizer)
               for text in given]  # fmt: skip
    ends = _stop_tokens(arguments, tokenizer, beside, config.vocab)
    samples, seed = [dict[str, Any]() for _ in given], arguments.seed or 0
    reading = decoding = 0.0
    for size in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == size]
        drawn = sample_timed(config, variables, np.stack([prompts[row] for row in rows]), **settings,
                             seed=[seed + row for row in rows], tokens=tokenizer.vocab_size)  # fmt: skip
        reading, decoding = reading + drawn.prefill_seconds, decoding + drawn.decode_seconds
        for row, ids in zip(rows, drawn.tokens, strict=True):
            samples[row] = {"prompt": given[row], **_ended(prompts[row], ids, tokenizer, arguments.stop, ends)}
    read, written = sum(map(len, prompts)), len(prompts) * settings["length"]
    rates = {"time_prefill_tokens_per_second": read / reading, "time_decode_tokens_per_second": written / decoding}
    say(f"prefill: {read} tokens, {read / reading:,.0f} a second; decoding: {written} tokens, "
        f"{written / decoding:,.0f} a second")  # fmt: skip
    lines = [one["text"] if arguments.chat else one["prompt"] + one["text"] for one in samples]
    separated = [line for text in lines for line in (text, "")][:-1]
    found = {**settings, "seed": seed, "stop_tokens": list(ends), "samples": samples, **rates}
    return json_values(found), separated


def _beside(metadata: Any) -> dict[str, str]:
    """The small texts that came along when the model, or what it was made from, was converted."""
    from gt_jax.configs.lineage import newest

    origin = newest(metadata, "converted_from")
    return dict(origin.get("beside") or {}) if isinstance(origin, dict) else {}


def _stop_tokens(arguments: argparse.Namespace, tokenizer: Any, beside: dict[str, str], vocab: int
                 ) -> tuple[int, ...]:  # fmt: skip
    """The ids that end a text beside the end of the document; those that nobody named are said.

    Raises `Refused` for a named one that the model does not have.
    """
    from gt_jax.text.chat_template import stop_tokens

    if arguments.stop_tokens is not None:
        given = () if arguments.stop_tokens == "none" else tuple(map(int, arguments.stop_tokens.split(",")))
        refuse_all([f"{token} is no token of the model, whose ids are 0 to {vocab - 1}" for token in given
                    if token >= vocab], f"--stop-tokens {arguments.stop_tokens}:")  # fmt: skip
        return given
    found = stop_tokens(beside)
    if found:
        name_of = getattr(tokenizer, "name_of", lambda token: None)
        named = [f"{token}{'' if (name := name_of(token)) is None else f' {name}'}" for token in found]
        say(f"a text ends at the tokens {', '.join(named)}, by the generation config that came along with the model")
    return found


def _chat(text: str, tokenizer: Any, beside: dict[str, str], arguments: argparse.Namespace) -> Any:
    """The ids of what a user says in the model's chat template, int32 [n]."""
    from gt_jax.text.chat_template import chat_template, rendered
    from gt_jax.text.tokenizers import HuggingFaceTokenizer

    template = chat_template(beside)
    if template is None:
        raise Refused("--chat: no chat template came along with this model; leave --chat out, and spell the prompt as "
                      "the model knows it")  # fmt: skip
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise Refused("--chat spells special tokens, which are those of a tokenizer.json; this model's tokenizer is "
                      "none")  # fmt: skip
    try:
        return tokenizer.encode_spelled(rendered(template, [{"role": "user", "content": text}]))
    except ValueError as error:
        raise Refused(f"--prompt cannot be encoded by the model's tokenizer, {text!r}: {error}") from error


def _tokens(text: str, tokenizer: Any) -> Any:
    """The ids of a prompt, int32 [n]; of an empty one the end of the document before it, which starts the next."""
    import numpy as np

    from gt_jax.text.round_trip import lost

    if not text:
        return np.array([tokenizer.end_of_document], np.int32)
    try:
        prompt = tokenizer.encode(text.encode())
    except ValueError as error:
        raise Refused(f"--prompt cannot be encoded by the model's tokenizer, {text!r}: {error}") from error
    if not prompt.size:
        raise Refused(f"--prompt {text!r} has no token in the model's tokenizer; give other words, or an empty prompt")
    if lost(tokenizer, [text.encode()], [prompt]):
        read = tokenizer.decode(prompt).decode("utf-8", "replace")
        say(f"note: the model's tokenizer has no token for all of --prompt {text!r}; the model reads {read!r}")
    return prompt


def _ended(prompt: Any, drawn: Any, tokenizer: Any, stops: Sequence[str], stop_tokens: Sequence[int] = ()
           ) -> dict[str, Any]:  # fmt: skip
    """{"text", "tokens", "ended"}: what was drawn up to the end of the document, a stop token, the first stop, or the
    length.

    The tokens are those that the text came from: with a stop the last one may reach into it or beyond.
    """
    import numpy as np

    ends = np.flatnonzero(np.isin(drawn, [tokenizer.end_of_document, *stop_tokens]))
    tokens, ended = (drawn[: ends[0]], "stop token") if len(ends) else (drawn, "length")
    if len(ends) and drawn[ends[0]] == tokenizer.end_of_document:
        ended = "end of document"
    text = _text(prompt, tokens, tokenizer)
    places = [text.index(stop.encode()) for stop in stops if stop.encode() in text]
    if places:
        text, ended = text[: min(places)], "stop"
        count = next(n for n in range(len(tokens) + 1)
                     if any(stop.encode() in _text(prompt, tokens[:n], tokenizer) for stop in stops))
        tokens = tokens[:count]
    return {"text": text.decode("utf-8", "replace"), "tokens": tokens.tolist(), "ended": ended}


def _text(prompt: Any, drawn: Any, tokenizer: Any) -> bytes:
    """The text that the drawn tokens add to their prompt."""
    from gt_jax.text.tokenizers import continuation

    return continuation(tokenizer, prompt, drawn)


if __name__ == "__main__":
    run_command(main)
