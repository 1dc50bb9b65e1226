"""The files of a store: the manifest of the whole, one for each segment, and the index that is derived from those.

STORE/
  store.json               what the store was made from and how; it is written first and never changes
  manifests/NAME.json      the rows, arrays and checksums of a finished segment; it is written last
  segments/NAME.WRITER/    the arrays of a segment, which count once a manifest names them
  claims/NAME.json         which writer is making a segment
  data/                    the prepared data's manifest, tokenizer and held-out prompts
  index.json               all manifests in one file, so that a store opens quickly; derived again where it lacks some
"""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.features.formats import StoreFormat
from jeagle.features.storage import Storage
from jeagle.runtime.manifest import canonical, fingerprint, flat
from jeagle.runtime.outputs import Output, check_output, listed

FORMAT = 1
STORE, INDEX, MANIFESTS, SEGMENTS, CLAIMS, DATA = "store.json", "index.json", "manifests", "segments", "claims", "data"
TABLES = "tables"  # the segment without rows: the target's embedding, final norm and head, and the scales of channels
SPLITS = ("train", "held_out")
_LEFTOVERS = (f"{STORE}.__lock", "aside")  # of writers that were killed: tensorstore's, and those of earlier versions
_IGNORED = ("data.version",)  # fields of made_from that do not change what is stored
# Fields that say where something was, or how it was chosen; the other field, where both sides have it, says what it is.
_NAMES_OF = {"target.reference": "target.fingerprint", "template_settings": "data.template"}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some rows of one split, immutable. The names of the fields are those of the manifest.

    Attributes:
      name: such as train-000012.
      data: the folder under segments/ that contains its arrays.
      split: train or held_out; empty for the tables.
      rows: their numbers in the split.
      lengths: tokens of each row.
      kept: positions of each row whose teacher is stored.
      arrays: by name, as `storage.write_array` describes them.
      bytes: the size of its arrays.
    """

    name: str
    data: str
    split: str = ""
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    bytes: int = 0

    @property
    def folder(self) -> str:
        """The key of the folder of its arrays."""
        return f"{SEGMENTS}/{self.data}"


def sealed(tree: dict[str, Any]) -> bytes:
    """JSON of a tree, with a checksum of itself."""
    tree = json.loads(canonical(tree))
    return (json.dumps(tree | {"checksum": fingerprint(tree)}, indent=1, sort_keys=True) + "\n").encode()


def unsealed(storage: Storage, key: str, data: bytes) -> dict[str, Any]:
    """The tree of `sealed` bytes. UserError where a byte has changed."""
    try:
        tree = json.loads(data)
        intact = tree.pop("checksum") == fingerprint(tree)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"{storage}/{key} is damaged: its checksum does not fit its content. {storage.prune_command} "
            "removes a damaged segment; where store.json is damaged, the store must be made again."
        )
    return tree


def read_store(storage: Storage) -> dict[str, Any] | None:
    """store.json; None where there is none. UserError for a damaged one, or one of a format that cannot be read."""
    data = storage.read(STORE)
    if data is None:
        return None
    tree = unsealed(storage, STORE, data)
    if tree.get("format") != FORMAT:
        raise UserError(f"The store {storage} has format {tree.get('format')}, and this jeagle reads format {FORMAT}.")
    made = tree["made_from"]
    if made["arrays"].get("taps_at", "all") != "all":
        raise UserError(
            f"The store {storage} was made with --store.aux-at seen by an earlier version, and lacks aux hidden states "
            "that this version reads: extract the features again, into another folder."
        )
    return tree | {"made_from": made | {"arrays": StoreFormat.from_json(made["arrays"]).to_json()}}


def _foreign(folder: Path) -> str:
    names = sorted(n for n in os.listdir(folder) if n not in _LEFTOVERS)
    return "" if STORE in names or not names else f"it holds {listed(names)} and no {STORE}"


STORE_FOLDER = Output("store of jeagle's", True, _foreign, grows=True)


def check_storage(storage: Storage) -> None:
    """Raises UserError unless a storage is empty or contains a store, because writers remove keys there."""
    if storage.path is not None:
        check_output(storage.path, STORE_FOLDER)
    if read_store(storage) is not None or storage.path is not None:
        return
    if taken := [name for name in (SEGMENTS, CLAIMS, MANIFESTS, DATA) if storage.names(name)]:
        raise UserError(
            f"{storage} is no store of jeagle's (it holds {listed(taken)} and no {STORE}): give another one."
        )


def read_segment(storage: Storage, name: str) -> Segment | None:
    """A segment's manifest, None where it is not finished. UserError for a damaged one."""
    key = f"{MANIFESTS}/{name}.json"
    data = storage.read(key)
    return None if data is None else _segment(unsealed(storage, key, data))


def _segment(tree: dict[str, Any]) -> Segment:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in tree.items()}
    fields.pop("seen", None)  # a field of earlier versions
    return Segment(**fields)


def is_finished(storage: Storage, name: str) -> bool:
    """Whether a segment is finished."""
    return storage.read(f"{MANIFESTS}/{name}.json") is not None


def finished_names(storage: Storage) -> list[str]:
    """Names of the finished segments, the tables included."""
    return [n.removesuffix(".json") for n in storage.names(MANIFESTS) if n.endswith(".json")]


def read_segments(storage: Storage) -> list[Segment]:
    """All finished segments, sorted by name: from the index as far as it goes, the others one by one.

    Raises:
      UserError: for a damaged manifest.
    """
    names = finished_names(storage)
    data = storage.read(INDEX) or b""
    try:
        known = {s["name"]: _segment(s) for s in unsealed(storage, INDEX, data)["segments"]}
    except UserError:
        known = {}  # the index is absent or damaged
    with ThreadPoolExecutor(16) as readers:
        segments = readers.map(lambda name: known.get(name) or read_segment(storage, name), names)
        return sorted((s for s in segments if s is not None), key=lambda s: s.name)


def write_index(storage: Storage) -> list[Segment]:
    """Derives index.json from the manifests."""
    segments = read_segments(storage)
    storage.write(INDEX, sealed({"segments": [dataclasses.asdict(s) for s in segments]}))
    return segments


def check_fit(storage: Storage, wanted: dict[str, Any], found: dict[str, Any], advice: str) -> None:
    """Raises UserError, which names the fields that differ, unless the store was made from what the run has.

    Args:
      wanted, found: the run's and the store's `made_from`. Only fields that `wanted` has are compared.
      advice: a sentence that says what to do.
    """
    there, here = flat(found), flat(wanted)
    named = tuple(name for name, content in _NAMES_OF.items() if content in here and content in there)
    fields = [f for f in sorted(here) if here[f] != there.get(f) and f not in _IGNORED and not f.startswith(named)]
    if fields:
        brief = {
            f: [x if len(x) <= 60 else f"{x[:57]}..." for x in (there.get(f, "null"), here[f])] for f in fields[:4]
        }
        shown = "; ".join(f"{field}: {store} in the store, {run} here" for field, (store, run) in brief.items())
        raise UserError(
            f"The store {storage} does not fit this run: {', '.join(fields)} "
            f"{'differs' if len(fields) == 1 else 'differ'} ({shown}). {advice}"
        )
