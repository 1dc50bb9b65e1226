"""A target's rows by vocabulary, read from its files as they are needed, without loading the model."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jeagle.targets.checkpoint.layout import ParameterLayout
from jeagle.targets.checkpoint.tensor_reader import ParameterReader
from jeagle.targets.checkpoint.weights import WeightSource
from jeagle.targets.families import Family, family_of, read_spec

_COMPARED_ROWS = 4096  # enough to tell two embeddings apart
_NO_SHARDING: Any = None  # rows are read into the host's memory


class Table:
    """Rows [V, H] of a target's files; `table[start:stop]` reads some of them, in the type that they are stored in."""

    def __init__(self, reader: ParameterReader, key: str, shape: tuple[int, ...]):
        self._reader, self.shape = reader, shape
        self._layout = ParameterLayout(key, None, (None,), False, shape, jnp.dtype("float32"), _NO_SHARDING, None)
        reader.check(self._layout, None)

    def __getitem__(self, rows: Any) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self._reader.read(self._layout, None, (slice(start, stop), slice(0, self.shape[1])))


def embedding_table(source: WeightSource, family: Family | None = None) -> Table:
    """Returns the embedding's rows as servers read them, without a family's multiplier.

    Raises:
      UserError: where the files lack it, or its shape is not what config.json says.
    """
    return _table(source, family, "embed_tokens")


def head_table(source: WeightSource, family: Family | None = None) -> Table:
    """Returns the rows of lm_head, which are the embedding's where the two are tied; raises as `embedding_table`."""
    return _table(source, family, "embed_tokens" if read_spec(source.config, family).tied else "lm_head")


def _table(source: WeightSource, family: Family | None, key: str) -> Table:
    spec = read_spec(source.config, family)
    reader = ParameterReader(source, (family or family_of(source.config)).names)
    return Table(reader, key, (spec.vocab, spec.width))


def is_target_embedding(embed_VW: Any, target_embed_VW: Float[Array, "V W"]) -> bool:
    """Whether an embedding is the target's, up to the rounding of a stored type.

    The first 4,096 rows must agree to 2 % of their largest number.

    Args:
      embed_VW: an array of the target's shape, on the host, on a device, or mapped from a file.
    """
    ours = jnp.asarray(np.asarray(embed_VW[:_COMPARED_ROWS], np.float32))
    theirs = target_embed_VW[: len(ours)].astype(jnp.float32)
    return float(jnp.abs(ours - theirs).max()) <= 0.02 * float(jnp.abs(ours).max())
