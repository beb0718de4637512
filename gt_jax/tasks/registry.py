"""The tasks by name, and the notation in which a command line and a stored config name one with its options.

    variable_chains:hardest=8,chains=4
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from gt_jax.errors import Refused, refuse_all
from gt_jax.tasks.addition import Addition
from gt_jax.tasks.group_words import GroupWords
from gt_jax.tasks.p_hop import PHop
from gt_jax.tasks.pointer_jumps import PointerJumps
from gt_jax.tasks.task import Task
from gt_jax.tasks.variable_chains import VariableChains

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (PointerJumps, PHop, VariableChains, Addition, GroupWords)
}


def read_task(words: str) -> Task:
    """The task of `NAME` or `NAME:OPTION=VALUE,…`; raises `Refused` that lists all that is wrong with it."""
    name, _, rest = words.partition(":")
    if name not in TASKS:
        raise Refused(f"task {name!r} is not known; the tasks are {', '.join(TASKS)}")
    kind = TASKS[name]
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    wrong: list[str] = []
    options: dict[str, Any] = {}
    for one in filter(None, rest.split(",")):
        option, equals, value = one.partition("=")
        if not equals or option not in known:
            wrong.append(f"{one!r} is no option; they are {', '.join(f'{name}=…' for name in known)}")
        elif option in options:
            wrong.append(f"{option} is given twice")
        elif hints[option] is not int:
            options[option] = value
        elif value.isascii() and value.isdigit() and len(value) < 10:
            options[option] = int(value)
        else:
            wrong.append(f"{option} is {value!r}; it must be a whole number")
    refuse_all(wrong, f"task {words!r} cannot be read:")
    try:
        return kind.from_json(options)
    except Refused as error:
        _, *problems = str(error).splitlines()
        raise Refused("\n".join([f"task {words!r} is not valid:", *problems])) from error


def notation(task: Task) -> str:
    """The words of a task with all of its options, so that they mean the same whatever the defaults become."""
    return f"{task.name}:" + ",".join(f"{option}={value}" for option, value in task.to_json().items())
