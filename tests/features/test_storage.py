"""Storage that is full, refuses or does not answer: one sentence, and nothing is half written or counts as damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moto.core import set_initial_no_auth_action_count

from jeagle import features
from jeagle import store as storing
from jeagle.errors import UserError
from jeagle.features import storage
from tests.conftest import object_storage
from tests.features import random_store

ROOT = Path(__file__).parents[2]
SCRIPT = """
set -e
mount -t tmpfs -o size=1000k none {folder}
exec {python} -c '
from pathlib import Path
from jeagle import features
from jeagle.errors import UserError
from tests.features import random_store
folder = Path("{folder}")
(folder / "ballast").write_bytes(bytes(800_000))
try:
    random_store.fill(folder / "s", "float32")
    raise SystemExit("the disk was not full")
except UserError as error:
    print(error)
store = features.Store(str(folder / "s"))
assert store.missing() and not list(features.verify_store(store))
assert {{s.data for s in store.segments}} == set(store.storage.names("segments"))
(folder / "ballast").unlink()
random_store.fill(folder / "s", "float32")
random_store.check_whole(folder / "s", "float32")
'
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "bash", "-c", "mount -t tmpfs none /tmp"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a tmpfs of its own cannot be mounted here")
def test_a_full_disk_stops_cleanly_and_the_same_call_continues(tmp_path):
    script = SCRIPT.format(folder=tmp_path, python=sys.executable)
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "is full: segment" in done.stdout and "MB are free" in done.stdout and "it continues from them" in done.stdout
    )


def test_a_disk_that_fills_up_before_the_manifest(tmp_path):
    writer = features.Writer(features.Storage(tmp_path / "s"), random_store.about("int8"))
    unit = features.work_units(random_store.SPLITS, 3)[0]
    rows = features.ragged_rows(*random_store.content("train", "int8"), unit.rows)
    writer.storage._opened = FullForManifests(writer.storage._kv)
    with pytest.raises(UserError, match=r"segment train-000000 needs .* MB are free"):
        writer.commit(unit, rows, 8)
    assert writer.storage.names("segments") == []


class FullForManifests:
    """A key-value store on a disk that is full once a manifest is written, with tensorstore's own message."""

    def __init__(self, true: Any):
        self.true = true

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)

    def write(self, key: str, data: bytes | None, **how: Any) -> Any:
        if key.startswith("manifests/"):
            raise ValueError(f"UNKNOWN: Failed to write: {key!r}: No space left on device [os_error_code='28']")
        return self.true.write(key, data, **how)


@pytest.fixture
def impatient(monkeypatch) -> None:
    for patience in (storage.FIRST_RETRIES, storage.LATER_RETRIES):
        for name, value in {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}.items():
            monkeypatch.setitem(patience, name, value)


@pytest.mark.usefixtures("impatient")
def test_a_bucket_that_does_not_exist(bucket):
    with pytest.raises(UserError, match=r"s3://none/s cannot be used: there is no such bucket"):
        random_store.fill("s3://none/s")
    with pytest.raises(UserError, match=r"There is no store at s3://none/s"):
        storing.main(["info", "s3://none/s"])
    with pytest.raises(UserError, match=r"s3://a/s cannot be used: a is not a valid name of a bucket"):
        storing.main(["info", "s3://a/s"])
    with pytest.raises(UserError, match=r"needs a bucket and a path"):
        storing.main(["info", "s3://none"])


@pytest.mark.usefixtures("impatient")
def test_credentials_that_are_missing_or_refused(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"access is refused \(InvalidAccessKeyId\)"):
        set_initial_no_auth_action_count(0)(random_store.fill)(f"{bucket}/s")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no credentials were found"):
        random_store.fill(f"{bucket}/s")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nowhere.invalid", "127.0.0.1:9"])
def test_a_server_that_does_not_answer(monkeypatch, bucket, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(
        UserError, match=r"s3://none/s cannot be reached \(.*\). Check the network, and AWS_ENDPOINT_URL"
    ):
        storing.main(["info", "s3://none/s"])


@pytest.mark.usefixtures("impatient")
def test_google_storage_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"gs://none/s cannot be reached \(.*\). Check the network.$"):
        storing.main(["info", "gs://none/s"])


class Forgetful:
    """A key-value store whose answers to writes are lost, so that they are tried again."""

    def __init__(self, true: Any):
        self.true = true

    def read(self, key: str) -> Any:
        return self.true.read(key)

    def write(self, key: str, data: bytes, **how: Any) -> Any:
        self.true.write(key, data, **how).result()
        return self.true.write(key, data, **how)


@pytest.mark.usefixtures("impatient")
def test_a_writer_whose_answer_was_lost_learns_that_it_was_the_first(bucket):
    """It would remove the segment that its own manifest names."""
    place = features.Storage(f"{bucket}/lost")
    assert place.read("a") is None
    place._opened = Forgetful(place._opened)
    assert place.write_new("a", b"mine")
    assert not place.write_new("a", b"another's") and place.read("a") == b"mine"


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stops_does_not_count_as_damage():
    """`prune --damaged` would remove what cannot be read."""
    with object_storage() as (url, server):
        place = features.Storage(f"{url}/s")
        writer = features.Writer(place, random_store.about("int8"))
        unit, other = features.work_units(random_store.SPLITS, 3)[:2]
        segment_rows = features.ragged_rows(*random_store.content("train", "int8"), unit.rows)
        writer.commit(unit, segment_rows, 8)
        store = features.Store(str(place))
        server.stop()
        doings = {
            "read": lambda: store.batch("train", [0]),
            "verify": lambda: list(features.verify_store(store)),
            "prune": lambda: features.prune_store(place, []),
            "write": lambda: writer.commit(other, segment_rows, 8),
            "open": lambda: features.Store(str(place)),
        }
        for doing in doings.values():
            with pytest.raises(storage.StorageUnreachable, match="cannot be reached"):
                doing()
        server.start()
