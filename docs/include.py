"""Copies code, and what a benchmark prints, into the pages of docs/ between the markers that name them.

    python docs/include.py

A marker is `<!-- include FILE NAME -->`, for the function NAME of FILE whole, or `<!-- include MODULE -->`, for what
`python -m MODULE` prints. `<!-- end -->` ends what is replaced. tests/test_docs.py fails where a page differs.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKED = re.compile(
    r"(?P<marker><!-- include (?P<source>\S+)(?: (?P<name>\S+))? -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def function_source(path: Path, name: str) -> str:
    """The source of a function at the top of a file, with its decorators. ValueError if there is none of this name."""
    text = path.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"
    raise ValueError(f"{path} has no function {name}")


def included(marker: re.Match[str]) -> str:
    """What belongs between a marker and its end."""
    if marker["name"]:
        return f"```python\n{function_source(ROOT / marker['source'], marker['name'])}```\n"
    command = [sys.executable, "-m", marker["source"]]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return f"```text\n{printed}```\n"


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        changed = MARKED.sub(lambda marker: marker["marker"] + included(marker) + marker["end"], text)
        if changed != text:
            page.write_text(changed)
            print(f"{page.relative_to(ROOT)} has changed")


if __name__ == "__main__":
    main()
