"""Exports a run's draft for vLLM: python converters/to_vllm.py --checkpoint runs/NAME --out DIR."""

from jeagle.export import to_vllm
from jeagle.runtime.cli import run

if __name__ == "__main__":
    run(to_vllm)
