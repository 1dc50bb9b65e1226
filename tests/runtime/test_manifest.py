"""Laws of manifest.py: whole or absent, and manifests that name what changed."""

import multiprocessing
import os
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jeagle.runtime import manifest
from jeagle.runtime.outputs import Output

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

FILE = Output("a file of this test's", False, lambda path: "")
FOLDER = Output("a folder of this test's", True, lambda path: "")

leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.text('a"ü\n', max_size=3)
trees = st.dictionaries(st.text("abc.", min_size=1, max_size=3), leaves | st.lists(leaves, max_size=3), max_size=4)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_holds_the_bytes_and_nothing_stays_beside_it(tmp_path):
    manifest.atomic_write(tmp_path / "deep" / "a.txt", "größer\n", FILE)
    manifest.atomic_write(tmp_path / "deep" / "b.bin", b"\x00\xff", FILE)
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "deep" / "b.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "deep") == ["a.txt", "b.bin"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    manifest.atomic_write(tmp_path / "a", "old", FILE)
    with pytest.raises(TypeError):
        manifest.atomic_write(tmp_path / "a", 3, FILE)
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_replaces_the_old_one_only_when_its_block_succeeds(tmp_path):
    with manifest.atomic_folder(tmp_path / "f", FOLDER) as folder:
        (folder / "one").write_text("1")
        assert not (tmp_path / "f").exists()
    with pytest.raises(RuntimeError), manifest.atomic_folder(tmp_path / "f", FOLDER) as folder:  # noqa: PT012
        (folder / "two").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["one"]
    with manifest.atomic_folder(tmp_path / "f", FOLDER) as folder:
        (folder / "two").write_text("2")
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["two"]


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "kept").write_text("")
    (tmp_path / "f").symlink_to(tmp_path / "shared")
    with manifest.atomic_folder(tmp_path / "f", FOLDER) as folder:
        (folder / "new").write_text("")
    assert names(tmp_path / "f") == ["new"] and names(tmp_path / "shared") == ["kept"]


def _die_inside(path):
    with manifest.atomic_folder(path, FOLDER) as folder:
        (folder / "half").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_is_never_taken_for_the_folder_and_is_swept_up(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=_die_inside, args=(tmp_path / "f",))
    child.start()
    child.join()
    left = names(tmp_path)
    assert child.exitcode == -signal.SIGKILL and len(left) == 1 and left[0].endswith(".partial")
    assert manifest.read_manifest(tmp_path / "f") is None
    with manifest.atomic_folder(tmp_path / "f", FOLDER) as folder:
        manifest.write_manifest(folder, {"a": 1})
    assert names(tmp_path) == ["f"]


def test_a_writer_on_another_host_that_is_a_moment_faster_is_replaced(tmp_path, monkeypatch):
    rename, others = os.rename, []

    def late(source, target):
        if not others:
            others.append(target)
            (tmp_path / "f").mkdir()
            (tmp_path / "f" / "theirs").write_text("")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with manifest.atomic_folder(tmp_path / "f", FOLDER) as folder:
        (folder / "ours").write_text("")
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["ours"]


def test_what_a_living_writer_or_another_machine_is_writing_is_left_alone(tmp_path):
    with manifest.atomic_folder(tmp_path / "f", FOLDER):
        own = names(tmp_path)[0]
    machine = own.split(".")[2]
    others = [f".f.{machine}.{os.getppid()}.partial", ".f.elsewhere.1.partial", f".g.{machine}.{os.getpid()}.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    manifest.atomic_write(tmp_path / "f" / "x", "", FILE)
    with manifest.atomic_folder(tmp_path / "f", FOLDER):
        pass
    assert set(others) <= set(names(tmp_path))


def test_a_folder_without_a_whole_manifest_is_unfinished(tmp_path):
    assert manifest.read_manifest(tmp_path / "absent") is None
    assert manifest.read_manifest(tmp_path) is None
    for broken in ("", '{"a": ', "[1]"):
        (tmp_path / "manifest.json").write_text(broken)
        assert manifest.read_manifest(tmp_path) is None


@settings(max_examples=20)
@given(trees)
def test_a_manifest_comes_back_as_it_was_written(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("m")
    manifest.write_manifest(folder, tree)
    assert manifest.read_manifest(folder) == tree


@given(trees)
def test_a_fingerprint_ignores_the_order_of_keys(tree):
    backwards = dict(reversed(tree.items()))
    assert manifest.fingerprint(tree) == manifest.fingerprint(backwards)
    assert len(manifest.fingerprint(tree)) == 16 and int(manifest.fingerprint(tree), 16) >= 0


@given(trees, trees)
def test_fingerprints_differ_exactly_when_differences_are_named(old, new):
    assert (manifest.fingerprint(old) == manifest.fingerprint(new)) == (manifest.differences(old, new) == [])


def test_differences_are_dotted_names():
    old = {"data": {"row_length": 256, "source": "a", "taps": (1, 2)}, "gone": None, "empty": {}}
    new = {"data": {"row_length": 512, "source": "a", "taps": [1, 2]}, "come": {"x": 1}, "empty": {}}
    assert manifest.differences(old, new) == ["come.x", "data.row_length", "gone"]
    assert manifest.differences({"a": True}, {"a": 1}) == ["a"]


def test_a_file_fingerprint_follows_its_bytes(tmp_path):
    for name, data in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name).write_bytes(data)
    a, b, c = (manifest.file_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
