"""Parameters read one at a time from a checkpoint are those read all at once, whatever training kept beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import drafts
from jeagle.exporting.run_reader import _params
from jeagle.run.parameters import served_params
from jeagle.runtime.checkpoints import Checkpoints, load_named
from jeagle.runtime.saved import local, open_saved
from jeagle.training.step import TrainState


class Averaging(NamedTuple):
    """As optax's schedule_free keeps it: the iterate that takes the steps."""

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


@pytest.mark.parametrize("kept", STATES)
def test_one_at_a_time_is_all_at_once(kept, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, STATES["trained"])
    checkpoints.save(3, STATES[kept])
    checkpoints.close()
    _, named = load_named(tmp_path, 3)
    wanted = drafts.merge_adapters(served_params(named))
    step, arrays = open_saved(local(tmp_path), "last", where="here")
    found = _params(arrays)
    assert step == 3 and found.keys() == wanted.keys() and len(wanted) == 4
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name][...], array, err_msg=name)
        np.testing.assert_array_equal(found[name][1:3], array[1:3], err_msg=name)
        np.testing.assert_array_equal(found[name][1:99], array[1:99], err_msg=name)
    assert kept == "trained" or not np.array_equal(found["fc"][...], STATES["trained"].draft["fc"])


def test_another_step_is_another_draft(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, TrainState(tree(step), None, jnp.int32(step), jnp.int32(0)))
    checkpoints.close()
    for step in (1, 2, "1", "2", "best"):
        found, arrays = open_saved(local(tmp_path), step, where="here", scores={1: 1.4, 2: 1.3, 3: 9.0})
        assert found == (1 if step == "best" else int(step))
        np.testing.assert_array_equal(_params(arrays)["fc"][...], tree(found)["fc"])
        assert load_named(tmp_path, step, {1: 1.4, 2: 1.3})[0] == found
