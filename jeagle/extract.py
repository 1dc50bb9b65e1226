"""`python -m jeagle.extract --config C --out STORE`: writes the target's hidden states of a run's rows into a store.

Any number of processes and hosts may write to one store at the same time. The same command makes what is missing.
"""

from jeagle import features, flags
from jeagle.extraction.fill import extract
from jeagle.extraction.plan import store_format
from jeagle.run import assemble, dataset
from jeagle.runtime import distributed
from jeagle.runtime.cli import run, shell_word
from jeagle.runtime.host import prepare_host

READS = (
    "name",
    "runs",
    "target",
    "data",
    "draft.vocab",
    "draft.start",
    "objective.loss",
    "train.batch_rows",
    "mesh",
    "store",
)
"""The settings that this command reads."""


def main(arguments: list[str]) -> None:
    out, rest = flags.take_flag(arguments, "--out", "a local folder, gs://BUCKET/PATH or s3://BUCKET/PATH")
    config = flags.from_command_line(
        rest, program="python -m jeagle.extract [--out STORE]", description=__doc__, reads=READS
    )
    prepare_host()
    out = out or str(config.folder / "features")
    features.check_storage(features.Storage(out))
    store_format(config, assemble.target_spec(config)[0])  # what is refused, before the rows are made
    if distributed.devices_known():
        assemble.mesh_of(config)
    prepared = dataset.prepare(config) if distributed.may_lead() else None
    distributed.initialise()
    extract(config, out, prepared)
    if distributed.is_leader():
        print(f"train from it: python -m jeagle.train --config ... --features {shell_word(out)}")


if __name__ == "__main__":
    run(main)
