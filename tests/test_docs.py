"""What README and docs/ tell a user to type exists, with these options; what they point to is there."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jeagle import flags as configs

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PAGES.append(ROOT / "benchmarks" / "RESULTS.md")
PROGRAM = re.compile(
    r"python -m (?P<module>(?:jeagle|benchmarks|tests)[\w.]*\w)"
    r"|(?P<path>(?:converters|benchmarks|launch)/\w+\.(?:py|sh))"
    r"|(?<!\S)make (?P<goal>[a-z-]+)"
)
FLAG = re.compile(r"(?<!\S)--[a-z][a-z0-9.-]*[a-z0-9]")


def command_lines(page: Path) -> list[str]:
    """Those of a page's indented blocks, and what stands between backticks; without comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)
    return [re.split(r"\s#\s", line.strip())[0] for line in lines if PROGRAM.search(line)]


COMMANDS = sorted({line for page in PAGES for line in command_lines(page)})


@functools.cache
def said_of(program: str) -> str:
    """Where a program names its options: its --help, or, of a benchmark, its source and what it imports."""
    path = ROOT / program if "/" in program else ROOT.joinpath(*program.split(".")).with_suffix(".py")
    if path.suffix == ".sh":
        return subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
    if program.startswith(("benchmarks", "tests")):
        own = path.read_text()
        beside = re.findall(r"from benchmarks\.(\w+)", own)
        return own + "".join((path.parent / f"{name}.py").read_text() for name in beside)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setenv("COLUMNS", "300")
        if path.parent.name == "converters":
            patch.setattr(sys, "argv", [program, "--help"])
            runpy.run_path(str(path), run_name="__main__")
        else:
            importlib.import_module(program).main(["--help"])
    return said.getvalue()


def unknown(line: str) -> list[str]:
    """The options of a command line that its program does not have; what follows -- is another command."""
    own, _, rest = re.sub(r"[][|]", " ", line).partition(" -- ")
    found = PROGRAM.search(own)
    assert found, line
    if found["goal"]:
        goals = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong = [name for name in re.findall(r"\b([A-Z]+)=", own) if name not in variables]
        return wrong + [found["goal"]] * (found["goal"] not in goals)
    said = said_of(found["module"] or found["path"])
    wrong = [flag for flag in FLAG.findall(own) if not re.search(rf"(?<![\w.-]){re.escape(flag)}(?![\w.-])", said)]
    return wrong + (unknown(rest) if PROGRAM.search(rest) else [])


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_the_options_that_it_is_shown_with(line):
    assert unknown(line) == []


def test_what_does_not_exist_is_seen():
    assert unknown("python -m jeagle.bench --draft runs/NAME --beam 3") == ["--beam"]
    assert unknown("launch/gpu_node.sh --processes 8 -- python -m jeagle.store --shard 2 verify") == ["--shard"]
    assert unknown("make lunch SEED=2 PLATES=3") == ["PLATES", "lunch"]
    with pytest.raises((ImportError, FileNotFoundError)):
        unknown("python -m jeagle.lunch --beam 3")


@functools.cache
def sentences() -> str:
    """All texts that jeagle's code holds, what is filled in as "N"; in a text of several parts they are joined."""
    texts = []
    for path in sorted((ROOT / "jeagle").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "N" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_commands_in_messages_have_their_options_too():
    named = re.findall(r"python (?:-m jeagle\.[a-z]|converters)[^\n;:,(]*", sentences())
    assert len(named) > 20
    assert {line: wrong for line in set(named) if PROGRAM.search(line) and (wrong := unknown(line))} == {}


def test_what_troubleshooting_quotes_is_said():
    quotes = re.findall(r'"([^"]+)"', (ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(quotes) > 20
    for quote in quotes:
        for part in re.split(r"\b[A-Z]\b(?: %)?|\b\d+\b|\.\.\.|[()]", quote):
            assert part.strip(" ,") in sentences(), quote


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_exists(page):
    named = set(re.findall(r"--(?!settings)[a-z]+\.[a-z0-9-]+", page.read_text()))  # those are tests.serve's own
    assert named <= {f"--{path}" for path in configs.field_paths()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_that_a_page_names_is_there(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    paths = re.findall(r"`((?:jeagle|configs|converters|docs|launch|tests)/[\w/.-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing + [path for path in paths if not (ROOT / path).exists()] == []


def test_every_section_that_a_page_links_to_is_there():
    places = [(page, *link) for page in PAGES for link in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text())]
    assert len(places) > 5
    for page, file, section in places:
        headings = re.findall(r"^#+ (.*)", (page.parent / file if file else page).read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert section in anchors, f"{page.name} links to {file}#{section}"


include = runpy.run_path(str(ROOT / "docs" / "include.py"))
INCLUDED = [marker for page in PAGES for marker in include["MARKED"].finditer(page.read_text())]


@pytest.mark.parametrize("marker", INCLUDED, ids=lambda marker: marker["name"] or marker["source"])
def test_what_a_page_includes_is_what_the_code_says(marker):
    """The code of the page is the package's, and the trip of a batch is what the tracer prints now."""
    assert marker[0] == marker["marker"] + include["included"](marker) + marker["end"], "run python docs/include.py"


def test_how_it_works_shows_training_the_step_and_the_trip_of_a_batch():
    assert [marker["name"] or marker["source"] for marker in INCLUDED] == [
        "train",
        "train_step",
        "loss_gradient",
        "benchmarks.trip",
    ]
