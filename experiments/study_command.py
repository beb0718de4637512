"""What the command lines of the studies share: their options, seeds as words, and from units to the stored file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import contract
from experiments.contract import Rows
from experiments.units import Units
from experiments.workers import Make, Workers
from gt_jax.checkpoints.lock import only_writer
from gt_jax.configs.json_config import Config
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import local_path
from gt_jax.options import at_least

Keeps = Callable[[Any, Mapping[str, Any], str], Rows]
"""(study, stored file, hash of what is read) -> rows of the file that the study would make the same."""
WITH_RENDER = ("--render", "--output", "--part")
UNSTORED = ("line", "measured")
"""Of a unit: what was said while it was made, and what other units are made from."""


def add_study_flags(p: argparse.ArgumentParser, name: str, seeds: str) -> None:
    """--seeds, --jobs, --work, --output and --render on a parser; `seeds` is their default."""
    p.add_argument("--seeds", default=seeds, help="one of every model each")
    p.add_argument("--jobs", type=at_least(1, 1024), default=1,
                   help="models trained at once, each on a core of its own")
    p.add_argument("--work", type=local_path, default=Path(f"runs/{name}"), help="folder of the finished units")
    p.add_argument("--output", type=local_path, default=Path("experiments/results"))
    p.add_argument("--render", action="store_true", help="train nothing: the page anew from the figures in --output")


def read_seeds(words: str) -> tuple[int, ...]:
    """The seeds of `0,1,2`; raises `Refused` for what is no such list, and for a seed that is named twice."""
    try:
        seeds = tuple(at_least(0)(word) for word in words.split(","))
    except argparse.ArgumentTypeError as error:
        raise Refused(f"--seeds {words!r} is no list of whole numbers such as 0,1,2: {error}") from error
    if len(set(seeds)) < len(seeds):
        raise Refused(f"--seeds {words!r}: seeds must be different; a mean would count one twice")
    return seeds


def say(line: str) -> None:
    """One line of progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(name: str, work: Path, output: Path) -> Iterator[Callable[[], None]]:
    """Inside, nobody else makes units in `work`. What it gives is called before the results are written: it raises
    `Refused` where another run has written `output`'s meanwhile; one that holds `work` is refused at the start."""
    before = contract.standing(output, name)

    def look_again() -> None:
        if contract.standing(output, name) != before:
            raise Refused(f"{output / name}.json has changed since this study began: another has written it; what was "
                          f"trained is kept in {work}, name another --output")  # fmt: skip

    with only_writer(work / "study"):
        yield look_again


def run(
    name: str, arguments: argparse.Namespace, words: Sequence[str], configured: Callable[[], tuple[Config, str]],
    make: Make, rows_of: Callable[..., Rows], summary: Callable[[Rows], dict[str, Any]],
    write: Callable[[Path, Mapping[str, Any]], str], files: Sequence[str] = (), keeps: Keeps | None = None,
    module: str | None = None, key: str = "task",
) -> int:  # fmt: skip
    """Run the study `name`, or with --render only its page anew, and print the page.

    `configured` gives the config and a hash of what is read, `rows_of` every unit by the workers that call `make`;
    `write` makes page and picture of a stored file. `files` stand in the stored command by their names alone. `keeps`
    gives the rows of the earlier run in --output that stay, which `rows_of` gets too; without it the file there must be
    of this very study; `key` is what a row calls its setting. `module` is that of the command where it is not called as
    the study is.
    """
    from experiments.machine import machine  # loads JAX, which --help and refusals do without

    output = arguments.output
    if arguments.render:
        _refuse_beside_render(words)
        print(contract.rendered(output / f"{name}.json", summary, lambda stored: write(output, stored)))
        return 0
    if arguments.jobs < 1:
        raise Refused(f"--jobs {arguments.jobs}: at least one model is trained at a time")
    study, content = configured()
    if keeps is None:
        contract.check_output(output, name, study, content)
    lent = () if keeps is None else (_kept(output / f"{name}.json", study, content, keeps, key),)
    contract.prepare(output)
    units = Units(arguments.work, study, content)
    with alone(name, arguments.work, output) as look_again:
        with Workers(units, make, arguments.jobs, say) as workers:
            made = rows_of(study, workers, *lent)
        look_again()
    rows = contract.in_order({key: value for key, value in row.items() if key not in UNSTORED} for row in made)
    command = contract.command_line(f"experiments.{module or name}", words, files)
    stored = contract.stored(command=command, config=named(study), machine=machine(), seconds=units.seconds, rows=rows,
                             summary=summary(rows), content=content)  # fmt: skip
    contract.write(output / f"{name}.json", stored)
    print(write(output, stored))
    return 0


def named(study: Config) -> Config:
    """As the command has it, files by their names alone."""
    files = {"text": lambda names: tuple(Path(name).name for name in names), "tokenizer": lambda name: Path(name).name}
    return study.replace(**{field: short(getattr(study, field)) for field, short in files.items()
                            if hasattr(study, field)})  # fmt: skip


def _refuse_beside_render(words: Sequence[str]) -> None:
    """Refuse what --render would not look at: it takes all from the stored file."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    refuse_all([f"{flag} is of a study that is run; --render takes all from the stored one"
                for flag in flags if not any(known.startswith(flag) for known in WITH_RENDER)],
               "these arguments do not go together:")  # fmt: skip


def _kept(file: Path, study: Any, content: str, keeps: Keeps, key: str) -> Rows:
    """The rows of `file` that stay; raises `Refused` where others would be lost."""
    found = contract.read(file)
    rows = keeps(study, found, content)
    contract.check_kept(file, found, rows, [one.name for one in study.settings], key)
    return rows
