"""The rows by vocabulary of a target's files, read when they are asked for: its model is not loaded for them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jeagle.targets.checkpoint.layout import Layout
from jeagle.targets.checkpoint.tensor_reader import Reader
from jeagle.targets.checkpoint.weights import WeightSource
from jeagle.targets.families import Family, family_of, read_spec

_NOWHERE: Any = None  # what is read into the host's memory lies on no mesh


class Table:
    """Rows [V, H] in a target's files. `table[start:stop]` reads those rows, in the type that they are stored in."""

    def __init__(self, reader: Reader, key: str, shape: tuple[int, ...]):
        self._reader, self.shape = reader, shape
        self._layout = Layout(key, None, (None,), False, shape, jnp.dtype("float32"), _NOWHERE, None)
        reader.check(self._layout, None)

    def __getitem__(self, rows: Any) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self._reader.read(self._layout, None, (slice(start, stop), slice(0, self.shape[1])))


def embedding_table(source: WeightSource, family: Family | None = None) -> Table:
    """The embedding's rows as servers read them, without a family's multiplier.

    Raises:
      UserError: where the files lack it, or hold one of another shape than config.json says.
    """
    return _table(source, family, "embed_tokens")


def head_table(source: WeightSource, family: Family | None = None) -> Table:
    """lm_head's rows; the embedding's where the two are tied. Raises as `embedding_table`."""
    return _table(source, family, "embed_tokens" if read_spec(source.config, family).tied else "lm_head")


def _table(source: WeightSource, family: Family | None, key: str) -> Table:
    spec = read_spec(source.config, family)
    reader = Reader(source, (family or family_of(source.config)).names)
    return Table(reader, key, (spec.vocab, spec.width))
