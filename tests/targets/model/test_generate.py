"""Generation gives the tokens of a loop over full forward passes, for any batch, order and mesh."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import targets
from jeagle.errors import UserError
from jeagle.runtime.mesh import make_mesh
from jeagle.runtime.sampling import Sampling, eligible_tokens, sample_tokens
from jeagle.targets.model.generate import _Generation

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ["llama", "gemma3", "gpt_oss", "deepseek_v2", "qwen3_next", "gemma4_shared_kv"]
SAMPLED = Sampling(temperature=0.8, top_p=0.9, top_k=30)
SEED, END, ROOM = 11, 2, 80
MESHES = {"llama": (4, 2, 1), "deepseek_v2": (2, 2, 2), "qwen3_next": (2, 2, 2)}  # fsdp, tensor, expert


@functools.lru_cache(maxsize=2)
def loaded(case: str, mesh: tuple[int, int, int] = (1, 1, 1)) -> targets.Target:
    fsdp, tensor, expert = mesh
    devices = jax.devices()[: fsdp * tensor * expert]
    laid = make_mesh(fsdp=fsdp, tensor=tensor, expert=expert, devices=devices)
    return targets.load_target(targets.open_weights(targets.resolve(str(GOLDENS / case))), laid, "float32")


class Asked(NamedTuple):
    """Prompts shorter and longer than a padding bucket, and the limit of each answer in tokens."""

    prompts: list[np.ndarray]
    limits: list[int]


def asked() -> Asked:
    rng = np.random.default_rng(7)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 63, 64, 65]
    prompts = [rng.integers(3, 48, n).astype(np.int32) for n in lengths]
    return Asked(prompts, [int(n) for n in rng.permutation([1, 2, 3, 5, 7, 8, 9, 11, 12, 14, 15])])


def answers(target: targets.Target, prompts, limits, batch: int, **how) -> dict[int, targets.GeneratedAnswer]:
    found = targets.generate(
        target, prompts, end_token_ids=(END,), max_new_tokens=limits, batch=batch, seed=SEED, **how
    )
    return {answer.index: answer for answer in found}


def logits_behind(target: targets.Target, texts: list[np.ndarray]) -> np.ndarray:
    """Logits [N, ROOM, V] of full forward passes, without a cache."""
    tokens = np.zeros((len(texts), ROOM), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    segments = np.array([[1] * len(t) + [0] * (ROOM - len(t)) for t in texts])
    model = target.model()
    positions = jnp.broadcast_to(jnp.arange(ROOM), tokens.shape)
    run = jax.jit(lambda t, p, s: model.logits(model.forward(t, p, s, ())[1]))
    return np.asarray(run(tokens, positions * segments, segments))


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_a_loop_over_full_forwards(case, sampling):
    """Each token is the one that its own key chooses from the logits of a full forward pass over the text before it."""
    target, (prompts, limits) = loaded(case), asked()
    found = answers(target, prompts, limits, batch=4, sampling=sampling)
    assert sorted(found) == list(range(len(prompts)))
    logits = logits_behind(target, [np.concatenate([p, found[i].tokens]) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        tokens = found[i].tokens.tolist()
        key = jax.random.fold_in(jax.random.key(SEED), i)
        keys = jnp.stack([jax.random.fold_in(key, place) for place in range(len(tokens))])
        here = logits[i, len(prompt) - 1 :][: len(tokens)]
        assert tokens == np.asarray(sample_tokens(jnp.asarray(here), keys, sampling)).tolist()
        ended = tokens[-1] == END
        assert found[i].finish_reason == ("stop" if ended else "length") and END not in tokens[:-1]
        assert ended or len(tokens) == limits[i]


@pytest.mark.parametrize("case", ["llama", "qwen3_next"])
def test_an_answer_does_not_depend_on_batch_neighbours_or_order(case):
    target, (prompts, limits) = loaded(case), asked()
    all_of_them = answers(target, prompts, limits, batch=3, sampling=SAMPLED)
    chosen = [9, 2, 6, 0]
    some = answers(
        target, [prompts[i] for i in chosen], [limits[i] for i in chosen], 16, sampling=SAMPLED, numbers=chosen
    )
    for place, i in enumerate(chosen):
        np.testing.assert_array_equal(some[place].tokens, all_of_them[i].tokens)
        assert some[place].finish_reason == all_of_them[i].finish_reason


def test_another_seed_or_number_gives_another_answer():
    target, (prompts, _) = loaded("llama"), asked()
    twice = answers(target, [prompts[5]] * 2, 15, 4, sampling=Sampling(temperature=2.0))
    assert twice[0].tokens.tolist() != twice[1].tokens.tolist()
    same = answers(target, [prompts[5]] * 2, 15, 4, sampling=Sampling(temperature=2.0), numbers=[1, 1])
    assert same[0].tokens.tolist() == same[1].tokens.tolist() == twice[1].tokens.tolist()
    other = targets.generate(
        target, [prompts[5]], end_token_ids=(), max_new_tokens=15, batch=1, sampling=Sampling(2.0), seed=SEED + 1
    )
    assert next(other).tokens.tolist() != twice[0].tokens.tolist()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("case", MESHES)
def test_eight_devices_write_what_one_writes(case):
    prompts, limits = asked()
    one = answers(loaded(case), prompts, limits, batch=4, sampling=SAMPLED)
    eight = answers(loaded(case, MESHES[case]), prompts, limits, batch=4, sampling=SAMPLED)
    for i in one:
        np.testing.assert_array_equal(eight[i].tokens, one[i].tokens)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("case", MESHES)
def test_the_cache_is_split_like_the_model(case):
    """Rows are split over fsdp and heads over tensor, before and after a step; a latent's only head is not split."""
    fsdp, tensor, _ = MESHES[case]
    prompts, limits = asked()
    run = _Generation(loaded(case, MESHES[case]), prompts, limits, range(11), (END,), 3, SAMPLED, 0)
    assert run.batch == -(-3 // fsdp) * fsdp
    for _ in range(2):
        leaves = jax.tree_util.tree_leaves_with_path(run.state.cache)
        assert leaves
        for path, leaf in leaves:
            name = str(path[-1])
            heads = tensor if case != "deepseek_v2" and name in (".keys", ".values", ".states") else 1
            assert leaf.addressable_shards[0].data.size * fsdp * heads == leaf.size, name
        next(run.run(None, None), None)


def test_stop_strings_end_an_answer_where_they_stand():
    """The host decides where an answer ends, in whichever group of steps that is."""
    target, (prompts, _) = loaded("llama"), asked()
    free = answers(target, prompts, 30 - 15, batch=4)
    seen: list[int] = []

    def third(tokens: np.ndarray) -> int | None:
        seen.append(len(tokens))
        return 3 if len(tokens) >= 3 else None

    cut = answers(target, prompts, 15, batch=4, stops=third)
    assert max(seen) > 3  # it is asked after a chunk of steps, and cuts within it
    for i, answer in free.items():
        assert cut[i].tokens.tolist() == answer.tokens[:3].tolist()
        assert cut[i].finish_reason == ("stop" if len(answer.tokens) >= 3 else answer.finish_reason)


def test_samples_follow_the_distribution():
    """30,000 draws over 6 tokens: chi-square below its 1 - 1e-4 quantile (5 and 2 degrees of freedom)."""
    logits = jnp.asarray([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    count = 30_000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(count))
    for sampling, allowed, limit in ((Sampling(0.7), 6, 25.7), (Sampling(1.3, top_k=3), 3, 18.4)):
        drawn = np.asarray(sample_tokens(jnp.broadcast_to(logits, (count, 6)), keys, sampling))
        shares = np.exp(np.asarray(logits)[:allowed] / sampling.temperature)
        expected = count * shares / shares.sum()
        counts = np.bincount(drawn, minlength=6)
        assert counts[allowed:].sum() == 0
        assert ((counts[:allowed] - expected) ** 2 / expected).sum() < limit


def reference_cut(logits: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """The tokens that top-k and then top-p leave, one row at a time."""
    kept = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits.astype(np.float64)):
        order = np.argsort(-values, kind="stable")[: top_k or len(values)]
        shares = np.exp(values[order] - values.max())
        total = 0.0
        for token, share in zip(order, shares / shares.sum(), strict=True):
            kept[row, token] = total < top_p
            total += share
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_eligible_tokens_equal_a_reference(top_p, top_k):
    rng = np.random.default_rng(top_k)
    logits = rng.standard_normal((20, 100)).astype(np.float32) * 3
    logits[:5] = np.round(logits[:5])  # ties: the lower id comes first
    np.testing.assert_array_equal(
        np.asarray(eligible_tokens(jnp.asarray(logits), top_p, top_k)), reference_cut(logits, top_p, top_k)
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((-1.0,), "temperature"),
        ((float("nan"),), "temperature"),
        ((1.0, 0.0), "top_p"),
        ((1.0, 1.5), "top_p"),
        ((1.0, 1.0, -1), "top_k"),
    ],
)
def test_invalid_sampling_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        Sampling(*values)


def test_prompts_that_cannot_be_answered_are_refused():
    target, some = loaded("llama"), np.array([5], np.int32)
    for prompts, limits, said in (
        ([some[:0]], 4, "no tokens"),
        ([some, np.full(510, 5, np.int32)], [4, 4], "510 tokens and 4 new ones exceed"),
        ([some], 0, "above 0"),
    ):
        with pytest.raises(UserError, match=said):
            next(targets.generate(target, prompts, end_token_ids=(), max_new_tokens=limits, batch=1))
