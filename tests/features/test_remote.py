"""Object storage that refuses, or is away: one sentence, and nothing is taken for damaged, missing or finished."""

from __future__ import annotations

from typing import Any

import pytest
from moto.core import set_initial_no_auth_action_count

from jeagle import features
from jeagle import store as storing
from jeagle.errors import UserError
from jeagle.features import storage
from tests.conftest import object_storage
from tests.features import made


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    for patience in (storage.FIRST_RETRIES, storage.LATER_RETRIES):
        for name, value in {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}.items():
            monkeypatch.setitem(patience, name, value)


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match=r"s3://none/s cannot be used: there is no such bucket"):
        made.fill("s3://none/s")
    with pytest.raises(UserError, match=r"There is no store at s3://none/s"):
        storing.main(["info", "s3://none/s"])
    with pytest.raises(UserError, match=r"s3://a/s cannot be used: a is not a valid name of a bucket"):
        storing.main(["info", "s3://a/s"])
    with pytest.raises(UserError, match=r"needs a bucket and a path"):
        storing.main(["info", "s3://none"])


def test_credentials_that_are_missing_or_refused(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"access is refused \(InvalidAccessKeyId\)"):
        set_initial_no_auth_action_count(0)(made.fill)(f"{bucket}/s")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no credentials were found"):
        made.fill(f"{bucket}/s")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nowhere.invalid", "127.0.0.1:9"])
def test_a_server_that_is_not_there(monkeypatch, bucket, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(
        UserError, match=r"s3://none/s cannot be reached \(.*\). Check the network, and AWS_ENDPOINT_URL"
    ):
        storing.main(["info", "s3://none/s"])


def test_the_other_kind_of_storage_is_away_too(monkeypatch):
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


def test_a_writer_whose_answer_was_lost_knows_that_it_was_the_first(bucket):
    """It would remove the segment that its own manifest names."""
    place = features.Storage(f"{bucket}/lost")
    assert place.read("a") is None
    place._opened = Forgetful(place._opened)
    assert place.write_new("a", b"mine")
    assert not place.write_new("a", b"another's") and place.read("a") == b"mine"


def test_a_server_that_goes_away_is_not_taken_for_damage():
    """`prune --damaged` would remove what cannot be read."""
    with object_storage() as (url, server):
        place = features.Storage(f"{url}/s")
        writer = features.Writer(place, made.about("int8"))
        unit, other = features.work_units(made.SPLITS, 3)[:2]
        found = features.ragged_rows(*made.content("train", "int8"), unit.rows)
        writer.commit(unit, found, 8)
        store = features.Store(str(place))
        server.stop()
        doings = {
            "read": lambda: store.batch("train", [0]),
            "verify": lambda: list(features.verify_store(store)),
            "prune": lambda: features.prune_store(place, []),
            "write": lambda: writer.commit(other, found, 8),
            "open": lambda: features.Store(str(place)),
        }
        for doing in doings.values():
            with pytest.raises(storage.StorageUnreachable, match="cannot be reached"):
                doing()
        server.start()
