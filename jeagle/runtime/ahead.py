"""Work begun before its result is asked for."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


def read_ahead(items: Iterable[_T], read: Callable[[_T], Any], *, threads: int, depth: int) -> Iterator[Any]:
    """read(item) of each item, in order, begun up to `depth` items ahead on threads, whose errors are raised here."""
    source = iter(items)
    with ThreadPoolExecutor(threads, "ahead") as pool:
        waiting: collections.deque[Future] = collections.deque(
            pool.submit(read, item) for item in itertools.islice(source, depth)
        )
        try:
            while waiting:
                found = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in itertools.islice(source, 1))
                yield found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
