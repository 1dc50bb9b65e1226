"""`python -m jeagle.prepare --config FILE` turns conversations into packed rows and a draft vocabulary."""

from __future__ import annotations

from jeagle import flags as configs
from jeagle.run.claim import claimed
from jeagle.run.dataset import describe, prepare
from jeagle.runtime.cli import run


def main(arguments: list[str]) -> None:
    config = configs.from_command_line(arguments, program="python -m jeagle.prepare", description=__doc__)
    with claimed(config):
        for line in describe(prepare(config)):
            print(line)


if __name__ == "__main__":
    run(main)
