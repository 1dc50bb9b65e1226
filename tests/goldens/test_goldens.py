"""Losses, counts and gradients of the peers' own training steps, reproduced."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jeagle import align
from jeagle.config import TrainConfig
from jeagle.drafts import Eagle3, unroll
from jeagle.interfaces import Features, Tables
from jeagle.objective import LOSSES, objective, resolve_objective
from jeagle.objective.losses import TeacherProbs
from jeagle.training.optimiser import learning_rate, make_optimiser
from tests.goldens import cases


def _torch_leaf(path: tuple, weights: dict[str, np.ndarray]) -> np.ndarray:
    name = ".".join(map(str, path))
    for suffix in ("q", "k", "v", "o"):
        name = name.replace(f"{suffix}_bias", f"{suffix}_proj.bias")
    name = name if name.endswith(".bias") else f"{name}.weight"
    array = weights[name]
    return array.T if array.ndim == 2 and name != "lm_head.weight" else array


def build(case: cases.Case):
    """-> (graphdef, state) of the case's draft, weights in place."""
    draft = Eagle3(case.spec, jnp.float32, nnx.Rngs(0))
    graphdef, state = nnx.split(draft)
    leaves = [
        (path, leaf.replace(jnp.asarray(_torch_leaf(path, case.weights)))) for path, leaf in nnx.to_flat_state(state)
    ]
    for path, leaf in nnx.to_flat_state(state):
        assert leaf.get_value().shape == _torch_leaf(path, case.weights).shape, path
    return graphdef, nnx.from_flat_state(leaves)


def loss_function(case: cases.Case, spec):
    """-> (a function of the draft's state, that state): the case's whole training loss."""
    graphdef, state = build(case)
    batch = jax.tree.map(jnp.asarray, case.batch)
    logits = case.last_BTH.astype(np.float64) @ case.target_head_VH.astype(np.float64).T
    features = Features(
        jnp.asarray(case.aux_BTAH),
        jnp.asarray(case.last_BTH),
        jnp.asarray(logits.argmax(-1), jnp.int32),
        jnp.asarray(jax.nn.logsumexp(logits, axis=-1), jnp.float32),
    )
    tables = Tables(
        jnp.asarray(case.weights["embed_tokens.weight"]),
        jnp.asarray(case.target_head_VH[case.draft_to_target]),
        jnp.asarray(case.draft_to_target, jnp.int32),
    )
    counts = align.counting_slots(batch, case.steps, spec.slots, cross_documents=spec.cross_documents)
    shape = batch.tokens_BT.shape
    everywhere = align.Selected(jnp.broadcast_to(jnp.arange(shape[1]), shape), jnp.ones(shape, bool))

    def loss(state):
        predictions = unroll(
            graphdef,
            state,
            batch,
            features.aux_BTAH,
            tables.embed_VW[batch.tokens_BT],
            everywhere,
            counts,
            cross_documents=spec.cross_documents,
            fixed_window=spec.fixed_window,
        )
        head = nnx.merge(graphdef, state).lm_head[...]
        return objective(
            spec, predictions, features, batch, tables, head, everywhere, dtype=jnp.float32, slots=everywhere
        )

    return loss, state


def run(case: cases.Case, spec):
    """-> (loss, metrics, gradients by path)."""
    loss, state = loss_function(case, spec)
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    named = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(grads)}
    return float(value), jax.tree.map(np.asarray, metrics), named


def check_gradients(case: cases.Case, named: dict) -> None:
    assert case.grads
    for path, ours in named.items():
        try:
            theirs = _torch_leaf(path, case.grads)
        except KeyError:
            continue  # frozen in the peer
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale + 1e-9, rtol=0, err_msg=str(path))


@pytest.mark.parametrize("path", cases.case_files("specforge"), ids=lambda p: p.stem)
def test_specforge(path: Path):
    case = cases.specforge(path)
    spec = resolve_objective("specforge", **case.switches)
    loss, metrics, named = run(case, spec)
    assert loss == pytest.approx(float(case.arrays["total_loss"]), abs=1e-5)
    np.testing.assert_allclose(metrics.loss, case.arrays["plosses"], atol=1e-5)
    np.testing.assert_array_equal(metrics.correct, case.arrays["acc_corrects"])
    np.testing.assert_array_equal(metrics.counting, case.arrays["acc_denoms"])
    rates = metrics.accepted / np.maximum(metrics.trained, 1)
    np.testing.assert_allclose(rates, case.arrays["acceptance_rates"], atol=1e-5)
    check_gradients(case, named)


def contiguous(case: cases.Case, spec) -> bool:
    """Whether a slot that counts at step k counted at all earlier ones. Over a gap in the mask speculators goes on
    comparing tokens that carry no loss, which jeagle does not compute."""
    counts = align.counting_slots(case.batch, case.steps, spec.slots, cross_documents=spec.cross_documents, xp=np)
    return bool((counts[1:] <= counts[:-1]).all())


def _speculators_loss(text: str) -> str:
    terms = json.loads(text) if text.startswith("{") else {text: 1.0}
    return "+".join(f"{weight}*{name}" for name, weight in terms.items())


