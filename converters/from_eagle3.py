"""Imports a published draft as a run: python converters/from_eagle3.py DIR --out runs/NAME [--target REF]."""

import functools

from jeagle.import_draft import main
from jeagle.runtime.cli import run

if __name__ == "__main__":
    run(functools.partial(main, program="from_eagle3.py"))
