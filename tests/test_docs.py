"""README, CONTRIBUTING and docs: every command line parses, every link leads somewhere, the README is short."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from gt_jax import __main__ as entry

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README_LINES = 140


def text_of(page):
    return page.read_text(encoding="utf-8")


def command_lines(text):
    """Every `python -m gt_jax…` and `python -m experiments…`, in blocks and within lines, continuations joined."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S)).replace("\\\n", " ")
    inside = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = []
    for line in [*blocks.splitlines(), *(" ".join(span.split()) for span in inside)]:
        if match := re.search(r"(?:^|\s)[\w./]*python3? -m (?P<rest>(?:gt_jax|experiments\.).*)", line):
            found.append((line.strip(), match["rest"]))
        elif match := re.match(r"\s*(?:\S*/)?gt-jax (?P<rest>\S.*)", line):
            found.append((line.strip(), f"gt_jax {match['rest']}"))
    return found


def parsed(rest):
    """Parse the words of a command line with the command's own parser; raises SystemExit for what it refuses."""
    words = shlex.split(rest, comments=True)
    module, arguments = words[0], words[1:]
    if module.startswith("experiments."):
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert file.is_file(), f"there is no {module}"
        unknown = {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help"} - options(file)
        assert not unknown, f"{module} has no {', '.join(sorted(unknown))}"
        return
    if module == "gt_jax":
        if not arguments or arguments[0] in ("--version", "COMMAND"):
            return
        module, arguments = f"gt_jax.{arguments[0].replace('-', '_')}", arguments[1:]
    name = module.removeprefix("gt_jax.")
    assert name in entry.COMMANDS, f"there is no command {name}"
    known = flags(name)
    if not arguments:  # the command is only named
        return
    if arguments[0] in ("--help", "-h"):
        return
    arguments = [word for word in arguments if word not in ("…", "...")]
    wrong = [word for word in arguments if word.startswith("--") and word.split("=")[0] not in known]
    assert not wrong, f"{name} has no {', '.join(wrong)}"
    importlib.import_module(module).parser().parse_args(arguments)


def options(file):
    """The options that a file of experiments/, or of a file or folder there that it imports from, adds to a parser."""
    names, root = sorted(set(re.findall(r"(?:from|import) experiments\.(\w+)", text_of(file)))), ROOT / "experiments"
    files = [file, *(other for name in names for other in (*root.glob(f"{name}.py"), *(root / name).glob("*.py")))]
    return {flag for one in files for flag in re.findall(r"add_argument\(\s*\"(--[\w-]+)", text_of(one))}


def flags(name):
    parser = importlib.import_module(f"gt_jax.{name}").parser()
    return {string for action in parser._actions for string in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_line_parses(page, capsys):
    for line, rest in command_lines(text_of(page)):
        try:
            parsed(rest)
        except SystemExit as left:
            raise AssertionError(f"{page.name}: {line}\n{capsys.readouterr().err}") from left
        except (AssertionError, ValueError, argparse.ArgumentError) as error:
            raise AssertionError(f"{page.name}: {line}\n{error}") from error


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_option_named_in_a_line_exists(page):
    """`--option` in running text belongs to some command, to pip, or to pytest."""
    known = {flag for name in entry.COMMANDS for flag in flags(name)}
    known |= set().union(*map(options, (ROOT / "experiments").glob("*.py")))
    known |= {"--version", "--help", "--no-deps", "--durations", "--dist"}
    named = set(re.findall(r"`(--[a-z][\w-]*)", text_of(page)))
    assert not {flag for flag in named if flag not in known and not flag.startswith("--xla_")}, page


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_and_path_leads_somewhere(page):
    text = text_of(page)
    for target in re.findall(r"\]\(([^)]+?)\)", text):
        target = "".join(target.split())  # a link may be broken over two lines
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}; headings: {anchors(file)}"
    for path in re.findall(r"`((?:gt_jax|pallas_kernels|experiments|tests|docs)/[\w./*]+)`", text):
        any_operation = path.rstrip("/").replace("/OP/", "/*/")  # how CONTRIBUTING names one that is to come
        assert list(ROOT.glob(any_operation)), f"{page.name} names {path}, which is not there"
    for module in re.findall(r"`((?:gt_jax|pallas_kernels|experiments)(?:\.\w+)+)(?:\(.*?\))?`", text):
        assert exists(module), f"{page.name} names {module}, which is not there"


def anchors(page):
    """What may stand after # in a link to a page."""
    return sorted(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
                  for heading in re.findall(r"^#+ (.+)$", text_of(page), re.M))


def exists(dotted):
    """Whether a dotted name is a module, or a name in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file() or path.is_dir():
            file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            rest = parts[count:]
            return not rest or (file.is_file() and re.search(rf"\b{rest[0]}\b", text_of(file)) is not None)
    return False


def test_the_readme_is_short_and_every_page_is_linked_from_it_or_from_training():
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= README_LINES
    linked = set(re.findall(r"\]\((docs/\w+\.md|CONTRIBUTING\.md|CHANGELOG\.md)\)", readme))
    training = text_of(ROOT / "docs" / "training.md")  # which leads on to what the README has no line for
    linked |= {f"docs/{page}" for page in re.findall(r"\]\((gpu\.md)\)", training)}
    assert linked >= {str(page.relative_to(ROOT)) for page in PAGES if page.name != "README.md"}


def test_the_library_section_uses_the_public_face_and_nothing_else():
    import gt_jax

    (code,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), re.S)
    assert set(re.findall(r"gt_jax\.(\w+)", code)) <= set(gt_jax.__all__)
    assert not re.search(r"^from gt_jax", code, re.M)
    small = code.replace('preset("tiny")', 'preset("tiny").replace(layout="DG")')  # as the examples
    assert small != code
    exec(compile(small, "README.md", "exec"), {})


RESULTS = ROOT / "experiments" / "results"
FIGURE = r"([+-]?\d+\.\d+)"
INTERVAL = re.compile(rf"{FIGURE}(?:[^\d(.]{{0,20}} \((?:95 % interval )?|(?: \(|(?: points)?, )){FIGURE} to {FIGURE}")


def numbers(match):
    """A mean and its interval, and those of the same comparison turned round."""
    mean, low, high = (float(word) for word in match)
    return {(mean, low, high), (-mean, -high, -low)}


@pytest.mark.parametrize(("page", "start", "end", "reports"), [
    ("docs/studies.md", "## Is depth used?", "## What do gates give", "depth_tasks"),
    ("docs/studies.md", "## What do gates give", "## Where does one model", "text_gates"),
    ("docs/studies.md", "## Where does one model", "## Which way of growing", "mixed_depth"),
    ("docs/studies.md", "## Which way of growing", "## Does leaving", "growth_operators"),
    ("docs/studies.md", "## Does leaving", "## Does growth pay?", "early_exit"),
    ("docs/studies.md", "## Does growth pay?", "## What is lost when", "growth_pays, kept_gates_on_text"),
    ("docs/studies.md", "## What is lost when", "## Is the state of a hybrid", "freed_gates"),
    ("docs/depth.md", "Not shown:", "## What makes depth used", "growth_operators, mixed_depth"),
    ("docs/growing.md", "### The identity of growth", "## The commands", "growth_operators"),
    ("docs/growing.md", "### calibrate", "### Lineage", "growth_operators"),
    ("README.md", "Not shown yet", "## Licence", "growth_operators, growth_pays, mixed_depth"),
])  # fmt: skip
def test_every_interval_of_a_study_in_the_docs_stands_in_its_report(page, start, end, reports):
    """To the digits that the page gives; a page may turn a comparison round."""
    pages = "\n".join(text_of(RESULTS / f"{report}.md") for report in reports.split(", "))
    told = [numbers(match) for match in INTERVAL.findall(pages)]
    known = set().union(*told)
    text = " ".join(text_of(ROOT / page).split(start)[1].split(end)[0].split())
    found = INTERVAL.findall(text)
    assert len(found) > 1, "hardly any figure of the study was recognised"
    for match in found:
        digits = min(len(word.split(".")[1]) for word in match)
        wanted = tuple(float(word) for word in match)
        assert any(tuple(round(x, digits) for x in one) == wanted for one in known), f"{page}: {' '.join(match)}"


BOUNDS = {"flops": "arithmetic", "bytes": "memory", "links": "links"}
ROW = re.compile(r"^\|.*\(\.\./(experiments/results/plan_pod_\w+\.json)\)(.*)\|$", re.M)
PLANS = ROW.findall(text_of(ROOT / "docs/pods.md"))


@pytest.mark.parametrize("file, row", PLANS, ids=[Path(file).stem for file, _ in PLANS])
def test_every_figure_of_a_plan_in_the_docs_is_that_of_the_stored_one(file, row):
    plan = json.loads((ROOT / file).read_text())["tried"][0]
    cells = [cell.split(";")[0].strip() for cell in row.split("|")]  # of two variants the first is stored
    at = next(number for number, cell in enumerate(cells) if cell.count(" / ") == 2)
    assert cells[at] == " / ".join(f"{plan['least_seconds'][name]:.2f}" for name in BOUNDS)
    assert cells[at - 1 : at + 2 : 2] == [f"{plan['links'] / 1e9:.0f}", BOUNDS[plan["bound"]]]
    assert f"{plan['memory']['total'] / 2**30:.1f}" in re.findall(r"[\d.]+", " ".join(cells[1:]))
