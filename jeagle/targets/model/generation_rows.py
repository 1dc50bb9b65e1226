"""The rows of a generation on the device: prompts are read into them, and all of them write side by side."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jeagle.runtime.mesh import replicated
from jeagle.targets.model.sampling import Sampling, choose
from jeagle.targets.model.view import cache_shardings


class Rows(NamedTuple):
    """The state of B rows on the device: the cache split over the mesh, the rest whole on every device."""

    cache: Any
    last_B: jax.Array  # the token that each row has to read next
    position_B: jax.Array  # where it stands
    left_B: jax.Array  # tokens that the row may still write; 0 = idle
    written_BS: jax.Array
    count_B: jax.Array
    number_B: jax.Array  # of the row's prompt: its chance follows from it


class Prompts(NamedTuple):
    """R prompts to be read: those whose place is out of range are padding."""

    tokens_RP: np.ndarray
    lengths_R: np.ndarray
    places_R: np.ndarray
    limits_R: np.ndarray
    numbers_R: np.ndarray


def _laid_out(rows: Rows, mesh: Mesh | None) -> Rows:
    """`rows` where they belong on the mesh, inside jit."""
    if mesh is None:
        return rows
    where = Rows(cache_shardings(rows.cache, mesh), *[replicated(mesh)] * (len(rows) - 1))
    return jax.lax.with_sharding_constraint(rows, where)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh", "batch", "length", "room"))
def empty_rows(graphdef: Any, state: Any, mesh: Mesh | None, batch: int, length: int, room: int) -> Rows:
    cache = nnx.merge(graphdef, state).empty_cache(batch, length, jnp.float32)
    none = jnp.zeros(batch, jnp.int32)
    rows = Rows(cache, none, none, none, jnp.zeros((batch, room), jnp.int32), none, none.astype(jnp.uint32))
    return _laid_out(rows, mesh)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames=("rows",))
def prefill(graphdef: Any, state: Any, rows: Rows, prompts: Prompts, *, mesh: Mesh | None) -> Rows:
    """Reads prompts into their places; the last token of each is left to read."""
    model = nnx.merge(graphdef, state)
    tokens_RP, last_R = prompts.tokens_RP, prompts.lengths_R - 1
    positions = jnp.broadcast_to(jnp.arange(tokens_RP.shape[1]), tokens_RP.shape)
    empty = model.empty_cache(*tokens_RP.shape, jnp.float32)
    _, _, fresh = model.extend(tokens_RP, positions, empty, (), last_R)

    def put(array: jax.Array, values: Any) -> jax.Array:
        return array.at[prompts.places_R].set(values, mode="drop")

    filled = Rows(
        cache=model.admit(rows.cache, fresh, prompts.places_R),
        last_B=put(rows.last_B, jnp.take_along_axis(tokens_RP, last_R[:, None], axis=1)[:, 0]),
        position_B=put(rows.position_B, last_R),
        left_B=put(rows.left_B, prompts.limits_R),
        written_BS=put(rows.written_BS, 0),
        count_B=put(rows.count_B, 0),
        number_B=put(rows.number_B, prompts.numbers_R),
    )
    return _laid_out(filled, mesh)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh", "sampling", "steps"), donate_argnames=("rows",))
def decode(
    graphdef: Any,
    state: Any,
    rows: Rows,
    ends: jax.Array,
    key: jax.Array,
    *,
    mesh: Mesh | None,
    sampling: Sampling,
    steps: int,
) -> Rows:
    """Every busy row writes up to `steps` tokens."""
    model = nnx.merge(graphdef, state)

    def one(rows: Rows, _: None) -> tuple[Rows, None]:
        _, last, cache = model.extend(rows.last_B[:, None], rows.position_B[:, None], rows.cache, ())
        keys_B = jax.vmap(lambda number, place: jax.random.fold_in(jax.random.fold_in(key, number), place))(
            rows.number_B, rows.count_B
        )
        token_B = choose(model.logits(last[:, 0]), keys_B, sampling)
        busy_B = rows.left_B > 0
        ended_B = (token_B[:, None] == ends).any(axis=1)
        everyone = jnp.arange(token_B.shape[0])
        place_B = jnp.where(busy_B, rows.count_B, rows.written_BS.shape[1] - 1)
        return Rows(
            cache=cache,
            last_B=jnp.where(busy_B, token_B, rows.last_B),
            position_B=rows.position_B + busy_B,
            left_B=jnp.where(ended_B, 0, jnp.maximum(rows.left_B - 1, 0)),
            written_BS=rows.written_BS.at[everyone, place_B].set(token_B),
            count_B=rows.count_B + busy_B,
            number_B=rows.number_B,
        ), None

    return _laid_out(jax.lax.scan(one, rows, None, length=steps)[0], mesh)
