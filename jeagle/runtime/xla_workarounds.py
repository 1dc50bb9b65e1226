"""What works around a weakness of an XLA backend: layouts, barriers, orders of operands, work in pieces.

Every function computes what its one-line plain form computes; code that calls it reads as if it were that form. Each
names the backend and the version it was seen on (jaxlib 0.10.2 unless it says otherwise) and what it saves. Works W1
and W3 are those of `benchmarks.step`. Before removing one, measure again: benchmarks/RESULTS.md has the numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

_LARGEST_PRODUCT = 2**25
"""Entries of a gradient that a CPU computes at a time in `add_matmul`: 128 MB in float32."""


def argmax_by_blocks(logits: Float[Array, "*rows V"], block: int = 64) -> Int[Array, "*rows"]:
    """Is jnp.argmax over the last axis; of equal entries the first one wins.

    XLA's CPU backend vectorises a maximum but not an argmax, so a CPU takes the maximum of each block and then searches
    one block: [128, 49152] takes 1.2 ms instead of 27 ms, a quickstart step 0.44 CPU-seconds instead of 0.55. A TPU
    would have to change the layout for the blocks, which costs more than the argmax; other backends take jnp.argmax.
    """
    size = logits.shape[-1]
    if size % block:
        return jnp.argmax(logits, axis=-1)

    def by_blocks(logits: jax.Array) -> jax.Array:
        blocks = logits.reshape(*logits.shape[:-1], size // block, block)
        best_block = jnp.argmax(blocks.max(axis=-1), axis=-1)
        entries = jnp.take_along_axis(blocks, best_block[..., None, None], axis=-2)[..., 0, :]
        return best_block * block + jnp.argmax(entries, axis=-1)

    return jax.lax.platform_dependent(logits, cpu=by_blocks, default=lambda logits: jnp.argmax(logits, axis=-1))


def top_k_by_blocks(
    logits: Float[Array, "*rows V"], count: int, block: int = 64
) -> tuple[Float[Array, "*rows P"], Int[Array, "*rows P"]]:
    """Is jax.lax.top_k: the `count` largest entries over the last axis, falling, and their indices; ties to the first.

    XLA sorts the whole axis for a top_k. The `count` blocks with the largest maxima contain the result, since each of
    them has an entry as large as any entry of the other blocks: only these blocks are sorted.
    """
    size = logits.shape[-1]
    if size % block or count * block >= size:
        values, indices = jax.lax.top_k(logits, count)  # a list
        return values, indices
    blocks = logits.reshape(*logits.shape[:-1], size // block, block)
    best_blocks = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), count)[1], axis=-1)  # ascending, so that ties keep order
    entries = jnp.take_along_axis(blocks, best_blocks[..., None], axis=-2).reshape(*logits.shape[:-1], count * block)
    values, at = jax.lax.top_k(entries, count)
    return values, jnp.take_along_axis(best_blocks, at // block, axis=-1) * block + at % block


def as_bits(x: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """16-bit floats as unsigned integers of the same bits, other floats unchanged; `from_bits` is the inverse.

    XLA's CPU backend slices, gathers and scatters no 16-bit floats: it converts the whole array to float32 first. W3
    saves 2.8 GB because the TTT steps' stacked results are integers.
    """
    return x if jnp.finfo(x.dtype).bits != 16 else jax.lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(x: Shaped[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """The floats of type `dtype` that `as_bits` was given."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def name_residual(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
    """Is `checkpoint_name`, for code through which no gradient is taken; saved as integers (see `as_bits`)."""
    return from_bits(checkpoint_name(as_bits(x), name), x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def save_residual(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
    """Is `checkpoint_name`: rematerialisation saves x under this name; saved as integers (see `as_bits`)."""
    return name_residual(x, name)


@save_residual.defjvp
def _save_residual_jvp(name: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return name_residual(primals[0], name), tangents[0]  # integers have no tangent of their own


def flat_matmul(x: Float[Array, "*rows I"], matrix: Float[Array, "M N"], *, transposed: bool = False) -> jax.Array:
    """Is x @ matrix, or x @ matrix.T where `transposed`: [..., I] -> [..., O], summed in float32 or better.

    The leading axes of x are merged: XLA's CPU backend multiplies two matrices as they lie in memory, either way
    round, but with more axes it first copies the matrix transposed.
    """
    flat = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        matrix,
        (((1,), (1 if transposed else 0,)), ((), ())),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return flat.reshape(*x.shape[:-1], -1)


def contract_rows(a: Float[Array, "*rows I"], b: Float[Array, "*rows O"]) -> Float[Array, "I O"]:
    """Is a^T @ b over all leading axes, summed in float32 or better: the gradient of a kernel.

    Pass the narrower operand first: XLA's CPU backend copies that one transposed. It takes two leading axes or more;
    with one, that backend multiplies bfloat16 matrices in float32, at a third of the speed. The barrier keeps a
    transposition by the caller out of the product: the CPU backend has no bfloat16 product of that form, and reports it
    only when it runs.
    """
    rows = tuple(range(a.ndim - 1))
    product = jax.lax.dot_general(
        a, b, ((rows, rows), ((), ())), preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)
    )
    return jax.lax.optimization_barrier(product)


def kernel_gradient(x: Float[Array, "*rows I"], dy: Float[Array, "*rows O"]) -> Float[Array, "I O"]:
    """Is `contract_rows(x, dy)` with the narrower operand first."""
    if x.shape[-1] <= dy.shape[-1]:
        return contract_rows(x, dy)
    # Without a second barrier XLA would see the transposition and turn the product round again.
    return jax.lax.optimization_barrier(contract_rows(dy, x)).T


def add_in_place(total: Float[Array, "..."], part: Float[Array, "..."], start: Any, axis: int) -> Float[Array, "..."]:
    """Is total with `part` added to its entries from `start` on along an axis.

    In a loop, XLA updates the slice where `total` lies in memory; adding padded parts would make a second `total`.
    """
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis)


def add_matmul(total: Float[Array, "I O"], a: Float[Array, "*rows I"], b: Float[Array, "*rows O"]) -> jax.Array:
    """Is total + contract_rows(a, b); on a CPU piece by piece, so that no second array of its size exists.

    XLA's CPU backend adds a product only after the whole product exists; pieces save 0.4 GB of W3. A TPU adds while it
    multiplies, and pads each piece to the whole: without pieces a v5e's draft step takes 3 ms less by the compiler's
    estimate, so other backends get the plain sum.
    """
    return jax.lax.platform_dependent(
        total, a, b, cpu=_add_matmul_in_pieces, default=lambda total, a, b: total + contract_rows(a, b)
    )


def _add_matmul_in_pieces(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Pieces are cut along I, not O: a mesh may split O, and cutting along it would gather all of `total`."""
    width = total.shape[0]
    pieces = -(-total.size // _LARGEST_PRODUCT)
    size = -(-width // (pieces * 128)) * 128
    for start in range(0, width, size):
        total = add_in_place(total, contract_rows(a[..., start : start + size], b), start, 0)
    return total


def keep_in_loop(arrays: Any) -> Any:
    """Is `arrays`; what is computed from them inside a scan stays inside it.

    JAX moves what no iteration changes out of a scan. Masks of attention would exist for all blocks at once, which
    grows with T squared; inside the scan, memory a token is the same at T 512 and T 32768 (W4).
    """
    return jax.lax.optimization_barrier(arrays)


def keep_apart(arrays: Any) -> Any:
    """Is `arrays`; a transposition that follows is not merged into the product that precedes.

    XLA's CPU backend has no bfloat16 product of the merged form, and reports it only when it runs.
    """
    return jax.lax.optimization_barrier(arrays)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Is optax.clip_by_global_norm, with one factor for all gradients instead of a division of each.

    XLA repeats the multiplication in each pass of the optimiser, where it would store the quotients: a second copy of
    all gradients.
    """

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm > limit, limit / norm, 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
