"""`python -m jeagle.extract --config C --out STORE`: writes the target's hidden states of a run's rows into a store.

Any number of processes and hosts may write to one store at the same time. The same command makes what is missing.
"""

from __future__ import annotations

from jeagle import features
from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.extraction.fill import extract
from jeagle.run import dataset
from jeagle.runtime import distributed
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host


def main(arguments: list[str]) -> None:
    arguments, out = _without_out(arguments)
    config = configs.from_command_line(arguments, program="python -m jeagle.extract [--out STORE]", description=__doc__)
    prepare_host()
    out = out or str(config.folder / "features")
    features.check_storage(features.Storage(out))
    if distributed.may_lead():
        dataset.prepare(config)
    distributed.initialise()
    store = extract(config, out)
    if distributed.is_leader():
        print(f"train from it: python -m jeagle.train --config ... --features {store}")


def _without_out(arguments: list[str]) -> tuple[list[str], str]:
    """The arguments without --out, and its value; empty where it is not given."""
    rest, out = list(arguments), ""
    for i, argument in enumerate(arguments):
        if argument == "--out":
            if i + 1 == len(arguments):
                raise UserError("--out needs a local folder, gs://BUCKET/PATH or s3://BUCKET/PATH.")
            return rest[:i] + rest[i + 2 :], arguments[i + 1]
        if argument.startswith("--out="):
            return rest[:i] + rest[i + 1 :], argument.partition("=")[2]
    return rest, out


if __name__ == "__main__":
    run(main)
