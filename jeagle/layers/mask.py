"""Who sees whom: masks that follow from positions."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Sight(NamedTuple):
    """Where queries and keys stand: what a query may see follows from it.

    Attributes:
      queries_BT, keys_BS: positions within the document.
      query_segments_BT, key_segments_BS: the documents of packed rows, whose queries and keys are the same tokens in
        the same order, each document's positions rising by one; None where keys come from a cache.
    """

    queries_BT: jax.Array
    keys_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None

    def visible(self, window: int = 0, chunk: int = 0) -> jax.Array:
        """bool [B, T, S]: same document, not later, fewer than `window` positions back, in the same `chunk`."""
        queries, keys = self.queries_BT[:, :, None], self.keys_BS[:, None, :]
        allowed = keys <= queries
        if self.query_segments_BT is not None and self.key_segments_BS is not None:
            allowed &= self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :]
        if window:
            allowed &= queries - keys < window
        if chunk:
            allowed &= queries // chunk == keys // chunk
        return allowed