PEER_LOSSES = {
    "kl_div": "kl",
    "reverse_kl_div": "reverse_kl",
    "js_div": "js",
    "ce": "hard_ce",
    "tv": "tv",
    "neg_log_acceptance": "nla",
    "lk_hybrid": "lk",
}


@pytest.mark.parametrize("theirs", PEER_LOSSES)
def test_losses_and_their_gradients_are_speculators(theirs):
    z = np.load(next(p for folder in cases.folders() for p in folder.glob("losses.npz")))
    logits, probs = jnp.asarray(z["logits"]), jax.nn.softmax(jnp.asarray(z["targets"]), axis=-1)
    loss = LOSSES[PEER_LOSSES[theirs]]
    value, back = jax.vjp(lambda logits: loss(logits, TeacherProbs(probs, probs)), logits)
    np.testing.assert_allclose(value, z[f"elem/{theirs}"], atol=1e-5)
    np.testing.assert_allclose(back(jnp.ones_like(value))[0], z[f"grad/{theirs}"], atol=1e-5)


@pytest.mark.parametrize("path", cases.case_files("speculators"), ids=lambda p: p.stem)
def test_speculators(path: Path):
    case = cases.speculators(path)
    spec = resolve_objective("speculators", decay=case.switches["decay"], loss=_speculators_loss(case.switches["loss"]))
    loss, metrics, named = run(case, spec)
    assert loss == pytest.approx(float(case.arrays["loss"]), abs=1e-5)
    steps = range(case.steps)
    losses = [float(case.arrays[f"metric/loss_{k}_sum"]) for k in steps]
    decayed = metrics.loss * spec.decay ** np.arange(case.steps)
    np.testing.assert_allclose(decayed, losses, atol=1e-5)
    np.testing.assert_array_equal(metrics.counting, [case.arrays[f"metric/full_acc_{k}_total"] for k in steps])
    if contiguous(case, spec):
        np.testing.assert_array_equal(metrics.prefix_correct, [case.arrays[f"metric/full_acc_{k}_sum"] for k in steps])
    check_gradients(case, named)


def optimiser_tables() -> Path:
    return next(p for folder in cases.folders() for p in folder.glob("o1_optimizer_on_c3.npz"))


def test_optimiser_follows_specforge_for_six_steps():
    """o1: clip, AdamW and float32 masters of the real optimiser on c3, at the learning rates that it took."""
    z = np.load(optimiser_tables())
    settings = cases.load_json(z["hparams_json"])
    case = cases.specforge(optimiser_tables().with_name("c3_pad_batch2_ttt7.npz"))
    config = TrainConfig(clip=settings["max_grad_norm"], weight_decay=settings["weight_decay"])
    rates = jnp.asarray(z["traj/lr"])
    optimiser = make_optimiser(config, lambda step: rates[jnp.minimum(step, len(rates) - 1)])
    spec = resolve_objective("specforge", **case.switches)
    loss, state = loss_function(case, spec)

    @jax.jit
    def step(state, moments):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        updates, moments = optimiser.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value, optax.tree.norm(gradient)

    moments = optimiser.init(state)
    for i in range(6):
        state, moments, value, norm = step(state, moments)
        assert float(value) == pytest.approx(z["traj/loss"][i], abs=2e-5)
        assert float(norm) == pytest.approx(z["traj/grad_norm"][i], rel=1e-3)
        if i + 1 in (1, 6):
            kept = {
                k.split("/", 1)[1].replace("midlayer.", "layers.0."): z[k]
                for k in z.files
                if k.startswith(f"after{i + 1}/")
            }
            for path, leaf in nnx.to_flat_state(state):
                theirs = _torch_leaf(path, kept)
                # Adam moves an entry whose gradient is rounding noise by up to the learning rate, in either direction.
                off = np.abs(np.asarray(leaf.get_value()) - theirs)
                assert np.quantile(off, 0.99) < 2e-5 and off.max() < 3 * rates[: i + 1].sum(), path


def test_schedule_is_the_intended_law():
    """Linear warm-up, then a cosine to zero; the constant one as SpecForge's own table has it."""
    z = np.load(optimiser_tables())
    for table, steps, warmup in (("a", 10, 0.2), ("b", 200, 0.015)):
        theirs = z[f"sched/{table}_constant_total{steps}_warm{warmup}"]
        peak, ramp = float(theirs.max()), round(warmup * steps)
        config = TrainConfig(learning_rate=peak, warmup=warmup)
        ours = [float(learning_rate(config, steps)(s)) for s in range(steps)]
        law = [
            peak * (s + 1) / ramp if s < ramp else peak * (1 + np.cos(np.pi * (s - ramp) / (steps - ramp))) / 2
            for s in range(steps)
        ]
        np.testing.assert_allclose(ours, law, rtol=1e-5, atol=1e-6 * peak)  # float32 at the peak
        constant = dataclasses.replace(config, schedule="constant")
        ours = [float(learning_rate(constant, steps)(s)) for s in range(steps)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
