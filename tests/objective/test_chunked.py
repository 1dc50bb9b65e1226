"""The chunked loss against plain autodiff of the same sum over whole logits, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jeagle.errors import UserError
from jeagle.objective import chunked
from jeagle.objective.chunked import Recipe, Taught, chunked_loss
from jeagle.objective.losses import LOSSES, Teacher, overlap, parse_loss, weighted

K, B, N, M, W, D, H, V = 3, 2, 9, 8, 6, 20, 5, 40


def case():
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((K, B, N, W)), rng.standard_normal((D, W))
    target_head = rng.standard_normal((V, H))
    last = rng.standard_normal((B, M, H))
    logits = last @ target_head.T
    taught = Taught(
        source=jnp.asarray(last),
        head_DH=jnp.asarray(target_head[:D]),
        lse_BM=jax.nn.logsumexp(jnp.asarray(logits), axis=-1),
        label_BM=jnp.asarray(np.where(logits.argmax(-1) < D, logits.argmax(-1), -1)),
        weight_BMK=jnp.asarray(rng.random((B, M, K)) * (rng.random((B, M, K)) < 0.7)),
        slot_BMK=jnp.asarray(rng.permuted(np.tile(np.arange(N)[:, None], (B, 1, K)), axis=1)[:, :M]),
    )
    return jnp.asarray(hidden), jnp.asarray(head), taught


@pytest.mark.parametrize("loss", [*LOSSES, "0.3*kl+0.7*tv"])
@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_values_and_gradients(loss, chunk):
    with jax.enable_x64(True):
        hidden, head, taught = case()
        terms = parse_loss(loss)

        def dense(hidden, head):
            teacher_logits = (taught.source @ taught.head_DH.T)[:, :, None]
            full = jnp.exp(teacher_logits - taught.lse_BM[..., None, None])
            teacher = Teacher(jax.nn.softmax(teacher_logits, axis=-1), full)
            by_teacher = hidden[jnp.arange(K), jnp.arange(B)[:, None, None], taught.slot_BMK]
            logits = by_teacher @ head.T
            accepted = overlap(logits, full)
            return jnp.sum(weighted(terms)(logits, teacher) * taught.weight_BMK), accepted

        def chunked(hidden, head):
            total, slotwise = chunked_loss(Recipe(terms, False, jnp.float64, chunk), hidden, head, taught)
            return 3.0 * total, slotwise.accepted  # the factor reaches the backward pass

        (wanted, accepted), gradients = jax.value_and_grad(dense, (0, 1), has_aux=True)(hidden, head)
        (found, ours), our_gradients = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
        assert float(found) == pytest.approx(3 * float(wanted), rel=1e-10)
        np.testing.assert_allclose(ours, accepted, atol=1e-10)
        for a, b in zip(our_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, 3 * b, atol=1e-10)


def test_no_vocabulary_wide_array_outlives_its_chunk():
    """In the compiled gradient no buffer holds B x M x K x D numbers, or half of them."""
    hidden, head, taught = jax.tree.map(lambda x: x, case())
    recipe = Recipe((((1.0, "soft_ce")),), False, jnp.float32, 1)
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: chunked_loss(recipe, h, w, taught)[0], (0, 1)))(hidden, head)
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    assert max(sizes) < K * B * M * D / 2


def test_unknown_loss_is_named():
    with pytest.raises(UserError, match="soft_cee"):
        parse_loss("soft_cee")
    with pytest.raises(UserError, match="not a number"):
        parse_loss("x*kl")


def test_the_heads_gradient_is_made_in_pieces_that_no_mesh_splits(monkeypatch):
    """The last piece is a narrow one; where the vocabulary is split, no device gathers what the others summed."""
    width, entries = 130, 64
    hidden = jax.random.normal(jax.random.key(0), (2, 3, width))
    dlogits = jax.random.normal(jax.random.key(1), (2, 3, entries))
    sums = jnp.ones((width, entries))
    wanted = chunked._with_product(sums, hidden, dlogits)
    monkeypatch.setattr(chunked, "_LARGEST_PRODUCT", sums.size // 2)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    split, split_logits = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "tensor"), (None, None, "tensor"))
    )
    given = jax.device_put(sums, split), hidden, jax.device_put(dlogits, split_logits)
    run = jax.jit(chunked._with_product, out_shardings=split).lower(*given).compile()
    assert "all-gather" not in run.as_text()
    np.testing.assert_allclose(run(*given), wanted, rtol=1e-5, atol=1e-6)  # sums of six products near 1
