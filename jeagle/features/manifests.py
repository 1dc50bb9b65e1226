"""What a store says of itself: the manifest of the whole, of each segment, and the index derived from those.

STORE/
  store.json               what it was made from and how; written first, never changed
  manifests/NAME.json      one for each finished segment: its rows, arrays and checksums; written last, whole
  segments/NAME.WRITER/    the segment's arrays, aside until a manifest names them
  claims/NAME.json         who is making a segment just now
  data/                    the prepared data's manifest, tokenizer, counts and held-out prompts
  index.json               all manifests in one, for opening quickly; made anew from them where it lacks some
"""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.features.formats import Form
from jeagle.features.storage import ASIDE, Place
from jeagle.runtime.manifest import canonical, differences, fingerprint
from jeagle.runtime.outputs import Output, check_replaceable, listed

FORMAT = 1
STORE, INDEX, MANIFESTS, SEGMENTS, CLAIMS, DATA = "store.json", "index.json", "manifests", "segments", "claims", "data"
TABLES = "tables"  # the segment that holds no rows but the target's embedding, head and the scales


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some rows of one side of the split, immutable.

    Attributes:
      name: such as train-000012. data: the folder under segments/ that holds its arrays.
      split: train or held_out; empty for the tables. rows: their numbers in the split.
      lengths: tokens of each row. kept: positions of each row whose teacher is there. seen: those whose taps are;
        empty where all are.
      arrays: by name, as `arrays.write_array` describes them. bytes: on disk.
    """

    name: str
    data: str
    split: str = ""
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    bytes: int = 0

    @property
    def folder(self) -> str:
        return f"{SEGMENTS}/{self.data}"

    @property
    def aux(self) -> tuple[int, ...]:
        """Positions of each row whose taps are there."""
        return self.seen or self.lengths


def sealed(tree: dict[str, Any]) -> bytes:
    """JSON with a checksum of its own."""
    tree = json.loads(canonical(tree))
    return (json.dumps(tree | {"checksum": fingerprint(tree)}, indent=1, sort_keys=True) + "\n").encode()


def unsealed(place: Place, key: str, data: bytes) -> dict[str, Any]:
    """The tree of `sealed` bytes. UserError where a byte of it has changed."""
    try:
        tree = json.loads(data)
        claimed = tree.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        tree, claimed = {}, None
    if claimed is None or fingerprint(tree) != claimed:
        raise UserError(
            f"{place}/{key} is damaged: its checksum does not fit its content. python -m jeagle.store prune {place} "
            "--damaged drops a damaged segment; without store.json the store must be made anew."
        )
    return tree


def read_store(place: Place) -> dict[str, Any] | None:
    """store.json, None where there is none. UserError for a damaged one or another format."""
    data = place.read(STORE)
    if data is None:
        return None
    tree = unsealed(place, STORE, data)
    if tree.get("format") != FORMAT:
        raise UserError(f"The store {place} has format {tree.get('format')}, and this jeagle reads format {FORMAT}.")
    made = tree["made_from"]  # which says too little of arrays if it is from before there was a choice
    return tree | {"made_from": made | {"arrays": Form.of(made["arrays"]).described()}}


def _foreign(folder: Path) -> str:
    """Of a store that was only just begun, there is no more than what is being written aside."""
    found = sorted(set(os.listdir(folder)) - {ASIDE})
    return "" if STORE in found or not found else f"it holds {listed(found)} and no {STORE}"


STORE_FOLDER = Output("store of jeagle's", True, _foreign)


def check_place(place: Place) -> None:
    """UserError unless the place is empty or holds a store: what writers remove there must be a store's."""
    if place.path is not None:
        check_replaceable(place.path, STORE_FOLDER)
    opened = read_store(place)  # damaged, or another program's: that is said here
    if opened is not None or place.path is not None:
        return
    if taken := [name for name in (SEGMENTS, CLAIMS, MANIFESTS, DATA) if place.names(name)]:
        raise UserError(f"{place} is no store of jeagle's (it holds {listed(taken)} and no {STORE}): give another.")


def read_segment(place: Place, name: str) -> Segment | None:
    """A segment's manifest, None where it is not finished. UserError for a damaged one."""
    key = f"{MANIFESTS}/{name}.json"
    data = place.read(key)
    return None if data is None else segment_from_json(unsealed(place, key, data))


def segment_from_json(tree: dict[str, Any]) -> Segment:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
    return Segment(**fields)


def finished(place: Place) -> list[str]:
    """Names of the finished segments, the tables included."""
    return [n.removesuffix(".json") for n in place.names(MANIFESTS) if n.endswith(".json")]


def read_segments(place: Place) -> list[Segment]:
    """All finished segments, sorted by name: from the index as far as it goes, the others one by one.

    Raises:
      UserError: for a damaged manifest.
    """
    names = finished(place)
    data = place.read(INDEX)
    known: dict[str, Segment] = {}
    if data is not None:
        try:
            tree = unsealed(place, INDEX, data)
            known = {s["name"]: segment_from_json(s) for s in tree["segments"]}
        except UserError:
            known = {}  # it is derived: what it lost is read from where it came
    missing = [name for name in names if name not in known]
    with ThreadPoolExecutor(16) as readers:
        found = [s for s in readers.map(lambda name: read_segment(place, name), missing) if s is not None]
    return sorted([known[n] for n in names if n in known] + found, key=lambda s: s.name)


def write_index(place: Place) -> list[Segment]:
    """Derives index.json from the manifests."""
    segments = read_segments(place)
    place.write(INDEX, sealed({"segments": [dataclasses.asdict(s) for s in segments]}))
    return segments


# Fields of made_from that do not change what is stored, only who wrote it.
IGNORED = ("data.version",)


def check_fit(place: Place, wanted: dict[str, Any], found: dict[str, Any], doing: str) -> None:
    """UserError, with the fields named, unless the store was made from the same things.

    Args:
      wanted, found: the run's and the store's `made_from`. Only fields that `wanted` has are compared.
      doing: what to do about it.
    """
    fields = [f for f in differences(_only(found, wanted), wanted) if f not in IGNORED]
    if fields:
        flat = {f: (_at(found, f), _at(wanted, f)) for f in fields[:4]}
        shown = "; ".join(f"{f}: {_brief(a)} in the store, {_brief(b)} here" for f, (a, b) in flat.items())
        raise UserError(
            f"The store {place} does not fit this run: {', '.join(fields)} "
            f"{'differs' if len(fields) == 1 else 'differ'} ({shown}). {doing}"
        )


def _only(tree: Any, like: Any) -> Any:
    if not isinstance(tree, dict) or not isinstance(like, dict):
        return tree
    return {key: _only(tree[key], like[key]) for key in like if key in tree}


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
