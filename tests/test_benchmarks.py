"""The benchmarks' own laws, at a size that takes no time."""

from __future__ import annotations

import jax
import pytest

from benchmarks import ops
from benchmarks.step import bench_of
from benchmarks.works import Work, make_batch

TINY = Work(
    rows=2,
    length=32,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    vocab=64,
    draft_vocab=32,
    steps=2,
    supervised=0.5,
)


@pytest.fixture(scope="module")
def bench():
    return bench_of(TINY, make_batch(TINY), "float32", remat=False)


def test_no_step_counts_less_than_is_needed(bench):
    assert 0 < bench.flops()["flops_share"] <= 1


def test_backends_of_attention_are_given_the_same(bench):
    key, backends = jax.random.key(0), ("reference", "chunked")
    found = [jax.jit(op.function)(*op.make(key)) for op in (ops.attention(bench, name) for name in backends)]
    assert found[0] > 0
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-5)


def test_an_op_is_measured_forward_and_backward(bench):
    op = ops.loss(bench)
    found = op.measure(run=False, budget_s=0)
    # Of each slot one product forward and two backward, of each position the teacher's; beside them, of each slot, only
    # inner products of the teacher with the logits.
    products = 2 * TINY.width * TINY.draft_vocab * TINY.rows * bench.width * (3 * TINY.steps + 1)
    inner = 2 * TINY.draft_vocab * TINY.rows * bench.width * TINY.steps
    assert found["flops_counted"] in (products + inner, products + 2 * inner)
