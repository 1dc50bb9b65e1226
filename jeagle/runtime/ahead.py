"""Work that begins on threads before its result is asked for."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


def read_ahead(items: Iterable[_T], read: Callable[[_T], Any], *, threads: int, depth: int) -> Iterator[Any]:
    """Yields read(item) for each item, in order, while threads work up to `depth` items ahead.

    An error in `read` is raised here, when its item's turn comes.
    """
    source = iter(items)
    with ThreadPoolExecutor(threads, "ahead") as pool:
        waiting: collections.deque[Future] = collections.deque(
            pool.submit(read, item) for item in itertools.islice(source, depth)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in itertools.islice(source, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
