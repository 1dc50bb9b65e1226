"""Parameters read one at a time from a checkpoint equal those read all at once, whatever else training saved."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import drafts
from jeagle.exporting.run_reader import _draft_params, open_checkpoint
from jeagle.features import Storage
from jeagle.run.parameters import served_params
from jeagle.runtime.checkpoints import Checkpoints, load_named
from jeagle.training.step import TrainState


class Averaging(NamedTuple):
    """The state of optax's schedule_free: z is the iterate that takes the steps."""

    z: Any
    count: Any


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "fc": normal(6, 4),
        "layers": [{"norm": normal(4), "mlp": {"up_proj": normal(4, 5)}}],
        "lm_head": normal(5, 4),
    }


def adapted() -> dict:
    down, up = jnp.ones((6, 2)), jnp.asarray(np.arange(8.0).reshape(2, 4), jnp.float32)
    return {"base": tree(0), "lora": {"fc": {"down": down, "up": up}}}


STATES = {
    "trained": TrainState(tree(0), {"mu": tree(1), "nu": tree(2)}, jnp.int32(3), jnp.int32(0)),
    "a moving average": TrainState(tree(0), {"mu": tree(1)}, jnp.int32(3), jnp.int32(0), tree(4)),
    "schedule free": TrainState(tree(0), [Averaging(tree(5), jnp.int32(3))], jnp.int32(3), jnp.int32(0)),
    "adapters": TrainState(adapted(), {"mu": tree(1)}, jnp.int32(3), jnp.int32(0)),
}


@pytest.mark.parametrize("state", STATES)
def test_parameters_read_one_at_a_time_are_those_read_all_at_once(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, STATES["trained"])
    checkpoints.save(3, STATES[state])
    checkpoints.close()
    _, named = load_named(tmp_path, 3)
    wanted = drafts.merge_adapters(served_params(named))
    step, arrays = open_checkpoint(Storage(tmp_path).kvstore(), "last", where="here")
    params = _draft_params(arrays)
    assert step == 3 and params.keys() == wanted.keys() and len(wanted) == 4
    for name, array in wanted.items():
        assert params[name].shape == array.shape
        np.testing.assert_array_equal(params[name][...], array, err_msg=name)
        np.testing.assert_array_equal(params[name][1:3], array[1:3], err_msg=name)
        np.testing.assert_array_equal(params[name][1:99], array[1:99], err_msg=name)
    assert state == "trained" or not np.array_equal(params["fc"][...], STATES["trained"].draft["fc"])


def test_another_step_is_another_draft(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, TrainState(tree(step), None, jnp.int32(step), jnp.int32(0)))
    checkpoints.close()
    store = Storage(tmp_path).kvstore()
    for step in (1, 2, "1", "2", "best"):
        opened, arrays = open_checkpoint(store, step, where="here", scores={1: 1.4, 2: 1.3, 3: 9.0})
        assert opened == (1 if step == "best" else int(step))
        np.testing.assert_array_equal(_draft_params(arrays)["fc"][...], tree(opened)["fc"])
        assert load_named(tmp_path, step, {1: 1.4, 2: 1.3})[0] == opened
