"""`jeagle COMMAND ...`, which is `python -m jeagle.COMMAND ...`."""

import difflib
import importlib
from typing import NoReturn

from jeagle.errors import UserError
from jeagle.runtime.cli import run

COMMANDS = {
    "pipeline": "prepare, train, bench, export and report in one command; finished stages are reused",
    "regenerate": "let the target answer prompts, to make training data",
    "prepare": "turn conversations into packed rows and a draft vocabulary",
    "preview": "show prepared rows with supervised tokens coloured, and their statistics",
    "extract": "write the target's hidden states of prepared rows into a store to train from",
    "store": "describe, verify, sample or prune a store of hidden states",
    "train": "train a draft against its frozen target, from the last checkpoint of the run on",
    "bench": "measure the acceptance length of a draft by speculative decoding",
    "export": "write a trained draft in the layouts that SGLang and vLLM load",
    "import_draft": "import a published EAGLE-3 draft as a run, to measure, export or train further",
    "import_features": "import hidden states of SpecForge, speculators or vLLM into a store",
    "report": "write report.html of a run again",
    "doctor": "compare a target's hidden states and logits with transformers', layer by layer",
}


def main(arguments: list[str]) -> int | None:
    """Hands the arguments to the command that the first one names. UserError for an unknown command."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        raise UserError(f"No command is called {name}: {hint}")
    return importlib.import_module(f"jeagle.{name}").main(rest)


def console() -> NoReturn:
    run(main)


def _help() -> str:
    lines = [f"  {name:<17}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["Usage: jeagle COMMAND ...", "", *lines, "", "jeagle COMMAND --help explains each."])


if __name__ == "__main__":
    console()
