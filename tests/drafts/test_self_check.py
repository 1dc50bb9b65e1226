"""The check of an attention kernel before a run uses it: correct kernels pass, each planted fault is reported."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jeagle.drafts.ttt_attention import kernel_fault, op, self_check

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 16}
RIGHT = op.BACKENDS["chunked"]


@pytest.fixture
def small(monkeypatch):
    for name, size in {"LENGTH": 60, "SLOTS": 36, "WINDOW": 10}.items():
        monkeypatch.setattr(self_check, name, size)


def with_inputs(wrong, passes=("forward", "backward")):
    """Backend passes that get wrong inputs."""
    return RIGHT._replace(
        **{name: lambda inputs, *more, _name=name: getattr(RIGHT, _name)(wrong(inputs), *more) for name in passes}
    )


def moved(first: int, last: int, *passes: str):
    return with_inputs(
        lambda p: p._replace(first_BN=p.first_BN + first, last_BN=p.last_BN + last), *((passes,) if passes else ())
    )


def row_0(inputs):
    return inputs._replace(
        **{
            name: jnp.broadcast_to(x[:1], x.shape)
            for name in ("first_BN", "keys_BGTC")
            for x in [getattr(inputs, name)]
        }
    )


def other_groups():
    """Key heads that are taken in turns, instead of each by heads that lie side by side."""

    def turned(x):
        return x.reshape(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]).swapaxes(1, 2)

    def back(x):
        return x.swapaxes(1, 2).reshape(x.shape)

    def forward(past):
        return tuple(map(back, RIGHT.forward(past._replace(queries_BGRNC=turned(past.queries_BGRNC)))))

    def backward(past, *rows):
        given = past._replace(queries_BGRNC=turned(past.queries_BGRNC)), *map(turned, rows)
        dqueries, *rest = RIGHT.backward(*given)
        return back(dqueries), *rest

    return RIGHT._replace(forward=forward, backward=backward)


def one_head(past, *rows):
    """Gradients of keys from the first head of a group alone."""
    first = past._replace(queries_BGRNC=past.queries_BGRNC[:, :, :1]), *(x[:, :, :1] for x in rows)
    return RIGHT.backward(past, *rows)[0], *RIGHT.backward(*first)[1:]


def blank_is_nan(past):
    mixed, top, total = RIGHT.forward(past)
    return mixed, top, jnp.where((past.first_BN > past.last_BN)[:, None, None, :, None], jnp.nan, total)


def base_two(past):
    mixed, top, total = RIGHT.forward(past)
    return mixed, top / jnp.log(2.0), total


FAULTS = {
    "does not see its own position": moved(0, -1),
    "sees the next position": moved(0, 1),
    "sees the end of another document": moved(-1, 0),
    "misses its document's first": moved(1, 0),
    "backward alone": moved(0, -1, "backward"),
    "no window": with_inputs(lambda p: p._replace(first_BN=jnp.where(p.first_BN < 20, 0, 20))),
    "every row is the first": with_inputs(row_0),
    "sees its last where it sees nothing": with_inputs(
        lambda p: p._replace(first_BN=jnp.minimum(p.first_BN, p.last_BN))
    ),
    "no number where it sees nothing": RIGHT._replace(forward=blank_is_nan),
    "queries of other groups": other_groups(),
    "keys' gradient from one head": RIGHT._replace(backward=one_head),
    "normaliser's gradient left out": RIGHT._replace(
        backward=lambda past, dout, lse, taken: RIGHT.backward(past, dout, lse, 0 * taken)
    ),
    "largest score to another base": RIGHT._replace(forward=base_two),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_refused(fault, small, monkeypatch):
    monkeypatch.setitem(op.BACKENDS, "gpu", FAULTS[fault])
    assert " is off by " in kernel_fault("gpu", "bfloat16", **HEADS)


@pytest.mark.parametrize("name", ["_own_gradient", "_own_sum", "_own_scores"])
def test_wrong_own_keys_are_refused(name, small, monkeypatch):
    right = getattr(op, name)
    wrong = {
        "_own_gradient": lambda weights, slotwise: right(weights[:, :, :, :1], slotwise[:, :, :1]),
        "_own_sum": lambda weights, own: right(weights, own[::-1]),
        "_own_scores": lambda inputs, queries: right(
            inputs._replace(own_allowed_J=inputs.own_allowed_J | True), queries
        ),
    }
    monkeypatch.setattr(op, name, wrong[name])
    assert " is off by " in kernel_fault("chunked", "bfloat16", **HEADS)


def test_the_plain_code_passes(small):
    assert kernel_fault("chunked", "bfloat16", **HEADS) == ""


@pytest.mark.parametrize("backend", ["tpu_interpreted", "gpu_interpreted"])
def test_the_kernels_pass(backend, monkeypatch):
    monkeypatch.setattr(self_check, "LENGTH", 256)  # two blocks of keys, and of slots on a GPU
    monkeypatch.setattr(self_check, "SLOTS", 128)
    assert kernel_fault(backend, "bfloat16", heads=2, kv_heads=1, head_dim=64) == ""


def test_a_kernel_that_does_not_run_is_not_trusted():
    assert "does not run" in kernel_fault("gpu", "bfloat16", heads=2, kv_heads=1, head_dim=64)
