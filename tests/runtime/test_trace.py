"""A profile of some steps is written, of those steps only; a chip's speed is found by its name."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jeagle.runtime.flops import PEAKS, peak_flops
from jeagle.runtime.trace import BEFORE, StepTrace


class Recorded:
    """jax.profiler's two calls, noted."""

    def __init__(self):
        self.calls, self.step = [], 0

    def start_trace(self, folder):
        self.calls.append(("start", self.step, folder))

    def stop_trace(self):
        self.calls.append(("stop", self.step))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_trace_covers_the_steps_after_compilation(steps, tmp_path, monkeypatch, capsys):
    recorded = Recorded()
    monkeypatch.setattr("jax.profiler", recorded)
    trace = StepTrace(tmp_path, steps)
    for step in range(10):
        recorded.step = step
        with trace:
            trace.wait(jnp.ones(()))
    expected = [("start", BEFORE, str(tmp_path)), ("stop", BEFORE + steps - 1)] if steps else []
    assert recorded.calls == expected
    assert (str(tmp_path) in capsys.readouterr().err) == bool(steps)


def test_a_step_that_fails_ends_the_trace(tmp_path, monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr("jax.profiler", recorded)
    trace = StepTrace(tmp_path, 5)
    for _ in range(BEFORE):
        with trace:
            pass
    with pytest.raises(ZeroDivisionError), trace:
        raise ZeroDivisionError
    assert [call[0] for call in recorded.calls] == ["start", "stop"]


def test_chips():
    assert (
        peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12 and peak_flops("TPU v6 lite") == 918e12
    )
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("cpu") is None
    for name in PEAKS:  # none is hidden behind a shorter name that stands before it
        assert peak_flops(name) == PEAKS[name] * 1e12
