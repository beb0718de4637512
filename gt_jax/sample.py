"""`python -m gt_jax.sample CHECKPOINT`: continue texts, one token at a time, or show a model's answers to a task.

    python -m gt_jax.sample runs/a --prompt "def "
    python -m gt_jax.sample runs/a --prompt "def " --prompt "class " --top-p 0.9 --stop "\n\n" --json
    python -m gt_jax.sample runs/a --task pointer_jumps:hardest=4 --instances 3

- Without --prompt a model that was trained on tasks or JSON lines alone answers held-out instances of these.
- An empty prompt starts a document. Each prompt is continued as it would be alone, with a seed of its own, one more
  than the one before it has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from gt_jax.errors import Refused, deliver, refuse_all, run_command
from gt_jax.files import local_name, local_path
from gt_jax.options import whole

PROMPT = "def "


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
    p.add_argument("--instances", type=whole, default=3, metavar="N", help="of each task (3)")
    p.add_argument("--tokenizer", type=local_name,
                   help="bytes, a file or a folder (default: what the checkpoint was trained with)")
    p.add_argument("--length", type=whole, default=200, help="tokens to write")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token, inf any of those "
                   "that --top-k and --top-p leave")  # fmt: skip
    p.add_argument("--top-k", type=whole, default=40, metavar="K", help="draw from the K most likely tokens (40); a K "
                   "above the vocabulary is all of it")  # fmt: skip
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that have "
                   "together a probability of P (1, all)")  # fmt: skip
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given "
                   "several times (the end of a document ends it always)")  # fmt: skip
    p.add_argument("--seed", type=whole, default=0)
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prompts with their continuations up to the end of the document, or instances with their answers."""
    arguments = parser().parse_args(argv)
    wrong = [] if not (arguments.prompt and arguments.task) else [
        "--prompt continues a text, --task shows answers; leave one out"]
    wrong += [] if arguments.instances >= 1 else [f"--instances is {arguments.instances}; at least one can be shown"]
    wrong += ["--stop is empty; every text begins with it"] if "" in arguments.stop else []
    wrong += [f"--{name} cannot be encoded: {text!r} is not UTF-8; your terminal or its source has another encoding"
              for name, texts in (("prompt", arguments.prompt or ()), ("stop", arguments.stop)) for text in texts
              if not _is_text(text)]
    refuse_all(wrong, "nothing can be sampled so:")
    from gt_jax.evaluation.generation import wrong_settings
    from gt_jax.evaluation.model_files import load, open_checkpoint
    from gt_jax.text.tokenizers import chosen_tokenizer, open_tokenizer

    settings = {"length": arguments.length, "temperature": arguments.temperature, "top_k": arguments.top_k,
                "top_p": arguments.top_p}
    refuse_all(wrong_settings(**settings), "cannot sample:")
    asks = None if arguments.prompt is not None else _questions(arguments, open_checkpoint(arguments.checkpoint))
    config, variables, metadata = load(arguments.checkpoint)
    tokenizer = open_tokenizer(chosen_tokenizer(metadata, arguments.tokenizer, arguments.checkpoint))
    if tokenizer.vocab_size > config.vocab:
        raise Refused(f"the tokenizer has {tokenizer.vocab_size} ids, {arguments.checkpoint} a vocabulary of "
                      f"{config.vocab}; name the one it was trained with by --tokenizer")  # fmt: skip
    try:
        if asks is not None:
            found, lines = _answers(config, variables, asks, arguments.instances)
        else:
            found, lines = _continued(config, variables, tokenizer, arguments, settings)
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


def _continued(config: Any, variables: Any, tokenizer: Any, arguments: argparse.Namespace,
               settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The continuation of every prompt, as JSON and as lines for a reader; prompts of one length go together."""
    import numpy as np

    from gt_jax.evaluation.generation import sample
    from gt_jax.monitoring.metrics import json_values

    given = [PROMPT] if arguments.prompt is None else arguments.prompt
    prompts = [_tokens(text, tokenizer) for text in given]
    samples: list[dict[str, Any]] = [{} for _ in given]
    for size in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == size]
        drawn = sample(config, variables, np.stack([prompts[row] for row in rows]), **settings,
                       seed=[arguments.seed + row for row in rows], tokens=tokenizer.vocab_size)  # fmt: skip
        for row, ids in zip(rows, drawn, strict=True):
            samples[row] = {"prompt": given[row], **_ended(prompts[row], ids, tokenizer, arguments.stop)}
    lines = [one["prompt"] + one["text"] for one in samples]
    separated = [line for text in lines for line in (text, "")][:-1]
    return json_values({**settings, "seed": arguments.seed, "samples": samples}), separated


def _tokens(text: str, tokenizer: Any) -> Any:
    """The ids of a prompt, int32 [n]; of an empty one the end of the document before it, which starts the next."""
    import numpy as np

    if not text:
        return np.array([tokenizer.end_of_document], np.int32)
    try:
        prompt = tokenizer.encode(text.encode())
    except ValueError as error:
        raise Refused(f"--prompt cannot be encoded by the model's tokenizer, {text!r}: {error}") from error
    if not prompt.size:
        raise Refused(f"--prompt {text!r} has no token in the model's tokenizer; give other words, or an empty prompt")
    return prompt


def _ended(prompt: Any, drawn: Any, tokenizer: Any, stops: Sequence[str]) -> dict[str, Any]:
    """{"text", "tokens", "ended"}: what was drawn up to the end of the document, the first stop, or the length.

    The tokens are those that the text came from: with a stop the last one may reach into it or beyond.
    """
    import numpy as np

    ends = np.flatnonzero(drawn == tokenizer.end_of_document)
    tokens, ended = (drawn[: ends[0]], "end of document") if len(ends) else (drawn, "length")
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
