"""Object storage that refuses, or is away: one sentence, and nothing is taken for damaged, missing or finished."""

from __future__ import annotations

import pytest
from moto.core import set_initial_no_auth_action_count

from jeagle import features
from jeagle import store as storing
from jeagle.errors import UserError
from jeagle.features import remote
from tests.conftest import object_storage
from tests.features import made


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    for patience in (remote.FIRST, remote.LATER):
        for name, value in {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}.items():
            monkeypatch.setitem(patience, name, value)


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match=r"s3://none/s cannot be used: there is no such bucket"):
        made.fill("s3://none/s")
    with pytest.raises(UserError, match=r"There is no store at s3://none/s"):
        storing.main(["info", "s3://none/s"])
    with pytest.raises(UserError, match=r"s3://a/s cannot be used: a is no name of a bucket"):
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


def test_a_server_that_goes_away_is_not_taken_for_damage():
    """`prune --damaged` would remove what cannot be read."""
    with object_storage() as (url, server):
        place = features.Place(f"{url}/s")
        writer = features.Writer(place, made.about("int8"))
        unit, other = features.units_of(made.SPLITS, 3)[:2]
        found = features.ragged(*made.content("train", "int8"), unit.rows)
        writer.commit(unit, found, 8)
        store = features.Store(str(place))
        server.stop()
        doings = {
            "read": lambda: store.batch("train", [0]),
            "verify": lambda: list(features.verify(store)),
            "prune": lambda: features.prune(place, []),
            "write": lambda: writer.commit(other, found, 8),
            "open": lambda: features.Store(str(place)),
        }
        for doing in doings.values():
            with pytest.raises(remote.Unreachable, match="cannot be reached"):
                doing()
        server.start()
