"""Counts are held to laws of how programs are put together, and to products counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from jeagle.runtime.flops import flops_of
from jeagle.runtime.mesh import make_mesh

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8 * 8 * 8


def product(x):
    return x @ x


def test_a_product_counts_two_for_each_multiply_add():
    left, right = jax.ShapeDtypeStruct((5, 3, 7), jnp.bfloat16), jax.ShapeDtypeStruct((5, 7, 11), jnp.bfloat16)
    assert flops_of(jnp.matmul, left, right) == 2 * 5 * 3 * 7 * 11


@pytest.mark.parametrize("wrapped", [jax.jit, jax.checkpoint, jax.vmap])
def test_wrapping_changes_nothing(wrapped):
    assert flops_of(wrapped(lambda x: x @ jnp.ones((8, 8))), SQUARE) == ONE


def test_a_rule_of_our_own_for_gradients_counts_its_own_products():
    @jax.custom_vjp
    def product_of(x, w):
        return x @ w

    product_of.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy))

    def loss(x, w):
        return product_of(x, w).sum()

    assert flops_of(loss, SQUARE, SQUARE) == ONE
    assert flops_of(jax.grad(loss, (0, 1)), SQUARE, SQUARE) == 3 * ONE


def test_loops_multiply_and_nest():
    def inner(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: product(y), x)

    assert flops_of(inner, SQUARE) == 3 * ONE
    assert flops_of(lambda x: jax.lax.scan(lambda y, _: (inner(y), None), x, length=5)[0], SQUARE) == 15 * ONE
    assert flops_of(lambda x: jax.lax.map(product, jnp.stack([x] * 4)), SQUARE) == 4 * ONE


def test_a_loop_of_unknown_length_counts_once():
    assert flops_of(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, product, x), SQUARE) == ONE


def test_of_branches_the_dearest_counts():
    branches = [lambda x: x, product, lambda x: product(product(x))]
    assert flops_of(lambda i, x: jax.lax.switch(i, branches, x), jnp.int32(0), SQUARE) == 2 * ONE


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 4)])
def test_what_devices_share_counts_as_on_one(data, fsdp):
    mesh = make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    rows = PartitionSpec(("data", "fsdp"))
    shared = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops_of(shared, SQUARE, SQUARE) == ONE


def test_what_every_device_repeats_counts_for_each():
    mesh = make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
    repeated = jax.shard_map(product, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    assert flops_of(repeated, SQUARE) == 8 * ONE
    partly = jax.shard_map(
        product, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names={"data"}, check_vma=False
    )
    assert flops_of(jax.jit(partly), SQUARE) == 2 * ONE


def test_ragged_products_cost_what_their_rows_cost_forward_and_backward():
    x, kernels = jax.ShapeDtypeStruct((12, 5), jnp.float32), jax.ShapeDtypeStruct((4, 5, 7), jnp.float32)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def loss(x, kernels, sizes):
        return jnp.square(jax.lax.ragged_dot(x, kernels, sizes)).sum()

    assert flops_of(loss, x, kernels, sizes) == 2 * 12 * 5 * 7
    assert flops_of(jax.grad(loss, (0, 1)), x, kernels, sizes) == 3 * 2 * 12 * 5 * 7


def test_convolutions_and_their_groups():
    image, kernel = jax.ShapeDtypeStruct((2, 6, 10, 10), jnp.float32), jax.ShapeDtypeStruct((4, 3, 3, 5), jnp.float32)

    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=2)

    assert flops_of(convolved, image, kernel) == 2 * (2 * 4 * 8 * 6) * (3 * 3 * 5)


def test_a_kernel_counts_for_its_grid():
    def body(x, out):
        out[...] = x[...] @ x[...]

    kernel = pl.pallas_call(body, out_shape=SQUARE, grid=(3, 2), interpret=True)
    assert flops_of(kernel, SQUARE) == 6 * ONE


def test_a_kernel_counts_what_it_says_of_itself():
    def body(x_ref, out_ref):  # as often as data tell, which no jaxpr can
        out_ref[...] = jax.lax.while_loop(lambda y: y[0, 0] < 1, product, x_ref[...])

    said = pl.CostEstimate(flops=5 * ONE, transcendentals=0, bytes_accessed=0)
    assert flops_of(pl.pallas_call(body, out_shape=SQUARE, interpret=True, cost_estimate=said), SQUARE) == 5 * ONE
