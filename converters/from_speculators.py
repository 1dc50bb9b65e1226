"""States of speculators or vLLM into a store: from_speculators.py --source DIR --out STORE --config C."""

from jeagle.import_features import main
from jeagle.runtime.cli import run

if __name__ == "__main__":
    run(main)
