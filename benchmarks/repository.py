"""How large the repository is, for a checkout or a revision of git.

    python -m benchmarks.repository [--rev REV] [--names]

Prints JSON. Sources are parsed and never imported, so that the script works on revisions that need other packages.
`lines` are those of jeagle/ by kind. `flags` are the distinct spellings over all commands: the fields of RunConfig, and
the arguments of commands that have their own. `private_functions_used_once` are named at one place of their module
besides their definition. `names_with_several_meanings` are names of classes that several modules define. With --names
the last three are listed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import io
import json
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Sources = dict[str, str]


def read_sources(rev: str | None) -> Sources:
    """Texts of the repository's Python and TOML files by path: of the working tree, or of a revision."""
    if rev is None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        paths = [path for path in listed.stdout.decode().split("\0") if (ROOT / path).is_file()]
        return {path: (ROOT / path).read_text() for path in paths if path.endswith((".py", ".toml"))}
    archive = subprocess.run(["git", "archive", rev], cwd=ROOT, capture_output=True, check=True).stdout
    sources = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.isfile() and member.name.endswith((".py", ".toml")):
                content = files.extractfile(member)
                assert content is not None
                sources[member.name] = content.read().decode()
    return sources


def count_lines(text: str, tree: ast.AST) -> collections.Counter[str]:
    """Lines of a module by kind: docstrings (texts that stand alone), blanks, comments, and code."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kinds: collections.Counter[str] = collections.Counter()
    for number, line in enumerate(text.splitlines(), 1):
        if number in documented:
            kinds["docstrings"] += 1
        elif not line.strip():
            kinds["blanks"] += 1
        else:
            kinds["comments" if line.lstrip().startswith("#") else "code"] += 1
    return kinds


class Classes:
    """The classes at the top of modules, found as Python finds them: in the module itself, or where it imports from."""

    def __init__(self, trees: dict[str, ast.Module]):
        self.by_module = {
            path: {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
            for path, tree in trees.items()
        }
        self.imports = {path: dict(_imports(tree)) for path, tree in trees.items()}

    def find(self, path: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """(its module, the class) that `name` means in a module; None for what is no class of the package."""
        while path in self.by_module:
            if name in self.by_module[path]:
                return path, self.by_module[path][name]
            path = self.imports[path].get(name, "")
        return None


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, file) of what a module imports from the package by `from jeagle.x import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, node.module.replace(".", "/") + ".py") for alias in node.names)


def flags_of(classes: Classes, path: str, node: ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Flags of a dataclass of settings, inherited ones included; those of nested dataclasses have dots."""
    for base in node.bases:
        if inherited := classes.find(path, ast.unparse(base)):
            yield from flags_of(classes, *inherited, prefix)
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        kind, flag = ast.unparse(item.annotation), prefix + item.target.id.replace("_", "-")
        if nested := classes.find(path, kind):
            yield from flags_of(classes, *nested, f"{flag}.")
        elif "Positional" not in kind:
            yield flag


def command_flags(trees: dict[str, ast.Module]) -> set[str]:
    """The distinct flags of all commands, without their dashes.

    They are the fields of RunConfig, those of the classes *Arguments that commands know by this name, and the texts
    "--name" that modules at the package's top compare arguments with.
    """
    classes = Classes(trees)
    flags: set[str] = set()
    for path, tree in trees.items():
        top = path.count("/") == 1
        for name in {*classes.by_module[path], *classes.imports[path]}:
            read = name == "RunConfig" or (top and name.endswith("Arguments"))
            if read and (known := classes.find(path, name)):
                flags.update(flags_of(classes, *known))
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        flags.update(text[2:] for text in texts if top and re.fullmatch(r"--[a-z][a-z0-9.-]*[a-z0-9]", text))
    return flags - {"help"}


def used_once(tree: ast.Module) -> list[str]:
    """A module's private functions and methods whose name stands at exactly one place besides their definition."""
    defined: collections.Counter[str] = collections.Counter()
    named: collections.Counter[str] = collections.Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and re.match(r"_[^_]", node.name):
            defined[node.name] += 1
        elif isinstance(node, ast.Name):
            named[node.id] += 1
        elif isinstance(node, ast.Attribute):
            named[node.attr] += 1
    return sorted(name for name in defined if defined[name] == 1 and named[name] == 1)


def measure(sources: Sources, *, names: bool) -> dict[str, Any]:
    package = {path: text for path, text in sources.items() if path.startswith("jeagle/") and path.endswith(".py")}
    trees = {path: ast.parse(text) for path, text in package.items()}
    kinds = sum((count_lines(text, trees[path]) for path, text in package.items()), collections.Counter())
    project = tomllib.loads(sources["pyproject.toml"])["project"]
    extras = project.get("optional-dependencies", {})
    meanings = collections.Counter(name for module in Classes(trees).by_module.values() for name in module)
    several = sorted(name for name, count in meanings.items() if count > 1)
    once, flags = [name for tree in trees.values() for name in used_once(tree)], sorted(command_flags(trees))
    requirements = {re.split(r"[<>=!;\[ ]", line)[0] for line in project["dependencies"]}
    tests = [path for path in sources if re.match(r"tests/(.*/)?test_\w+\.py$", path)]
    lists = {"flags": flags, "private_functions_used_once": once, "names_with_several_meanings": several}
    return {
        "files": len(package),
        "lines": {"all": kinds.total(), **dict(sorted(kinds.items()))},
        "modules_at_the_top": sum(path.count("/") == 1 and not path.endswith("__init__.py") for path in package),
        **{name: values if names else len(values) for name, values in lists.items()},
        "dependencies": len(requirements),
        "dependencies_of_extras": {name: len(lines) for name, lines in sorted(extras.items())},
        "test_files": len(tests),
        "test_lines": sum(text.count("\n") for path, text in sources.items() if path.startswith("tests/")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rev", help="a revision of git; the working tree otherwise")
    parser.add_argument(
        "--names", action="store_true", help="list flags, functions and classes instead of counting them"
    )
    arguments = parser.parse_args()
    print(json.dumps(measure(read_sources(arguments.rev), names=arguments.names), indent=2))


if __name__ == "__main__":
    main()
