"""Which of a draft's parameters are trained: all, all but the head, or adapters beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle import drafts
from jeagle.config import DraftConfig
from jeagle.drafts import Eagle3
from jeagle.run import assemble
from jeagle.run.parameters import Trained, path_names
from jeagle.training.optimiser import stop_frozen_gradients
from tests.exchange.drafts import PLAIN


def test_adapters_start_as_the_draft_train_alone_and_merge():
    _, state = nnx.split(Eagle3(PLAIN, jnp.float32, nnx.Rngs(0)))
    tree = drafts.add_adapters(state, 2, jax.random.key(1))
    named = lambda s: assemble.flat_draft(s)  # noqa: E731
    for name, array in named(drafts.with_adapters(tree)).items():
        np.testing.assert_array_equal(array, named(state)[name])
    assert drafts.with_adapters(state) is state

    moved = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), tree["lora"])
    weight = lambda t: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(drafts.with_adapters(t)))  # noqa: E731
    gradient = jax.grad(weight)({"base": state, "lora": moved})
    assert not any(np.any(x) for x in jax.tree.leaves(gradient["base"]))
    assert all(np.any(x) for x in jax.tree.leaves(gradient["lora"]))

    flat = {f"base.{name}": np.asarray(x) for name, x in named(state).items()}
    paths, _ = jax.tree_util.tree_flatten_with_path(moved)
    flat |= {"lora." + ".".join(path_names(jax.tree_util.keystr(p))): np.asarray(x) for p, x in paths}
    merged, whole = drafts.merge_adapters(flat), named(drafts.with_adapters({"base": state, "lora": moved}))
    assert sorted(merged) == sorted(whole)
    for name, array in whole.items():
        np.testing.assert_allclose(merged[name], array, atol=1e-6)
    assert np.linalg.matrix_rank(merged["fc"] - np.asarray(named(state)["fc"]), tol=1e-4) == 2
    np.testing.assert_array_equal(merged["lm_head"], named(state)["lm_head"])


def test_which_parameters_are_trained():
    everything, frozen, lora = (assemble.trained(DraftConfig(**d)) for d in ({}, {"train_head": False}, {"lora": 2}))
    assert everything(("lm_head",)) and not frozen(("lm_head",)) and frozen(("layers", "0", "norm"))
    assert lora(("lora", "fc", "down")) and not lora(("base", "fc"))


def test_no_gradient_reaches_a_head_that_is_held():
    draft = {"fc": jnp.ones(3), "lm_head": jnp.ones(3)}
    squares = lambda draft: sum(jnp.sum(x**2) for x in draft.values())  # noqa: E731
    gradient = jax.grad(lambda draft: squares(stop_frozen_gradients(draft, Trained(head=False))))(draft)
    assert not gradient["lm_head"].any() and (gradient["fc"] == 2).all()
