"""Laws of the progress line: what it shows, how often, and that the end is never lost."""

import io
import re
import threading

import pytest

from jeagle.runtime.progress import PLAIN_SECONDS, Progress, bytes_progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """What tqdm reads the time from."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def started(stream, total=2000, **options):
    return Progress(total, "steps", "train", stream, **options)


def shown(stream):
    """How much was done according to each plain line."""
    return [int(re.search(r"\| (\d+)/2000", line)[1]) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_is_done_the_metrics_the_rate_and_the_time_left(clock):
    stream = io.StringIO()
    with started(stream) as progress:
        clock.now += 10
        progress.update(20, loss=3.2142, accuracy="0.61 0.43")
        line = stream.getvalue().splitlines()[-1]
        assert line.startswith("train:") and line.endswith(
            "| 20/2000 [00:10<16:30,  2.00 steps/s, loss=3.21, accuracy=0.61 0.43]"
        )


def test_what_another_process_did_is_not_in_the_rate(clock):
    stream = io.StringIO()
    with started(stream, done=1000) as progress:
        clock.now += 10
        progress.update(1010)
        assert "| 1010/2000 [00:10<16:30,  1.00 steps/s]" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_rate_follows_the_last_minutes(clock, stream):
    """A slow start, such as a compilation, does not weigh on the time left for ever."""
    with started(stream) as progress:
        clock.now += 600
        for step in range(1, 501):
            clock.now += 1
            progress.update(step)
        shown = "500/2000 [18:20<25:00" if stream.isatty() else "496/2000 [18:16<25:04"
        assert stream.getvalue().rstrip("\n").endswith(f"| {shown},  1.00s/ steps]")


def test_plain_lines_are_seconds_apart_and_the_last_update_is_shown(clock):
    stream = io.StringIO()
    with started(stream) as progress:
        for step in range(1, 101):
            clock.now += PLAIN_SECONDS / 10
            progress.update(step)
        progress.update(101)
    assert shown(stream) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 101]
    assert "\r" not in stream.getvalue()


def test_nothing_is_said_twice(clock):
    stream = io.StringIO()
    progress = started(stream)
    clock.now += PLAIN_SECONDS
    progress.update(2000)
    progress.close()
    progress.close()
    assert shown(stream) == [0, 2000]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_terminal_has_one_line_rewritten_and_a_new_line_at_the_end(clock, stopped):
    stream = Terminal()
    try:
        with started(stream) as progress:
            clock.now += 1
            progress.update(1, loss=3.0)
            clock.now += 1
            progress.update(2, loss=2.0)
            assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 3
            progress.say("saved")
            assert stream.getvalue().count("\n") == 1 and "\rsaved\n" in stream.getvalue()
            if stopped:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert stopped
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("train:") and "| 2/2000 [00:02<" in last and last.endswith("\n")


def test_text_above_the_line_is_a_line_of_its_own_in_a_file(clock):
    stream = io.StringIO()
    with started(stream) as progress:
        progress.say("saved")
    assert stream.getvalue().splitlines()[1] == "saved" and "\r" not in stream.getvalue()


def test_a_sign_of_life_comes_after_silence_only(clock):
    stream = io.StringIO()
    lines = lambda: stream.getvalue().count("\n")  # noqa: E731
    with started(stream) as progress:
        clock.now += PLAIN_SECONDS
        progress.update(1)
        progress.beat()
        assert lines() == 2
        clock.now += PLAIN_SECONDS
        progress.beat()
        assert lines() == 3
        clock.now += PLAIN_SECONDS
        progress.update(2)
        progress.beat()
        assert lines() == 4


def test_the_sign_of_life_comes_without_being_asked_for_and_stops():
    spoken = threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
            if threading.current_thread().name == "progress compile":
                spoken.set()
            return len(text)

    with Progress(0, "programs", "compile", Stream(), beat_seconds=0.001):
        assert spoken.wait(60)
    for thread in threading.enumerate():
        if thread.name == "progress compile":
            thread.join(60)
            assert not thread.is_alive()


def test_a_total_that_is_not_known_shows_the_time_spent(clock):
    stream = io.StringIO()
    with started(stream, total=0):
        clock.now += 75
    assert stream.getvalue().splitlines()[-1].startswith("train: 0 steps [01:15,")


def test_a_stream_that_goes_away_does_not_end_the_work(clock):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for stream in (io.StringIO(), Terminal(), Gone()):
        with started(stream) as progress:
            stream.close()
            clock.now += PLAIN_SECONDS
            progress.update(1)
            progress.say("x")


def test_all_but_one_process_are_silent(clock):
    stream = io.StringIO()
    with started(stream, shown=False) as progress:
        clock.now += PLAIN_SECONDS
        progress.update(1)
        progress.say("x")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_work_of_less_than_a_second_is_silent_and_longer_work_shows_its_megabytes(clock, stream):
    short, long = stream(), stream()
    with bytes_progress("load", stream=short) as update:
        clock.now += 0.9
        update(2_000_000, 2_000_000)
    assert short.getvalue() == ""
    with bytes_progress("load", stream=long) as update:
        update(0, 2_000_000_000)
        clock.now += 5
        update(500_000_000, 2_000_000_000)
        assert "| 500M/2.00G [00:05<00:15, 100MB/s]" in long.getvalue()
        update(2_000_000_000, 2_000_000_000)
    assert "| 2.00G/2.00G [00:05<00:00" in long.getvalue()
