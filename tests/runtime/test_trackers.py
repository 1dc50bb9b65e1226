"""Laws of trackers: what a resumed run leaves is what an uninterrupted one would have left."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from jeagle.errors import UserError
from jeagle.runtime.trackers import open_trackers, read_metrics


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder, steps, *, resume_step=0, names=()):
    with open_trackers(names, folder, resume_step) as trackers:
        for step in steps:
            trackers.log(step, {"loss": 1 / step, "rows": step})


@pytest.mark.parametrize("killed_at", range(1, 7))
@pytest.mark.parametrize("saved_at", range(7))
def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path, killed_at, saved_at):
    saved_at = min(saved_at, killed_at)
    log(tmp_path / "whole", range(1, 7))
    log(tmp_path / "cut", range(1, killed_at + 1))
    log(tmp_path / "cut", range(saved_at + 1, 7), resume_step=saved_at)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("cut", ['{"step": 3, "los', '{"step": 3, "loss": 0.3}'])
def test_a_line_that_a_kill_left_without_its_end_does_not_spoil_the_next(tmp_path, cut):
    log(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    log(tmp_path, [3], resume_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    log(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_numbers_that_json_lacks_are_null(tmp_path):
    with open_trackers([], tmp_path) as trackers:
        trackers.log(1, {"loss": float("nan"), "norm": float("inf"), "rate": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "rate": 0.5}]


def test_an_unknown_tracker_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="tensorbord.*tensorboard"):
        open_trackers(["tensorbord"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def events(folder):
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]


def test_tensorboard_gets_every_scalar_with_its_step(tmp_path):
    log(tmp_path, [1, 2], names=["tensorboard"])
    scalars = {(v.tag, e.step): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert scalars == {("loss", 1): 1.0, ("rows", 1): 1.0, ("loss", 2): 0.5, ("rows", 2): 2.0}


def test_tensorboard_is_told_to_forget_what_came_after_the_checkpoint(tmp_path):
    log(tmp_path, [1, 2, 3], names=["tensorboard"])
    log(tmp_path, [2, 3], names=["tensorboard"], resume_step=1)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [2]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'\xff{"step": 3}\n', b'{"step": 3, "loss": "\xe2\x82'])
def test_bytes_that_are_no_text_are_passed_over(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damage)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with open_trackers([], tmp_path, 1) as trackers:
        trackers.log(2, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2] and path.read_bytes().count(b"\n") == 2
