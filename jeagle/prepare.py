"""`python -m jeagle.prepare --config FILE` turns conversations into packed rows and a draft vocabulary."""

from jeagle import flags
from jeagle.run.claim import claimed
from jeagle.run.dataset import describe, prepare
from jeagle.runtime.cli import run

READS = ("name", "runs", "target.ref", "target.family", "data", "draft.vocab", "draft.start")
"""The settings that this command reads."""


def main(arguments: list[str]) -> None:
    config = flags.from_command_line(arguments, program="python -m jeagle.prepare", description=__doc__, reads=READS)
    with claimed(config):
        for line in describe(prepare(config)):
            print(line)


if __name__ == "__main__":
    run(main)
