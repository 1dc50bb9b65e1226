"""Draft trees against a reference in plain Python, and the distribution of sampled texts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jeagle import decoding
from jeagle.decoding import Decoding, TreeShape
from jeagle.decoding.tree import accept_path, choose_nodes, make_tree, tree_view
from jeagle.errors import UserError
from jeagle.runtime.sampling import Sampling

VOCAB = 5


def toy_models(target_logits, draft_logits) -> decoding.Models:
    """Models without memory: the next token depends on the last one alone, through a table of logits [V, V]."""
    target, draft = jnp.asarray(target_logits), jnp.asarray(draft_logits)
    one_hot = lambda tokens: jax.nn.one_hot(tokens, VOCAB)  # noqa: E731
    return decoding.Models(
        target_cache=lambda _, rows, room, rollback: (),
        read=lambda w, cache, tokens, positions, count, view: (one_hot(tokens), one_hot(tokens)[:, :, None], cache),
        logits=lambda w, last: last @ target,
        move_slots=lambda w, cache, source, to: cache,
        draft_cache=lambda w, rows, room: (),
        fuse=lambda w, aux: aux[:, :, 0],
        draft=lambda w, cache, hidden, tokens, positions, view: (one_hot(tokens), one_hot(tokens), cache),
        draft_logits=lambda w, for_head: for_head @ draft,
        draft_ids=lambda w: jnp.arange(VOCAB),
    )


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    return target, target + rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)


def reference_tree(draft: np.ndarray, root: int, shape: TreeShape) -> set[tuple[int, ...]]:
    """The texts of the tree's nodes: of all expanded candidates the most likely ones, as EAGLE-2 draws it."""
    log_q = draft - np.log(np.exp(draft).sum(axis=1, keepdims=True))
    best = lambda texts, count: sorted(texts, key=lambda text: -texts[text])[:count]  # noqa: E731
    level, candidates = {(): 0.0}, {}
    for _ in range(shape.steps):
        children = {}
        for text, score in level.items():
            after = log_q[text[-1] if text else root]
            for token in np.argsort(-after)[: shape.top_k].tolist():
                children[(*text, token)] = score + float(after[token])
        candidates |= children
        level = {text: children[text] for text in best(children, shape.top_k)}
    return set(best(candidates, shape.verify - 1))


@pytest.mark.parametrize("sizes", [(1, 3, 3), (2, 2, 6), (3, 3, 8), (4, 2, 15)])
def test_the_tree_holds_the_most_likely_texts(sizes, one_device):
    shape, (target, draft), seen = TreeShape(*sizes), tables(sum(sizes)), []

    def read(w, cache, tokens, positions, count, view):
        if view is not None:
            jax.debug.callback(lambda *arrays: seen.append(arrays), tokens, positions)
        return jax.nn.one_hot(tokens, VOCAB), jax.nn.one_hot(tokens, VOCAB)[:, :, None], cache

    decoding.decode_speculative(
        toy_models(target, draft)._replace(read=read),
        None,
        [np.array([root], np.int32) for root in range(VOCAB)],
        decoding=Decoding(shape),
        max_new_tokens=2,
        end_token_ids=(),
        batch=VOCAB,
    )
    jax.effects_barrier()
    for root, tokens, positions in zip(range(VOCAB), *(array.tolist() for array in seen[0]), strict=True):
        first = int(np.argmax(target[root]))
        assert tokens[0] == first
        expected = reference_tree(draft, first, shape)
        assert sorted(p - positions[0] for p in positions[1:]) == sorted(map(len, expected))
        assert sorted(tokens[1:]) == sorted(text[-1] for text in expected)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), nodes=st.integers(2, 9))
def test_the_accepted_path_is_the_one_that_the_targets_choices_follow(data, nodes):
    parents = [0] + [data.draw(st.integers(0, i - 1)) for i in range(1, nodes)]
    tokens = [0] + [data.draw(st.integers(0, 2)) for _ in range(1, nodes)]
    used = {}
    for i in range(1, nodes):  # siblings differ, as the most likely tokens do
        while tokens[i] in used.setdefault(parents[i], set()):
            tokens[i] += 1
        used[parents[i]].add(tokens[i])
    chosen = [data.draw(st.integers(0, 3)) for _ in range(nodes)]
    path = [0]
    while child := [i for i in range(1, nodes) if parents[i] == path[-1] and tokens[i] == chosen[path[-1]]]:
        path.append(child[0])
    tree = make_tree(jnp.array([tokens]), jnp.array([parents]), nodes - 1)
    accepted = accept_path(tree, jnp.array([chosen]), nodes - 1)
    assert int(accepted.count_B[0]) == len(path) - 1
    assert accepted.path_BS[0, : len(path)].tolist() == path


