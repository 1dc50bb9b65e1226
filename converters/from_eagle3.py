"""A published draft as a run of jeagle's: python converters/from_eagle3.py DIR --out runs/NAME [--target REF]."""

from jeagle.import_draft import main
from jeagle.runtime.cli import run

if __name__ == "__main__":
    run(main)
