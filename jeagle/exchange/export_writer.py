"""Writes a trained draft as a folder that SGLang or vLLM loads: config.json, model.safetensors and a model card.

The safetensors file is written tensor by tensor and block by block, so that only one block is in memory at a time. A
parameter is transposed to torch's orientation, rounded to the stored type, and checked for NaN on the way.

Source of the format: the safetensors specification. A file has eight bytes with the header's length, the header (JSON:
the type, shape and data offsets of each tensor), and the data without gaps, row-major and little-endian.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") a type
import numpy as np
from jaxtyping import Shaped

from jeagle.errors import UserError
from jeagle.exchange.card import (
    EXPORT_FILE,
    EXPORT_FOLDER,
    TOKENIZER_FILES,
    Export,
    export_record,
    limits_of,
    model_card,
)
from jeagle.exchange.config_write import config_json
from jeagle.exchange.draft_tensors import (
    EMBEDDING,
    FirstLayer,
    Readable,
    check_embedding,
    check_finite,
    check_params,
    is_transposed,
    same_embedding,
    torch_name,
    vocabulary_tables,
)
from jeagle.exchange.limits import check_spec, vllm_limits
from jeagle.runtime.disk import check_room
from jeagle.runtime.manifest import atomic_folder

EXPORT_DTYPES = ("bfloat16", "float16", "float32")
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}
_BLOCK = 1 << 22  # numbers that are converted at a time


def write_export(
    export: Export,
    params: Mapping[str, Any],
    draft_to_target_D: Shaped[np.ndarray, "..."] | None,
    *,
    embed_VW: Readable | None = None,
    target_embed_VW: Readable | None = None,
    tokenizer: Any = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the export and returns its folder. vLLM also loads the plain layout, unless `vllm_limits` says otherwise.

    Args:
      export: the engine, layout, type and folder. An older export of jeagle's in this folder is replaced; a folder with
        other files is refused.
      params: float32, with the names and shapes of `expected_shapes`, each of them `Readable`. They are read one at a
        time, so that together they may be larger than memory, and rounded to nearest.
      draft_to_target_D: the target's token ids, strictly rising; None for a full vocabulary.
      embed_VW: the embedding that the draft reads. A draft of another width than the target's needs its own; the
        speculators library needs one in any case. At equal width SGLang replaces it by the target's.
      target_embed_VW: the target's embedding, where SGLang would replace `embed_VW` by it; the two must be equal.
      tokenizer: a folder of tokenizer files, or an object with `save_pretrained`; its files are written to the export.
      check: is called with the finished folder before it is moved to its place; the older export stays if it raises.

    Raises:
      UserError: for parameters, ids or an embedding that do not fit the spec, for what the engine cannot serve, for
        speculators' layout without `card.target_ref`, or for a folder that cannot be written. Nothing is written then.
    """
    spec = export.spec
    check_spec(spec, export.target_layers)
    if reasons := limits_of(export)[export.engine]:
        served = not vllm_limits(spec, "speculators", export.card.target_architectures)
        hint = " vLLM can, in speculators' layout: export it in that one." if served else ""
        raise UserError(f"{export.engine} cannot serve this draft as it was trained: {'; '.join(reasons)}.{hint}")
    if export.layout == "speculators" and not export.card.target_ref:
        raise UserError('The layout "speculators" names the target: give the target, or choose the layout "plain".')
    if export.dtype not in EXPORT_DTYPES:
        raise UserError(f"An export cannot be stored as {export.dtype!r}: choose {', '.join(EXPORT_DTYPES)}.")
    check_params(spec, params)
    check_embedding(spec, None if embed_VW is None else embed_VW.shape, where="The draft's parameters")
    if (
        embed_VW is not None
        and target_embed_VW is not None
        and not same_embedding(embed_VW, target_embed_VW, spec.target_vocab)
    ):
        raise UserError("SGLang would replace the draft's own embedding by the target's: export the draft for vLLM.")
    first_layer: FirstLayer = "midlayer" if export.layout == "plain" and spec.layers == 1 else "layers.0"
    tensors = {torch_name(name, first_layer): _parameter(name, p, export.dtype) for name, p in params.items()}
    if embed_VW is not None:
        tensors[EMBEDDING] = _parameter(EMBEDDING, embed_VW, export.dtype)
    for name, table in vocabulary_tables(spec, draft_to_target_D).items():
        tensors[name] = TensorPlan(table.dtype.name, table.shape, functools.partial(iter, [table]))
    out = Path(export.out)
    try:
        with atomic_folder(out, EXPORT_FOLDER) as folder:
            _write_tokenizer(tokenizer, folder)
            write_safetensors(folder / "model.safetensors", tensors)
            (folder / "README.md").write_text(model_card(export), "utf-8")
            for name, tree in {"config.json": config_json(export), EXPORT_FILE: export_record(export)}.items():
                (folder / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
            if check is not None:
                check(folder)
    except OSError as error:
        raise UserError(f"The export cannot be written to {out}: {error}.") from error
    return out


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
        return
    files = [path for name in TOKENIZER_FILES if (path := Path(tokenizer) / name).is_file()]
    if not files:
        raise UserError(f"{tokenizer} does not contain a tokenizer: expected tokenizer.json or tokenizer.model there.")
    for file in files:
        shutil.copyfile(file, folder / file.name)


class TensorPlan(NamedTuple):
    """A tensor that is going to be written.

    Attributes:
      dtype: name of a type in the file.
      shape: in the file.
      blocks: returns an iterator over the tensor's rows, some at a time and in order, in that type.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def _parameter(name: str, array: Readable, dtype: str) -> TensorPlan:
    """Plans a parameter; `name` and `array` are jeagle's, so that a kernel is [in, out]."""
    shape = array.shape[::-1] if is_transposed(name, array.shape) else array.shape
    return TensorPlan(dtype, shape, functools.partial(_blocks, name, array, dtype, shape))


def _blocks(name: str, array: Readable, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields blocks of rows in the file's type and orientation, rounded to nearest, ties to even.

    Raises UserError for NaN, infinity, or a number that the type cannot represent.
    """
    rows, transposed = shape[0], is_transposed(name, array.shape)
    step = max(_BLOCK * rows // max(math.prod(shape), 1), 1)
    # Rows that are stored in one piece are read together. The rows of a transposed kernel are its columns: it is read
    # once.
    stored = rows if transposed else getattr(array, "block_rows", step)
    span = -(-step // stored) * stored
    for begin in range(0, rows, span):
        piece = np.asarray(array[...]).T if transposed else np.asarray(array[begin : begin + span])
        for start in range(0, len(piece), step):
            block = piece[start : start + step]
            with np.errstate(over="ignore"):
                rounded = block.astype(np.dtype(dtype), order="C")
            if not np.isfinite(rounded).all():
                check_finite(name, block, where="The draft's parameters")
                raise UserError(
                    f"The parameter {torch_name(name, 'layers.0')} contains numbers that {dtype} cannot represent: "
                    "store the export as bfloat16."
                )
            yield rounded


def write_safetensors(path: Path, tensors: Mapping[str, TensorPlan]) -> None:
    """Writes the file. Wide types come first and names are sorted, so that equal tensors give equal bytes.

    Raises:
      OSError: when the file cannot be written.
      UserError: when the disk has no room for it; nothing has been written then.
    """
    width = {name: np.dtype(plan.dtype).itemsize for name, plan in tensors.items()}
    order = sorted(tensors, key=lambda name: (-width[name], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        plan, start = tensors[name], end
        end += math.prod(plan.shape) * width[name]
        header[name] = {"dtype": _CODES[plan.dtype], "shape": list(plan.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    check_room(path.parent, end + len(text) + 8, "The export", "make room, or give another --out")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in tensors[name].blocks():
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
