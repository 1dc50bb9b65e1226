"""A finished run as exports read it, from a disk or object storage: parameters are read when they are asked for."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle import drafts, features
from jeagle import flags as configs
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec
from jeagle.run import assemble
from jeagle.run.draft_init import EMBEDDING_FILE, HELD_OUT, held_out_scores
from jeagle.run.parameters import served_from, served_params
from jeagle.runtime.saved import SavedArray, Spec, local, open_saved

MEASURED_FILE = "bench.json"
"""In a run's folder: what `jeagle.bench --out` measured, or from_eagle3.py."""
_SMALL = (
    *("config.json", "draft.json", "report.json", MEASURED_FILE, EMBEDDING_FILE, "stages/measure_after.json"),
    *("data/manifest.json", "tables/manifest.json", "tables/d2t.npy", "tables/t2d.npy"),
    f"{HELD_OUT}/metrics.jsonl",
)
"""What is read of a run beside its checkpoints."""
_TOLD = ("acceptance_length", "acceptance_by_position", "prompts_measured", "draft_tokens", "max_new_tokens")


class Served(NamedTuple):
    """A run's draft at one step.

    Attributes:
      folder: of the run's small files, on this machine.
      params: by name, float32; each is read when it is indexed.
      vocabulary: target ids [D].
      embed_VW: the draft's own embedding, mapped from its file; None where the target's serves.
    """

    folder: Path
    config: RunConfig
    step: int
    spec: DraftSpec
    params: Mapping[str, Any]
    vocabulary: np.ndarray
    embed_VW: np.ndarray | None

    @property
    def acceptance(self) -> dict[str, Any] | None:
        """What was measured of this very step, by the run's own report or by `jeagle.bench --out RUN/bench.json`."""
        told = _json(self.folder / MEASURED_FILE)
        if told is None or told.get("step") != self.step:
            report, stage = _json(self.folder / "report.json"), _json(self.folder / "stages" / "measure_after.json")
            told = (stage or {}).get("result") or {} if report and report.get("steps") == self.step else {}
        return {name: told[name] for name in _TOLD if name in told} or None

    @property
    def data(self) -> dict[str, Any] | None:
        """What the draft was trained on, as the data's manifest tells it; None for a draft from elsewhere."""
        manifest = _json(self.folder / "data" / "manifest.json") or {}
        made_from, train = manifest.get("made_from", {}), manifest.get("statistics", {}).get("train")
        if not train:
            return None
        named = {"source": self.config.data.source, "fingerprint": made_from.get("source")}
        counted = {name: train.get(name) for name in ("documents", "rows", "tokens", "supervised_tokens")}
        return {name: value for name, value in (named | counted).items() if value is not None}


@contextlib.contextmanager
def open_served(checkpoint: str | Path, step: int | str) -> Iterator[Served]:
    """A run's draft at `step`; `checkpoint` is its folder, or gs://BUCKET/PATH or s3://BUCKET/PATH of a copy.

    Raises:
      UserError: for no run, no such step, or files that do not belong together.
    """
    with _files(str(checkpoint)) as (folder, checkpoints, where):
        try:
            config = configs.from_json(json.loads((folder / "config.json").read_text("utf-8")))
            spec = assemble.described_draft(folder, where=where)
            own = folder / EMBEDDING_FILE
            embed_VW = np.load(own, mmap_mode="r") if own.is_file() else None
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}): copy the run again.") from error
        found, arrays = open_saved(checkpoints, step, where=f"{where}/checkpoints", scores=held_out_scores(folder))
        yield Served(folder, config, found, spec, _params(arrays), assemble.trained_vocabulary(folder), embed_VW)


@contextlib.contextmanager
def _files(checkpoint: str) -> Iterator[tuple[Path, Spec, str]]:
    """(folder of the small files, place of the checkpoints, how to name the run)."""
    if "://" not in checkpoint:
        folder = assemble.run_folder(checkpoint)
        yield folder, local(folder / "checkpoints"), str(folder)
        return
    place = features.Storage(checkpoint)
    with tempfile.TemporaryDirectory(prefix="jeagle-") as made:
        for name in _SMALL:
            try:
                data = place.read(name)
            except (ValueError, RuntimeError, OSError) as error:
                raise UserError(f"{checkpoint}/{name} cannot be read: {str(error).splitlines()[0]}.") from error
            if data is not None:
                (Path(made) / name).parent.mkdir(exist_ok=True)
                (Path(made) / name).write_bytes(data)
        if not (Path(made) / "config.json").is_file():
            raise UserError(f"{checkpoint} is no run: it has no config.json. Name the copy of a folder runs/NAME.")
        yield Path(made), place.kvstore("checkpoints/"), checkpoint


class _Made:
    """A parameter that is computed from several arrays of a checkpoint (adapters, an averaged iterate)."""

    def __init__(self, name: str, arrays: Mapping[str, SavedArray], shape: tuple[int, ...]):
        self._name, self._arrays, self.shape = name, arrays, shape

    def __getitem__(self, index: Any) -> np.ndarray:
        tree = served_params({path: array[...] for path, array in self._arrays.items()})
        return np.asarray(drafts.merge_adapters(tree)[self._name])[index]


def _params(arrays: Mapping[str, SavedArray]) -> dict[str, Any]:
    """The draft's parameters as `assemble.load_draft` gives them, unread."""
    sources = served_from(arrays)
    adapted = {name.removeprefix("base.") for name in sources if name.startswith("base.")}
    if not adapted:
        return {name: _one(name, paths, arrays, paths[0]) for name, paths in sources.items()}
    found = {}
    for name in adapted:
        parts = [part for part in (f"base.{name}", f"lora.{name}.down", f"lora.{name}.up") if part in sources]
        paths = [path for part in parts for path in sources[part]]
        found[name] = _one(name, paths, arrays, sources[f"base.{name}"][0])
    return found


def _one(name: str, paths: Sequence[str], arrays: Mapping[str, SavedArray], shaped: str) -> Any:
    if len(paths) == 1 and not name.startswith("base."):
        return arrays[paths[0]]
    return _Made(name, {path: arrays[path] for path in paths}, arrays[shaped].shape)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return tree if isinstance(tree, dict) else None
