"""Laws of the progress line: what it shows, how often, and that the end is never lost."""

import io
import threading

import pytest

from jeagle.runtime.progress import BEAT_SECONDS, PLAIN_SECONDS, Progress, _duration, _short, bytes_progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def started(stream, clock, total=2000, **options):
    return Progress(total, "steps", "train", stream, clock=clock, **options)


def test_a_line_says_what_is_done_the_figures_the_rate_and_the_time_left(clock):
    stream = io.StringIO()
    with started(stream, clock) as progress:
        clock.now += 10
        progress.update(20, loss=3.2142, accuracy=(0.61, 0.4321), tokens_per_s=12345.6)
        assert stream.getvalue() == (
            "train: 20/2,000 steps  loss 3.21  accuracy 0.61/0.432  tokens per s 12,346  2 steps/s  16:30 left\n"
        )


def test_what_another_process_did_is_not_in_the_rate(clock):
    stream = io.StringIO()
    with started(stream, clock, done=1000) as progress:
        clock.now += 10
        progress.update(1010)
    assert "1,010/2,000 steps  1 steps/s  16:30 left" in stream.getvalue()


def test_the_rate_follows_the_last_minute(clock):
    """A slow start, such as a compilation, does not weigh on the time left for ever."""
    stream = io.StringIO()
    with started(stream, clock) as progress:
        clock.now += 600
        for step in range(1, 101):
            clock.now += 1
            progress.update(step)
        clock.now += 100
    assert "after" in stream.getvalue().splitlines()[-1]
    assert "96/2,000 steps  1 steps/s  31:44 left" in stream.getvalue()


def test_plain_lines_are_seconds_apart_and_the_last_update_is_shown(clock):
    stream = io.StringIO()
    with started(stream, clock) as progress:
        for step in range(1, 101):
            clock.now += PLAIN_SECONDS / 10
            progress.update(step)
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_nothing_is_said_twice(clock):
    stream = io.StringIO()
    progress = started(stream, clock)
    progress.update(2000)
    progress.close()
    progress.close()
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_has_one_line_rewritten_and_a_new_line_at_the_end(clock):
    stream = Terminal()
    with started(stream, clock) as progress:
        progress.update(1, loss=3.0)
        clock.now += 1
        progress.update(2, loss=2.0)
        assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 2
        progress.say("saved")
        assert stream.getvalue().count("\n") == 1
    last = stream.getvalue().split("\r\x1b[K")[-1]
    assert last.startswith("train: 2/2,000 steps") and last.endswith("\n")


def test_a_sign_of_life_comes_after_silence_only(clock):
    stream = io.StringIO()
    with started(stream, clock) as progress:
        progress.update(1)
        clock.now += BEAT_SECONDS - 1
        progress.beat()
        assert stream.getvalue().count("\n") == 1
        clock.now += 1
        progress.beat()
        assert stream.getvalue().count("\n") == 2
        clock.now += 1
        progress.beat()
        assert stream.getvalue().count("\n") == 2


def test_the_sign_of_life_comes_without_being_asked_for_and_stops():
    spoken = threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
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
    with started(stream, clock, total=0):
        clock.now += 75
    assert stream.getvalue() == "train: 0 steps  after 1:15\n"


def test_a_stream_that_goes_away_does_not_end_the_work(clock):
    stream = io.StringIO()
    with started(stream, clock) as progress:
        stream.close()
        progress.update(1)
        progress.say("x")


def test_all_but_one_process_are_silent(clock):
    stream = io.StringIO()
    with started(stream, clock, shown=False) as progress:
        progress.update(1)
        progress.say("x")
    assert stream.getvalue() == ""


def test_short_figures():
    values = [3.2142, 0.00001, 1999.5, 7, 12000, 0.0, "text", (0.5, 0.25), float("nan")]
    assert [_short(v) for v in values] == ["3.21", "1e-05", "2,000", "7", "12,000", "0", "text", "0.5/0.25", "nan"]


def test_durations():
    assert [_duration(s) for s in (0, 59.6, 75, 3675)] == ["0:00", "1:00", "1:15", "1:01:15"]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_work_of_less_than_a_second_is_silent_and_longer_work_shows_its_megabytes(clock, stream):
    short, long = stream(), stream()
    with bytes_progress("load", stream=short, clock=clock) as update:
        clock.now += 0.9
        update(2_000_000, 2_000_000)
    assert short.getvalue() == ""
    with bytes_progress("load", stream=long, clock=clock) as update:
        update(0, 2_000_000_000)
        clock.now += 2
        update(500_000_000, 2_000_000_000)
        assert "load: 500/2,000 MB  250 MB/s  0:06 left" in long.getvalue()
        update(2_000_000_000, 2_000_000_000)
    assert "load: 2,000/2,000 MB" in long.getvalue()
