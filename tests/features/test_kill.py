"""Writers killed at random moments, two at a time, then run to the end: every row once, nothing to clean by hand."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

import pytest

from jeagle import features
from tests.features import random_store

KILLS = int(os.environ.get("JEAGLE_KILLS", "6"))  # make kill-check asks for 50


@pytest.fixture(scope="module")
def processes():
    """Makes processes quickly: of a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def fill(environment: dict[str, str], url: str) -> None:
    os.environ.update(environment)  # the server of processes may have begun with another one
    random_store.fill(url, "int8", 0.02)


def test_killed_writers_leave_nothing_wrong(root, processes):
    rng, killed, round_number, slow = random.Random(0), 0, 0, "://" in root
    while killed < (KILLS // 3 if slow else KILLS):
        url = f"{root}/{round_number}"
        round_number += 1
        for _ in range(1 if slow else 3):  # two writers at a time, then one that nobody disturbs
            pair = [processes.Process(target=fill, args=(dict(os.environ), url)) for _ in range(2)]
            for process in pair:
                process.start()
            while features.Storage(url).read("store.json") is None and pair[0].is_alive():
                time.sleep(0.002)
            time.sleep(rng.random() * (1.5 if slow else 0.5))
            for process in pair:
                killed += process.is_alive()
                process.kill()
                process.join()
            check_readable(url)
        random_store.fill(url)
        random_store.check_whole(url)


def check_readable(url: str) -> None:
    """Whatever a kill leaves, what counts as finished is whole."""
    if features.read_store(features.Storage(url)) is not None:
        assert list(features.verify_store(features.Store(url))) == []
