"""Reads an export back: a draft that is built from the export's files alone must give the trained draft's logits.

The forward pass reads each parameter when it needs it and drops it afterwards, so that a draft may be larger than
memory.
"""

import functools
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from jeagle import exchange
from jeagle.drafts import Eagle3, advance, empty_cache
from jeagle.errors import UserError
from jeagle.exchange.draft_tensors import LazyArray, Readable
from jeagle.exporting.run_reader import CheckpointArray
from jeagle.interfaces import DraftSpec, Tables
from jeagle.runtime.host import aligned_empty, release_freed_memory

TOLERANCE = {"float32": 1e-6, "bfloat16": 0.05, "float16": 0.01}
"""The largest allowed difference of logits, relative to the largest logit. float32 must be exact up to its rounding."""
_LARGE = 1 << 23  # numbers in a parameter whose memory is released before the next one is read
_BLOCK = 1 << 24  # numbers of a matrix with one row for each token that are read at a time


def check_export(
    out: Path,
    spec: DraftSpec,
    params: Mapping[str, Readable],
    vocabulary: Int[np.ndarray, " D"],
    dtype: str,
    embed_VW: Readable | None = None,
) -> float:
    """Compares an export with the trained draft.

    The export's draft is built from its own config.json and tensors alone. Both drafts run on the same fixed noise: a
    few slots on the target's features, and a few on their own states. Embeddings are compared row by row.

    Args:
      spec, params, vocabulary: the trained draft; its parameters are float32, its vocabulary the target's token ids.
      dtype: of the parameters in the export.
      embed_VW: the embedding that the export was written with; None where it must not contain one.

    Returns:
      The largest difference of logits, relative to the largest logit.

    Raises:
      UserError: where the vocabulary or the embedding differs, or the logits differ by more than `TOLERANCE`.
    """
    draft = exchange.open_draft_folder(out)
    written = draft.spec()
    if not np.array_equal(draft.draft_to_target(written), vocabulary):
        raise UserError(f"The draft vocabulary in {out} is not the trained draft's: the export was removed.")
    if not _same_rows(embed_VW, draft.open_embedding(written), dtype):
        raise UserError(f"The embedding in {out} is not the one that was to be written: the export was removed.")
    gc.freeze()  # so that `_release` does not search the objects that exist now each time
    try:
        ours, theirs = (_probe(s, p, vocabulary) for s, p in ((spec, params), (written, draft.params(written))))
    finally:
        gc.unfreeze()
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"The export in {out} does not give the trained draft's logits: they differ by {difference:.1e} of the "
            f"largest logit, and {TOLERANCE[dtype]:.0e} is allowed for {dtype}. The export was removed."
        )
    return difference


def _same_rows(ours: Readable | None, theirs: Readable | None, dtype: str) -> bool:
    """Returns whether both are missing, or `theirs` contains the numbers of `ours` rounded to `dtype`."""
    if ours is None or theirs is None:
        return ours is theirs
    step = max(_BLOCK // theirs.shape[1], 1)
    blocks = (slice(start, start + step) for start in range(0, theirs.shape[0], step))
    return all(np.array_equal(np.asarray(ours[rows]).astype(jnp.dtype(dtype)), theirs[rows]) for rows in blocks)


def _probe(spec: DraftSpec, params: Mapping[str, Readable], vocabulary: np.ndarray) -> np.ndarray:
    """Returns float32 logits [2, slots, D] of six slots on the target's features and six on the draft's own states."""
    exchange.check_params(spec, params)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Eagle3(spec, jnp.dtype("float32"), nnx.Rngs(0))))
    unread = [
        (path, leaf.replace(LazyArray(array.shape, functools.partial(_on_device, array))))
        for path, leaf in nnx.to_flat_state(abstract)
        for array in [params[".".join(map(str, path))]]
    ]
    draft = nnx.merge(graphdef, nnx.from_flat_state(unread))
    noise = np.random.Generator(np.random.PCG64(0))
    embed = jnp.asarray(noise.standard_normal((64, spec.width), np.float32))
    tables = Tables(embed, jnp.zeros((1, spec.target_width)), jnp.asarray(vocabulary))
    aux = jnp.asarray(noise.standard_normal((2, 6, len(spec.aux_layers), spec.target_width), np.float32))
    tokens = jnp.asarray(noise.integers(0, 64, (2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12)) + 100  # large enough that a lost RoPE scaling is visible
    cache = empty_cache(draft, 2, 112)
    on_features, states, cache = advance(draft, tables, draft.fuse(aux), tokens[:, :6], positions[:, :6], cache)
    on_states, _, _ = advance(draft, tables, states, tokens[:, 6:], positions[:, 6:], cache)
    hidden, head_DW = jnp.concatenate([on_features, on_states], axis=1), params["lm_head"]
    logits, step = [], max(_BLOCK // head_DW.shape[1], 1)
    for start in range(0, head_DW.shape[0], step):
        _release((step, head_DW.shape[1]))
        draft.lm_head = nnx.Param(jnp.asarray(head_DW[start : start + step]))
        logits.append(np.asarray(draft.logits(hidden)))
    return np.concatenate(logits, axis=-1)


def _on_device(array: Readable, index: Any) -> Any:
    """Reads a parameter from its file onto the device.

    JAX's CPU backend uses an aligned array without a copy, so that the largest matrix is in memory only once.
    """
    _release(array.shape)
    if not isinstance(array, CheckpointArray):
        return jax.device_put(array[index])
    out = aligned_empty(array.shape, np.float32)
    array.read_into(out)
    return jax.device_put(out[index])


def _release(shape: tuple[int, ...]) -> None:
    """Releases the previous parameter's memory, which JAX keeps in reference cycles, before a large one is read."""
    if np.prod(shape) >= _LARGE:
        gc.collect()
        release_freed_memory()
