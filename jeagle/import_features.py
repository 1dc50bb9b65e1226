"""Writes hidden states of SpecForge, speculators or vLLM in the folder DIR into a store.

The target is needed for its embedding and head, and to check that the hidden states are its own, taken after the layers
that --target.aux-layers gives. The files are read without running code.
"""

from pathlib import Path

from jeagle import flags
from jeagle.errors import UserError
from jeagle.extraction.peer_import import import_peer_features
from jeagle.runtime.cli import shell_word
from jeagle.runtime.host import prepare_host

READS = (
    "name",
    "runs",
    "target",
    "data.row_length",
    "data.held_out",
    "data.template",
    "objective.loss",
    "train.batch_rows",
    "mesh",
    "store",
)
"""The settings that this command reads."""


def main(arguments: list[str], program: str = "python -m jeagle.import_features") -> None:
    """The command `jeagle import_features`, and both converters."""
    source, rest = flags.take_flag(arguments, "--source", "the folder of the files")
    out, rest = flags.take_flag(rest, "--out", "the store to write")
    config = flags.from_command_line(
        rest, program=f"{program} --source DIR --out STORE", description=__doc__, reads=READS
    )
    if not (source and out):
        raise UserError("Give --source, the folder of the files, and --out, the store to write.")
    prepare_host()
    import_peer_features(config, Path(source), out)
    print(
        f"train from it: python -m jeagle.train --config ... --name {shell_word(config.name)} "
        f"--features {shell_word(out)}"
    )