def test_a_token_of_a_tree_sees_the_text_before_it_and_its_ancestors():
    tree = make_tree(jnp.array([[9, 1, 2, 3]]), jnp.array([[0, 0, 0, 1]]), 2)
    first = jnp.array([3])
    view = tree_view(first, first[:, None] + jnp.arange(4), tree.depth_BN, tree.ancestors_BNN, 9)
    assert view.slots_BT.tolist() == [[3, 4, 5, 6]]
    assert view.key_positions_BS[0, :7].tolist() == [0, 1, 2, 3, 4, 4, 5]
    seen = [[s for s in range(9) if view.visible_BTS[0, t, s]] for t in range(4)]
    assert seen == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 6]]


def test_a_child_that_is_as_likely_as_its_parent_does_not_replace_it():
    shape = TreeShape(2, 2, 3)
    tree = choose_nodes(
        jnp.array([7]),
        jnp.array([[1, 2, 3, 4, 5, 6]]),
        jnp.array([[6, 6, 0, 0, 1, 1]]),
        jnp.array([[0.0, -9.0, 0.0, -9.0, -9.0, -9.0]]),
        shape,
    )
    assert tree.tokens_BN.tolist() == [[7, 1, 3]] and tree.parents_BN.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("sizes", [(0,), (3, 0), (3, 1, 5), (2, 2, 8), (2, 2, 1)])
def test_sizes_that_no_tree_can_have_are_refused(sizes):
    with pytest.raises(UserError):
        TreeShape(*sizes)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic divided by what a right distribution stays below in all but one of 10^5 tests."""
    kept = expected > 0
    assert counts[~kept].sum() == 0
    freedom = kept.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.27 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum() / limit)


def text_counts(how: Decoding, draws: int, seed: int, models: decoding.Models, tokens: int = 3) -> np.ndarray:
    """How often each text of `tokens` tokens after the prompt [0] was decoded."""
    answers = decoding.decode_speculative(
        models,
        None,
        [np.zeros(1, np.int32)] * draws,
        decoding=how,
        max_new_tokens=tokens,
        end_token_ids=(),
        batch=draws,
        seed=seed,
    )
    texts = np.array([answer.tokens for answer in answers])
    return np.bincount(texts @ VOCAB ** np.arange(tokens), minlength=VOCAB**tokens)


def text_probabilities(target: np.ndarray, sampling: Sampling, tokens: int = 3) -> np.ndarray:
    """The exact probability of each such text."""
    p = np.exp(target.astype(np.float64) / sampling.temperature)
    p /= p.sum(axis=1, keepdims=True)
    if sampling.top_k:
        p = np.where(p >= np.sort(p, axis=1)[:, [-sampling.top_k]], p, 0.0)
        p /= p.sum(axis=1, keepdims=True)
    probabilities = np.ones(1)
    texts = np.arange(VOCAB**tokens)
    last, probabilities = np.zeros_like(texts), np.ones(len(texts))
    for place in range(tokens):
        token = texts // VOCAB**place % VOCAB
        probabilities = probabilities * p[last, token]
        last = token
    return probabilities


HOW = {
    "chain": Decoding(TreeShape(2), Sampling(1.0)),
    "chain, top-k": Decoding(TreeShape(2), Sampling(0.7, top_k=3)),
    "tree": Decoding(TreeShape(2, 2, 5), Sampling(1.0)),
    "rejection": Decoding(TreeShape(2), Sampling(1.0), "rejection"),
    "rejection, top-k": Decoding(TreeShape(2), Sampling(0.7, top_k=3), "rejection"),
}
DRAWS = 20_000


@pytest.mark.parametrize("kind", HOW)
def test_sampled_texts_have_the_targets_distribution(kind, one_device):
    how, (target, draft) = HOW[kind], tables(3)
    counts = text_counts(how, DRAWS, 1, toy_models(target, draft))
    assert chi_square(counts, DRAWS * text_probabilities(target, how.sampling)) < 1


def test_the_test_of_the_distribution_sees_a_draft_that_is_believed(one_device, monkeypatch):
    """A fault: the draft's probabilities are taken for the target's when a drafted token is judged."""
    target, draft = tables(3)
    models = toy_models(target, draft)
    wrong = models._replace(
        logits=lambda w, last: jnp.where(last.shape[1] > 1, last @ jnp.asarray(draft), last @ jnp.asarray(target))
    )
    counts = text_counts(HOW["rejection"], DRAWS, 1, wrong)
    assert chi_square(counts, DRAWS * text_probabilities(target, Sampling(1.0))) > 1


def test_rejection_accepts_what_the_two_distributions_share(one_device):
    """A first drafted token is accepted with probability sum(min(p, q)), averaged over the text's first token."""
    target, draft = tables(3)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)  # noqa: E731
    p, q = softmax(target.astype(np.float64)), softmax(draft.astype(np.float64))
    expected = float(p[0] @ np.minimum(p, q).sum(axis=1))
    answers = decoding.decode_speculative(
        toy_models(target, draft),
        None,
        [np.zeros(1, np.int32)] * DRAWS,
        decoding=Decoding(TreeShape(1), Sampling(1.0), "rejection"),
        max_new_tokens=2,
        end_token_ids=(),
        batch=DRAWS,
    )
    assert abs(np.mean([answer.rounds[0] for answer in answers]) - expected) < 5 * 0.5 / math.sqrt(DRAWS)
