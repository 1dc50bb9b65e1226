"""A run's folder belongs to jeagle, and to one writer at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jeagle import data, exchange, features
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.run import resume
from jeagle.runtime import distributed
from jeagle.runtime.lock import only_writer
from jeagle.runtime.manifest import atomic_folder
from jeagle.runtime.outputs import check_output, folder_of, json_file, signed_file
from jeagle.runtime.trackers import METRICS

LOCK = ".writer.lock"
CONFIG = json_file("file of a run's settings", "name", "target", "data", "draft", "train")
DRAFT = json_file("description of a run's draft", "draft", "made_from")
EMBEDDING = signed_file("array of numpy's", b"\x93NUMPY")
REPORT = json_file(
    "report of a run", any_of=("acceptance_length_after", "acceptance_length_before", "stage_seconds", "lossless")
)
NOTE = json_file("note of a stage", "made_from", "seconds", "result")
PAGE = signed_file(
    "page of a run's report", b'<meta name="generator" content="jeagle report">', b":root { --ink: #1a1d21;"
)

RUN = folder_of(
    "run of jeagle's",
    {
        "config.json": CONFIG,
        "draft.json": DRAFT,
        "embedding.npy": EMBEDDING,
        "metrics.jsonl": METRICS,
        "held_out/metrics.jsonl": METRICS,
        "report.json": REPORT,
        "report.html": PAGE,
        "data": data.ROWS,
        "tables": data.TABLES,
        "features": features.STORE_FOLDER,
        "exports/sglang": exchange.EXPORT_FOLDER,
        "exports/vllm": exchange.EXPORT_FOLDER,
        **{
            f"{answers}.jsonl{ending}": kind
            for answers in ("answers", "answers_check")
            for ending, kind in data.ANSWER_FILES.items()
        },
        **{f"stages/{name}.json": NOTE for name in ("answers", "measure_before", "train", "measure_after", "export")},
    },
    folders=("checkpoints", "profile", "tensorboard"),
)
"""Runs of earlier versions are known by the same files."""


def check_folder(config: RunConfig) -> None:
    """UserError unless the run's folder is absent, empty or a run's: commands ask before they do anything."""
    check_output(config.folder, RUN)


@contextlib.contextmanager
def claimed(config: RunConfig, *, shared: bool = False) -> Iterator[None]:
    """While the block runs, no other process trains in or prepares the run's folder.

    The leader holds the lock for all processes of a run; where only joining will tell which one leads, nobody does.

    Args:
      shared: several such blocks may run at the same time. They write the same things, each whole.

    Raises:
      UserError: for a folder that is not a run's, or that another process writes; it is named.
    """
    if distributed.may_lead():
        check_folder(config)
    if not distributed.surely_leads():
        yield
        return
    advice = "wait until it ends, stop it, or give another --name."
    with only_writer(config.folder / LOCK, f"The run {config.folder}", advice, shared=shared):
        yield


@contextlib.contextmanager
def new_rows(config: RunConfig, made_from: dict[str, Any]) -> Iterator[Path]:
    """An empty folder that becomes the run's data/ when the block succeeds.

    Args:
      made_from: everything that the rows depend on.

    Raises:
      UserError: where a draft has been trained on other rows: they stay.
    """
    with claimed(config, shared=True):
        resume.check_inputs(config, {"data": made_from})
        with atomic_folder(config.folder / "data", data.ROWS) as aside:
            yield aside


def move_aside(config: RunConfig) -> None:
    """Renames the run's folder, if there is one, to NAME.N, the first number that is free, and says so.

    UserError where another process writes it, it cannot be moved, or only joining will tell which process leads.
    """
    folder = config.folder
    if not distributed.may_lead() or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not distributed.surely_leads():
        raise UserError(f"--fresh cannot tell which process moves {folder}: move it yourself, or give another --name.")
    with claimed(config):
        place = resume.free_name(folder)
        try:
            folder.rename(place)
        except OSError as error:
            raise UserError(f"{folder} cannot be moved to {place} ({error.strerror}): give another --name.") from error
        (place / LOCK).unlink(missing_ok=True)
    print(f"The run {folder} was moved to {place}: --fresh starts anew.", flush=True)
