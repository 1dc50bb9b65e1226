"""Reads a finished run for an export, from a disk or from object storage, one parameter at a time.

`runtime/checkpoints.py` writes with Orbax: zarr arrays in an OCDBT store, and a `_METADATA` file with their names. Here
tensorstore opens them itself, so that a draft larger than memory can be exported.
"""

import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int, Shaped

from jeagle import drafts, features
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.exchange.draft_tensors import LazyArray
from jeagle.interfaces import DraftSpec
from jeagle.run import assemble
from jeagle.run.draft_init import EMBEDDING_FILE, HELD_OUT, held_out_scores
from jeagle.run.parameters import served_from, served_params
from jeagle.runtime.checkpoints import CHECKSUMS, chosen_step, damaged_checkpoint, first_line
from jeagle.runtime.checksums import checksum, describe

MEASURED_FILE = "bench.json"
"""In a run's folder: what `jeagle.bench --out` or the import of a draft has measured."""
_SMALL_FILES = (
    *("config.json", "draft.json", "report.json", MEASURED_FILE, EMBEDDING_FILE, "stages/measure_after.json"),
    *("data/manifest.json", "tables/manifest.json", "tables/d2t.npy", "tables/t2d.npy"),
    f"{HELD_OUT}/metrics.jsonl",
)
"""The files that are read besides the checkpoints."""
ACCEPTANCE_METRICS = (
    *("acceptance_length", "acceptance_by_position"),
    *("prompts_measured", "draft_tokens", "max_new_tokens"),
)
"""The measured values that the model card shows."""
_TENSORSTORE_ERRORS = (ValueError, RuntimeError, OSError)

KvStore = dict[str, Any]
"""A tensorstore key-value store; its path ends in a slash."""


class CheckpointArray:
    """An array of a checkpoint: indexing it with `...` or a slice of rows reads it from storage each time.

    Before the first use all of it is read once, and UserError is raised where its checksum is another one.

    Args:
      store: that contains the array alone.
      driver: zarr or zarr3.
      where: the checkpoint's name in error messages.
      saved: the array as `checksums.described` it; empty for a checkpoint without checksums.
    """

    def __init__(self, store: KvStore, driver: str, where: str, saved: str):
        self._spec, self._where, self._saved = {"driver": driver, "kvstore": store}, where, saved

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def block_rows(self) -> int:
        """Rows that are stored together: reading fewer at a time decodes them more than once."""
        return int(self._array.chunk_layout.read_chunk.shape[0])

    def __getitem__(self, index: Any) -> Shaped[np.ndarray, "..."]:
        if isinstance(index, slice):  # unlike numpy, tensorstore refuses an end beyond the array
            index = slice(*index.indices(self.shape[0]))
        try:
            return self._array[index].read().result()
        except _TENSORSTORE_ERRORS as error:
            raise damaged_checkpoint(self._where, error) from error

    def read_into(self, out: Shaped[np.ndarray, "..."]) -> None:
        """Fills `out` with the array, one stored block after the other, so that only one more block is in memory."""
        for piece in _blocks(self._array):
            out[piece] = self[piece]

    @functools.cached_property
    def _array(self) -> Any:
        try:
            array = ts.open(self._spec, open=True).result()
            if self._saved and self._saved != (found := _described(array, self._saved)):
                raise ValueError(f"an array is {found} and was saved as {self._saved}")
            return array
        except _TENSORSTORE_ERRORS as error:
            raise damaged_checkpoint(self._where, error) from error


def _blocks(array: Any) -> Iterator[tuple[slice, ...]]:
    """The places of the blocks in which an array is stored."""
    blocks = array.chunk_layout.read_chunk.shape or ()  # None for a scalar
    starts = (range(0, size, block) for size, block in zip(array.shape, blocks, strict=True))
    for corner in itertools.product(*starts):
        ends = (min(c + b, n) for c, b, n in zip(corner, blocks, array.shape, strict=True))
        yield tuple(slice(*edges) for edges in zip(corner, ends, strict=True))


def _described(array: Any, saved: str) -> str:
    """As `checksums.described`, a block at a time; an array of another shape or type than `saved` is not read."""
    kind, shape = array.dtype.name, tuple(array.shape)
    if not saved.startswith(describe(kind, shape, 0)[:-8]):
        return describe(kind, shape, 0)
    totals = (int(checksum(array[p].read().result(), shape, [edge.start for edge in p])) for p in _blocks(array))
    return describe(kind, shape, sum(totals) % 2**32)


def open_checkpoint(
    folder: KvStore, step: int | str, *, where: str, scores: Mapping[int, float] | None = None
) -> tuple[int, dict[str, CheckpointArray]]:
    """Opens a checkpoint; nothing but the names of its arrays is read.

    Args:
      folder: of the checkpoints, with one folder for each step.
      step, scores: see `chosen_step`.
      where: the folder's name in error messages.

    Returns:
      (step, arrays by their path in the saved tree).

    Raises:
      UserError: where there is no such step, or its checkpoint is not complete.
    """
    try:
        keys = {key.decode() for key in ts.KvStore.open(folder).result().list().result()}
    except _TENSORSTORE_ERRORS as error:
        raise UserError(f"{where} cannot be listed: {first_line(error)}.") from error
    if not keys:
        raise UserError(f"{where} does not exist: the run has saved no checkpoint yet.")
    names = {key.split("/")[0] for key in keys}
    steps = [int(name) for name in names if name.isdigit() and f"{name}/default/_METADATA" in keys]
    chosen = chosen_step(steps, step, where=where, scores=scores)
    inside = folder | {"path": f"{folder['path']}{chosen}/default/"}
    metadata = ts.KvStore.open(inside).result().read("_METADATA").result()
    try:
        tree = json.loads(bytes(metadata.value))
        paths = [entry["key_metadata"][0]["key"] for entry in tree["tree_metadata"].values()]
        saved = (tree.get("custom_metadata") or {}).get(CHECKSUMS) or dict.fromkeys(paths, "")
        if saved.keys() != {*paths}:
            raise KeyError("the names of its arrays")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise damaged_checkpoint(f"{where}/{chosen}", error) from error
    driver = "zarr3" if tree.get("use_zarr3") else "zarr"
    arrays = {}
    for path in paths:
        store = inside | {"path": f"{inside['path']}{path}/"}
        if tree.get("use_ocdbt", True):
            store = {"driver": "ocdbt", "base": inside, "path": f"{path}/"}
        arrays[path] = CheckpointArray(store, driver, f"{where}/{chosen}", saved[path])
    return chosen, arrays


