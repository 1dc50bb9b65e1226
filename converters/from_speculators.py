"""Imports hidden states of speculators or vLLM to a store: from_speculators.py --source DIR --out STORE --config C."""

import functools

from jeagle.import_features import main
from jeagle.runtime.cli import run

if __name__ == "__main__":
    run(functools.partial(main, program="from_speculators.py"))
