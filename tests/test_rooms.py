"""The house: which room may import which, that nothing runs up, and what stands at the front door.

`ROOMS` is the documentation of it: a room imports from the rooms listed for it, and from nothing else of the project.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = frozenset((
    "calibrate", "convert", "demo", "describe", "evaluate", "grow", "measure", "plan_pod", "prepare", "report",
    "retrofit", "sample", "train", "verify",
))  # fmt: skip
BASE = ("errors", "files", "options", "typing")
ROOMS = {  # from the ground up: every room stands on rooms above it in this table
    "errors": (),
    "files": ("errors",),
    "options": (),
    "typing": (),
    "configs": BASE,
    "devices": BASE,
    "tasks": (*BASE, "configs"),
    "text": (*BASE, "configs", "tasks"),
    "models": (*BASE, "configs", "devices", "text"),
    "checkpoints": (*BASE, "configs", "devices"),
    "growth": (*BASE, "configs", "devices", "models", "checkpoints"),
    "interop": (*BASE, "configs", "text", "models", "checkpoints"),
    "monitoring": (*BASE, "configs", "tasks", "growth"),
    "training": (*BASE, "configs", "devices", "text", "models", "checkpoints", "monitoring"),
    "evaluation": (*BASE, "configs", "devices", "tasks", "text", "models", "checkpoints", "growth", "monitoring",
                   "training"),
}
# The commands, the list of them and the public face import from any room; from no command.
TOP = (*COMMANDS, "__init__", "__main__")
OPERATIONS = ("causal_attention", "gated_delta_rule", "hyper_connections", "sparse_attention")


def python_files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Dotted names that a file imports, wherever in the file, without those that only type checkers read."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(path):
    """`growth` for gt_jax/growth/plan.py, `train` for gt_jax/train.py."""
    return path.relative_to(ROOT / "gt_jax").parts[0].removesuffix(".py")


def test_the_table_stands_on_the_ground():
    """Each room only on rooms above it in the table: so no two import each other, and no import runs up."""
    names = list(ROOMS)
    for number, (room, below) in enumerate(ROOMS.items()):
        assert set(below) <= set(names[:number]), room


def test_the_documented_table_is_this_one():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `gt_jax/(\w+)/` \| .* \| ([^|]*) \|$", text, re.M)
    assert {room for room, _ in rows} == set(ROOMS) - set(BASE)
    for room, words in rows:
        others = set(ROOMS) - set(BASE) - {room}
        if words.startswith("all rooms but "):
            allowed = others - {words.removeprefix("all rooms but ")}
        else:
            allowed = set() if words == "the four files" else set(words.removeprefix("+ ").split(", "))
        assert allowed == set(ROOMS[room]) - set(BASE), f"docs/architecture.md: {room}"


def test_rooms_import_what_the_table_says_and_no_more():
    wrong, used = [], set()
    for path in python_files("gt_jax"):
        room = room_of(path)
        allowed = set(ROOMS) if room in TOP else {room, *ROOMS[room]}
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package != "gt_jax" or not rest:
                continue
            other = rest.split(".")[0]
            used.add((room, other))
            if other not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}; {room} may import {sorted(allowed)}")
    assert not wrong, "\n".join(wrong)
    allowed_but_unused = {(room, other) for room, below in ROOMS.items() for other in below} - used
    assert {other for _, other in allowed_but_unused} <= set(BASE), allowed_but_unused


def test_the_front_door():
    """Thirteen commands, the list of them, the public face, and four files that every room may use."""
    at_the_top = {path.stem for path in (ROOT / "gt_jax").glob("*.py")}
    assert at_the_top == {*COMMANDS, "__init__", "__main__", *BASE}
    rooms = {path.parent.name for path in (ROOT / "gt_jax").glob("*/__init__.py")}
    assert rooms == set(ROOMS) - set(BASE)
    for path in python_files("gt_jax"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} does not say what it is"


def test_kernels_know_nothing_of_the_library_nor_of_each_other():
    for path in python_files("pallas_kernels"):
        inside = path.relative_to(ROOT / "pallas_kernels").parts
        for name in imported(path):
            assert not name.startswith("gt_jax"), f"{path} imports {name}"
            other = name.split(".")[1] if name.startswith("pallas_kernels.") else None
            assert other not in OPERATIONS or other == inside[0], f"{path} imports {name}"
    for operation in OPERATIONS:
        top = {path.stem for path in (ROOT / "pallas_kernels" / operation).glob("*.py")}
        assert top <= {"__init__", "api", "reference", "xla", "pallas_tpu", "pallas_gpu"}, operation


def test_only_checkpoints_imports_orbax():
    for path in python_files("gt_jax"):
        if room_of(path) != "checkpoints":
            assert not any(name.split(".")[0] == "orbax" for name in imported(path)), path


def test_no_circles_between_the_files_of_experiments():
    files = {f"experiments.{'.'.join(path.relative_to(ROOT / 'experiments').with_suffix('').parts)}": path
             for path in python_files("experiments")}
    imports = {name: set(imported(path)) for name, path in files.items()}
    edges = {name: {other for other in files if any(one == other or one.startswith(f"{other}.") for one in ones)}
             for name, ones in imports.items()}
    finished, open_ones = set(), []

    def visit(name):
        assert name not in open_ones, " -> ".join([*open_ones[open_ones.index(name):], name])
        if name not in finished:
            open_ones.append(name)
            for other in sorted(edges[name]):
                visit(other)
            finished.add(open_ones.pop())

    for name in sorted(files):
        visit(name)


def test_configs_and_command_lines_need_no_jax():
    """So that --help, refusals, dry runs and plans are there at once; the demo alone is one script."""
    program = f"""
import contextlib, importlib, io, sys
import gt_jax.configs.calibration, gt_jax.configs.presets, gt_jax.configs.run, gt_jax.devices.flags
for name in {sorted(COMMANDS - {"demo"})}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(f"gt_jax.{{name}}").main(["--help"])
    heavy = {{"jax", "flax", "optax", "orbax", "tensorflow", "torch", "matplotlib"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
