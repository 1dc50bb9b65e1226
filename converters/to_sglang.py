"""Exports a run's draft for SGLang: python converters/to_sglang.py --checkpoint runs/NAME --out DIR."""

from jeagle.export import to_sglang
from jeagle.runtime.cli import run

if __name__ == "__main__":
    run(to_sglang)
