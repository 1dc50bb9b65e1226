"""Writes hidden states of other trainers into a store: from_specforge.py or from_speculators.py --source D --out S.

Both scripts are in converters/. The target is needed for its embedding and head, and to check that the hidden states
are its own, taken after the layers that --target.aux-layers gives. The files are read without running code.
"""

from __future__ import annotations

from pathlib import Path

from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.extraction.peer_import import import_peer_features
from jeagle.runtime.host import prepare_host


def main(arguments: list[str]) -> None:
    """The command of both converters."""
    given: dict[str, str] = {}
    rest = list(arguments)
    for name in ("--source", "--out"):
        if name in rest[:-1]:
            index = rest.index(name)
            given[name] = rest[index + 1]
            del rest[index : index + 2]
    program = "from_speculators.py --source DIR --out STORE"
    config = configs.from_command_line(rest, program=program, description=__doc__)
    if len(given) < 2:
        raise UserError("Give --source, the folder of the files, and --out, the store to write.")
    prepare_host()
    import_peer_features(config, Path(given["--source"]), given["--out"])
    print(f"train from it: python -m jeagle.train --config ... --name {config.name} --features {given['--out']}")