class RunDraft(NamedTuple):
    """A run's draft at one step.

    Attributes:
      folder: the run's small files, on this machine.
      params: by name, float32; each one is read when it is indexed.
      vocabulary: the target's token ids [D].
      embed_VW: the draft's own embedding, mapped from its file; None where the draft uses the target's.
    """

    folder: Path
    config: RunConfig
    step: int
    spec: DraftSpec
    params: Mapping[str, Any]
    vocabulary: Int[np.ndarray, " D"]
    embed_VW: Float[np.ndarray, "V W"] | None

    @property
    def acceptance(self) -> dict[str, Any] | None:
        """What the run's report or `jeagle.bench --out RUN/bench.json` has measured at this step; None without it."""
        measured = _read_json(self.folder / MEASURED_FILE)
        if measured.get("step") != self.step:
            reported = _read_json(self.folder / "report.json").get("steps") == self.step
            measured = _read_json(self.folder / "stages/measure_after.json").get("result") or {} if reported else {}
        return {name: measured[name] for name in ACCEPTANCE_METRICS if name in measured} or None

    @property
    def data(self) -> dict[str, Any] | None:
        """What the draft was trained on, from the data's manifest; None for an imported draft."""
        manifest = _read_json(self.folder / "data" / "manifest.json")
        made_from, train = manifest.get("made_from", {}), manifest.get("statistics", {}).get("train")
        if not train:
            return None
        source = {"source": self.config.data.source, "fingerprint": made_from.get("source")}
        counts = {name: train.get(name) for name in ("documents", "rows", "tokens", "supervised_tokens")}
        return {name: value for name, value in (source | counts).items() if value is not None}


@contextlib.contextmanager
def open_run_draft(checkpoint: str | Path, step: int | str) -> Iterator[RunDraft]:
    """Opens a run's draft at `step`.

    Args:
      checkpoint: the run's folder, or gs://BUCKET/PATH or s3://BUCKET/PATH of a copy.

    Raises:
      UserError: where there is no run or no such step, or its files do not belong together.
    """
    with tempfile.TemporaryDirectory(prefix="jeagle-") as temporary:
        if "://" in str(checkpoint):
            storage, folder, where = features.Storage(checkpoint), Path(temporary), str(checkpoint)
            _copy_small_files(storage, folder)
        else:
            folder = assemble.run_folder(checkpoint)
            storage, where = features.Storage(folder), str(folder)
        config, spec = assemble.read_config(folder, where=where), assemble.described_draft(folder, where=where)
        own = folder / EMBEDDING_FILE
        try:
            embed_VW = np.load(own, mmap_mode="r") if own.is_file() else None
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}): copy the run again.") from error
        checkpoints, scores = storage.kvstore("checkpoints/"), held_out_scores(folder)
        chosen, arrays = open_checkpoint(checkpoints, step, where=f"{where}/checkpoints", scores=scores)
        vocabulary = assemble.trained_vocabulary(folder)
        yield RunDraft(folder, config, chosen, spec, _draft_params(arrays), vocabulary, embed_VW)


def _copy_small_files(storage: features.Storage, folder: Path) -> None:
    for name in _SMALL_FILES:
        try:
            data = storage.read(name)
        except _TENSORSTORE_ERRORS as error:
            raise UserError(f"{storage}/{name} cannot be read: {str(error).splitlines()[0]}.") from error
        if data is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    if not (folder / "config.json").is_file():
        raise UserError(f"{storage} is not a run, it has no config.json: give the copy of a folder runs/NAME.")


def _draft_params(arrays: Mapping[str, CheckpointArray]) -> dict[str, Any]:
    """Returns the draft's parameters as `assemble.load_draft` does, without reading them."""
    sources = served_from(arrays)
    adapted = {name.removeprefix("base.") for name in sources if name.startswith("base.")}
    params: dict[str, Any] = {}
    for name in adapted or sources:
        parts = (f"base.{name}", f"lora.{name}.down", f"lora.{name}.up") if adapted else (name,)
        paths = [path for part in parts for path in sources.get(part, ())]
        if len(paths) == 1:
            params[name] = arrays[paths[0]]
        else:
            # It is computed from several arrays: adapters, or an averaged iterate.
            params[name] = LazyArray(arrays[paths[0]].shape, functools.partial(_computed, name, arrays, paths))
    return params


def _computed(name: str, arrays: Mapping[str, CheckpointArray], paths: list[str], index: Any) -> np.ndarray:
    tree = served_params({path: arrays[path][...] for path in paths})
    return np.asarray(drafts.merge_adapters(tree)[name])[index]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return tree if isinstance(tree, dict) else {}
