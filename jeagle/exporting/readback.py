"""An export read back: rebuilt from its own files alone, it must give the trained draft's logits.

Parameters are read when the forward comes to them and dropped again, so that a draft may be larger than memory.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import exchange
from jeagle.drafts import Eagle3, advance, empty_cache
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec, Tables
from jeagle.runtime.host import aligned_empty, release_freed_memory
from jeagle.runtime.saved import SavedArray

# Largest difference of logits allowed, relative to the largest logit: float32 must be exact but for its own rounding.
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.05, "float16": 0.01}
_LARGE = 1 << 23  # numbers of a parameter
_BLOCK = 1 << 24  # numbers of a matrix by the vocabulary at a time


def check_export(
    out: Path, spec: DraftSpec, params: Mapping[str, Any], vocabulary: np.ndarray, dtype: str, embed_VW: Any = None
) -> float:
    """Largest difference of logits between the trained draft and the export, relative to the largest logit.

    The export is rebuilt from its own config.json and tensors alone. Both run a few slots on the target's features and
    on their own states, on fixed noise. The embedding is compared row by row.

    Args:
      embed_VW: what the export's embedding was written from; None where it is to hold none.

    Raises:
      UserError: when vocabulary maps or embeddings differ, or logits by more than the stored type's rounding explains.
    """
    read = exchange.open_draft(out)
    written = read.spec()
    if not np.array_equal(read.draft_to_target(written), vocabulary):
        raise UserError(f"The vocabulary map in {out} is not the trained draft's: the export was discarded.")
    if not _same_rows(embed_VW, read.open_embedding(written), dtype):
        raise UserError(f"The embedding in {out} is not the one that was to be written: the export was discarded.")
    gc.freeze()  # what is there now stays: `_forget` need not look through it each time
    try:
        ours, theirs = (_probe(s, p, vocabulary) for s, p in ((spec, params), (written, read.params(written))))
    finally:
        gc.unfreeze()
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"The export in {out} does not give the trained draft's logits (off by {difference:.1e} of the largest; "
            f"{TOLERANCE[dtype]:.0e} is allowed for {dtype}): it was discarded."
        )
    return difference


def _same_rows(ours: Any, theirs: Any, dtype: str) -> bool:
    """Whether both are missing, or `theirs` holds the numbers of `ours` rounded to `dtype`."""
    if ours is None or theirs is None:
        return ours is theirs
    step = max(_BLOCK // theirs.shape[1], 1)
    blocks = (slice(start, start + step) for start in range(0, theirs.shape[0], step))
    return all(np.array_equal(np.asarray(ours[rows]).astype(jnp.dtype(dtype)), theirs[rows]) for rows in blocks)


def _probe(spec: DraftSpec, params: Mapping[str, Any], vocabulary: np.ndarray) -> np.ndarray:
    """float32 logits [2, slots, D] of six slots on the target's features, and of six on the draft's own states."""
    draft = _unread(spec, params)
    noise = np.random.Generator(np.random.PCG64(0))
    embed = jnp.asarray(noise.standard_normal((64, spec.width), np.float32))
    head = jnp.zeros((1, spec.target_width))
    tables = Tables(embed, head, jnp.asarray(vocabulary))
    aux = jnp.asarray(noise.standard_normal((2, 6, len(spec.aux_layers), spec.target_width), np.float32))
    tokens = jnp.asarray(noise.integers(0, 64, (2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12)) + 100  # far enough that a lost RoPE scaling shows
    cache = empty_cache(draft, 2, 112)
    for_head, states, cache = advance(draft, tables, draft.fuse(aux), tokens[:, :6], positions[:, :6], cache)
    own, _, _ = advance(draft, tables, states, tokens[:, 6:], positions[:, 6:], cache)
    return _logits(draft, jnp.concatenate([for_head, own], axis=1), params["lm_head"])


def _logits(draft: Eagle3, for_head: Any, lm_head: Any) -> np.ndarray:
    parts, step = [], max(_BLOCK // lm_head.shape[1], 1)
    for start in range(0, lm_head.shape[0], step):
        _forget((step, lm_head.shape[1]))
        draft.lm_head = nnx.Param(jnp.asarray(lm_head[start : start + step]))
        parts.append(np.asarray(draft.logits(for_head)))
    return np.concatenate(parts, axis=-1)


class _OnDevice:
    """A parameter that `parameter[...]` reads from its file onto the device.

    JAX uses an aligned array of the host's as it lies, so that the largest matrix is in memory once.
    """

    def __init__(self, array: Any):
        self._array, self.shape = array, array.shape

    def __getitem__(self, index: Any) -> Any:
        _forget(self.shape)
        if not isinstance(self._array, SavedArray):
            return jax.device_put(self._array[index])
        out = aligned_empty(self.shape, np.float32)
        self._array.read_into(out)
        return jax.device_put(out[index])


def _forget(shape: tuple[int, ...]) -> None:
    """Before room is made for a large parameter, that of the one before is handed back: JAX's own cycles hold it."""
    if np.prod(shape) >= _LARGE:
        gc.collect()
        release_freed_memory()


def _unread(spec: DraftSpec, params: Mapping[str, Any]) -> Eagle3:
    """The draft with parameters that its forward reads when it comes to them, and drops again."""
    exchange.check_params(spec, params)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Eagle3(spec, jnp.dtype("float32"), nnx.Rngs(0))))
    leaves = [
        (path, leaf.replace(_OnDevice(params[".".join(map(str, path))]))) for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))
