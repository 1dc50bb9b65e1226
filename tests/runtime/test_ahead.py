"""Work that is begun on threads before its result is asked for."""

from __future__ import annotations

import pytest

from jeagle.errors import UserError
from jeagle.runtime.ahead import read_ahead


def test_results_come_in_order_and_errors_of_a_thread_are_raised():
    def read(number: int) -> int:
        if number == 3:
            raise UserError("damaged")
        return number

    ahead = read_ahead(range(9), read, threads=2, depth=4)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="damaged"):
        next(ahead)
