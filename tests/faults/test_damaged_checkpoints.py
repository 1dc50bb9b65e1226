"""A damaged checkpoint is refused or gives the values that were saved, and training uses the one before it."""

from __future__ import annotations

import random
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jeagle.errors import UserError
from jeagle.exporting.run_reader import open_checkpoint
from jeagle.features import Storage
from jeagle.runtime import disk
from jeagle.runtime.checkpoints import Checkpoints, load_named

FLIPS = 60


def tree(seed: int) -> dict:
    values = np.random.default_rng(seed).standard_normal((40, 16)).astype(np.float32)
    draft = {"fc": jnp.asarray(values), "norm": jnp.ones(16), "half": jnp.asarray(values[:4], jnp.bfloat16)}
    return {"draft": draft, "moments": {"fc": jnp.zeros((40, 16))}, "step": jnp.int32(seed), "on": jnp.array([True])}


def save(folder, *steps, checksums=True):
    if checksums:
        with Checkpoints(folder, keep=9) as checkpoints:
            for step in steps:
                checkpoints.save(step, tree(step))
    else:  # as jeagle wrote them before it had checksums
        named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree(1))[0]}
        with ocp.CheckpointManager(folder) as manager:
            manager.save(*steps, args=ocp.args.StandardSave(named))


def read_by_name(folder):
    return load_named(folder, "last")[1]


def read_some(folder):
    return load_named(folder, "last", names=lambda names: [name for name in names if "fc" in name])[1]


def resume(folder):
    checkpoints = Checkpoints(folder, keep=9)
    leaves, _ = jax.tree_util.tree_flatten_with_path(checkpoints.restore(checkpoints.latest(), tree(0)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def read_one_at_a_time(folder):
    _, arrays = open_checkpoint(Storage(folder).kvstore(), "last", where="here")
    return {name: array[...] for name, array in arrays.items() if "half" not in name}


READERS = (read_by_name, read_some, resume, read_one_at_a_time)


@pytest.mark.parametrize("read", READERS)
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, read):
    save(tmp_path / "whole", 1)
    good, seen, chance = read(tmp_path / "whole"), Counter(), random.Random(read.__name__)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    for number in range(FLIPS):
        shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
        path = tmp_path / "flipped" / files[number % len(files)]
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = read(tmp_path / "flipped")
        except UserError:
            seen["noticed"] += 1
        else:
            assert found.keys() == good.keys(), path
            for name, values in good.items():
                assert found[name].dtype == values.dtype, (path, name)
                np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(values), err_msg=f"{path} {name}")
            seen["harmless"] += 1
        shutil.rmtree(tmp_path / "flipped")
    assert seen["noticed"] > FLIPS / 6 and seen.total() == FLIPS


@pytest.mark.parametrize("read", READERS)
def test_checkpoints_without_checksums_are_read(tmp_path, read):
    save(tmp_path, 1, checksums=False)
    found = read(tmp_path)
    assert found
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, eval(f"tree{name}", {"tree": tree(1)}))


def cut(step):
    path = max((step / "default" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def lose(step):
    for path in (step / "default").rglob("d/*"):
        path.unlink()


def alter(step):
    """Another number in place of one: only a checksum tells."""
    with ocp.CheckpointManager(step.parent.absolute()) as manager:
        metadata = ocp.StandardCheckpointHandler().metadata(step / "default").custom_metadata
        named = dict(manager.restore(int(step.name), args=ocp.args.StandardRestore()))
        name = "['draft']['fc']"
        named[name] = named[name].at[0, 0].add(1)
        shutil.rmtree(step)
        manager.reload()
        manager.save(int(step.name), args=ocp.args.StandardSave(named, custom_metadata=metadata), force=True)


DAMAGES = {"cut": cut, "lost": lose, "altered": alter, "gone": lambda step: (step / "default" / "_METADATA").unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_training_goes_on_from_the_one_before_a_damaged_one(tmp_path, damage, capsys):
    folder = tmp_path / "checkpoints"
    save(folder, 2, 4, 6)
    for step in (4, 6):
        DAMAGES[damage](folder / str(step))
    with pytest.raises(UserError, match=r"checkpoints/6 is incomplete or damaged"):
        load_named(folder, "last")
    with Checkpoints(folder, keep=9) as checkpoints:
        step, found = checkpoints.newest(tree(0))
        assert step == 2 and checkpoints.steps() == [2]
        jax.tree.map(np.testing.assert_array_equal, found, tree(2))
        checkpoints.save(4, tree(4))
    assert load_named(folder, "last")[0] == 4
    said = capsys.readouterr().out
    assert said.count("warning: The checkpoint") == 2 and "step 2 is used" in said
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["checkpoint_4.0", "checkpoint_6.0"]


def test_without_a_whole_one_nothing_is_moved(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 2, 4)
    for step in (2, 4):
        cut(folder / str(step))
    with pytest.raises(UserError, match="None of the 2 checkpoints"):
        Checkpoints(folder, keep=9).newest(tree(0))
    assert (folder / "2").is_dir() and (folder / "4").is_dir() and not (tmp_path / "damaged").exists()


def test_other_settings_are_no_damage(tmp_path):
    save(tmp_path, 2)
    other = tree(0) | {"step": jnp.zeros(3, jnp.int32)}
    with pytest.raises(UserError, match="does not fit this configuration"):
        Checkpoints(tmp_path, keep=9).newest(other)
    assert (tmp_path / "2").is_dir()


def test_a_save_under_way_is_completed_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, keep=9) as checkpoints:  # noqa: PT012
        checkpoints.save(2, tree(2))
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"] and load_named(tmp_path, "last")[0] == 2


def test_a_disk_without_room_is_one_sentence_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=9)
    checkpoints.save(2, tree(2))
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1234)
    with pytest.raises(UserError, match=r"step 4 needs 0\.07. MB, .* has 0\.001 MB free: make room.*from step 2\."):
        checkpoints.save(4, tree(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written(tmp_path, monkeypatch):
    from orbax.checkpoint._src.serialization import serialization

    async def full(*arguments, **settings):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

    with Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(2, tree(2))
    checkpoints = Checkpoints(tmp_path, keep=9)
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "async_serialize_from_host", full)
        checkpoints.save(4, tree(4))
        with pytest.raises(
            UserError, match=r"cannot be written, the disk of .* is full, .*B free: make room.*step 2\."
        ):
            checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]
