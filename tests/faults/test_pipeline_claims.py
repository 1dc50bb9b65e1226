"""A second pipeline makes again what has gone, is empty or belongs to another configuration, and nothing else.

Answers, training, measuring and exporting are stand-ins that write the same kinds of files; the notes, the rows, the
vocabulary tables and the checkpoints are real. tests/end_to_end/test_pipeline.py does it once with everything real.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jeagle import data, pipeline, targets
from jeagle import flags as configs
from jeagle.config import to_json
from jeagle.data import AnswerFile
from jeagle.errors import UserError
from jeagle.export import VllmExportArguments
from jeagle.run.draft_init import draft_spec
from jeagle.runtime.checkpoints import Checkpoints, load_named
from tests import tiny

ROOT = Path(__file__).parents[2]
STEP = 2
STAGES = ("answers", "measure before", "train", "measure after", "export")
MEASURED = {"measure before", "measure after", "export"}
FIGURES = (
    "acceptance_length",
    "prompts_measured",
    "draft_tokens",
    "max_new_tokens",
    "excused_ties",
    "draft_parameters",
)


def answer(args, prompts):
    rows = [
        {"id": p["id"], "messages": [*p["messages"], {"role": "assistant", "content": "a cat"}]}
        | {"finish_reason": "stop"}
        for p in prompts[:40]
    ]
    AnswerFile(args.out, {"version": "0", "max_new_tokens": args.max_new_tokens}).finish(rows)
    return rows


def train(config):
    """Goes on from the last checkpoint, as training does; the parameters follow from nothing but the step."""
    target = targets.read_spec(targets.open_weights(targets.resolve(config.target.ref)).config)
    spec = draft_spec(config, target, len(data.load_tables(config.folder / "tables")), ())
    described = {"draft": spec.to_json(), "made_from": {}}
    for name, tree in {"config.json": to_json(config), "draft.json": described}.items():
        path = config.folder / name
        if path.is_file():
            json.loads(path.read_text())  # training reads what is there
        path.write_text(json.dumps(tree) + "\n")
    np.save(config.folder / "embedding.npy", np.ones((4, 2), np.float32))
    checkpoints = Checkpoints(config.folder / "checkpoints", keep=2)
    for step in range((checkpoints.latest() or 0) + 1, STEP + 1):
        checkpoints.save(step, {"fc": np.arange(8, dtype=np.float32) + step})
    checkpoints.close()
    return {"step": STEP}


def measure(config, prepared, *, trained):
    metrics = dict.fromkeys(FIGURES, config.bench.max_new_tokens)
    by_position = {"acceptance_by_position": [0.5]}
    ngram = {"acceptance_length": 1.0} | by_position
    sample = {"prompt": "?", "tokens": []}
    return metrics | by_position | {"lossless": True, "prompts_hash": "", "ngram": ngram, "sample": sample}


def export(args, acceptance):
    folder, engine = Path(args.run), "vllm" if isinstance(args, VllmExportArguments) else "sglang"
    place = folder / "exports" / engine
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "jeagle_export.json").write_text(json.dumps({"engine": engine, "layout": "plain"}))
    (place / "config.json").write_text(json.dumps(acceptance))
    (place / "model.safetensors").write_bytes(load_named(folder / "checkpoints", "last")[1]["['fc']"].tobytes())
    return f"{place}: written"


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        for name, function in {"regenerate": answer, "train": train, "_measure": measure, "export": export}.items():
            patch.setattr(pipeline, name, function)
        read = lambda folder, step: (STEP, None, load_named(folder / "checkpoints", step)[1])  # noqa: E731
        patch.setattr(pipeline.assemble, "load_draft", read)
        yield


def config_of(folder, **more):
    settings = {"data__source": "starter", "data__row_length": 128, "regenerate__live": True} | more
    flags = ["--config", str(ROOT / "configs" / "llama3_8b.py"), *tiny.flags(folder, **settings)]
    return configs.from_command_line(flags, program="", description="")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(configuration, what its run's folder holds, all of it on disk at another place)."""
    folder = tmp_path_factory.mktemp("claims")
    config = config_of(folder)
    pipeline.pipeline(config)
    shutil.copytree(config.folder, folder / "whole")
    return config, content(config.folder), folder / "whole"


@pytest.fixture
def run(whole):
    config, _, saved = whole
    shutil.rmtree(config.folder)
    shutil.copytree(saved, config.folder)
    return config


def content(folder):
    """Bytes by path of what must be there again, the same: all but the notes' times and the checkpoints' own names."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not {"stages", "checkpoints"} & set(p.parts)]
    steps = {step: load_named(folder / "checkpoints", step)[1]["['fc']"].tolist() for step in (STEP, "last")}
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if not p.name.startswith("report.")} | steps


def again(config, capsys):
    """The stages that a further call makes."""
    capsys.readouterr()
    pipeline.pipeline(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(lines) == len(STAGES) and [line[1:].split("]")[0] for line in lines] == list(STAGES)
    return {line[1:-1] for line in lines if line.endswith("]")}


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        file.write_bytes(b"")


RESULTS = {  # and the stages that have to make them again: rows and tables are looked at in each call
    "answers.jsonl": {"answers"},
    "data/train": set(),
    "data/train/tokens.npy": set(),
    "data/train/counts.npy": set(),
    "data/held_out/supervised.npy": set(),
    "data/held_out.jsonl": set(),
    "data/tokenizer.json": set(),
    "tables/d2t.npy": set(),
    "tables/t2d.npy": set(),
    "tables/counts.npy": set(),
    "config.json": {"train"},
    "draft.json": {"train"},
    "embedding.npy": {"train"},
    "checkpoints": {"train"},
    f"checkpoints/{STEP}": {"train"},
    f"checkpoints/{STEP}/default/_METADATA": {"train"},
    "exports": {"export"},
    "exports/sglang": {"export"},
    "exports/vllm/config.json": {"export"},
    "exports/vllm/model.safetensors": {"export"},
} | {f"stages/{name.replace(' ', '_')}.json": {name} for name in STAGES}


def test_the_table_names_every_kind_of_result(whole):
    tops = {str(name).split("/")[0] for name in whole[1]} - {str(STEP), "last"}
    besides = {"answers.jsonl.made_from.json"}  # without it the answers are as good
    assert tops - besides <= {name.split("/")[0] for name in RESULTS}


def test_nothing_is_made_again_where_all_is_there(run, whole, capsys):
    assert again(run, capsys) == set()
    assert content(run.folder) == whole[1]


@pytest.mark.parametrize("damage", [remove, empty])
@pytest.mark.parametrize("result", RESULTS)
def test_what_has_gone_or_is_empty_is_made_again_and_nothing_else(run, whole, capsys, result, damage):
    damage(run.folder / result)
    assert again(run, capsys) == RESULTS[result]
    found = content(run.folder)
    assert {name: found.get(name) for name in whole[1]} == whole[1]
    assert again(run, capsys) == set()


def test_an_export_of_something_else_is_made_again(run, whole, capsys):
    path = run.folder / "exports" / "vllm" / "model.safetensors"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert again(run, capsys) == {"export"}
    assert content(run.folder) == whole[1]


def test_what_follows_from_another_checkpoint_is_made_again(run, capsys):
    shutil.rmtree(run.folder / "checkpoints")
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=2)
    checkpoints.save(STEP, {"fc": np.zeros(8, np.float32)})
    checkpoints.close()
    assert again(run, capsys) == {"train", "measure after", "export"}
    assert not any((run.folder / "exports" / "vllm" / "model.safetensors").read_bytes())


OTHERS = {
    "bench": ({"bench__max_new_tokens": 5}, MEASURED),
    "training": ({"train__learning_rate": 0.5}, {"train", "measure after", "export"}),  # an untrained draft has none
    "watching": ({"train__log_every": 7, "train__save_every": 3}, set()),
}
ANOTHER_RUN = {"rows": {"data__row_length": 160}, "answers": {"regenerate__max_new_tokens": 5}}


@pytest.mark.parametrize("other", OTHERS)
def test_results_of_another_configuration_are_made_again(run, capsys, other):
    settings, stages = OTHERS[other]
    assert again(config_of(run.folder.parents[1], **settings), capsys) == stages


@pytest.mark.parametrize("other", ANOTHER_RUN)
def test_other_rows_than_the_trained_ones_are_refused_and_nothing_is_made(run, capsys, other):
    with pytest.raises(UserError, match="was begun with other settings"):
        pipeline.pipeline(config_of(run.folder.parents[1], **ANOTHER_RUN[other]))
    assert again(run, capsys) == set()


def test_a_note_with_values_of_another_kind_counts_as_none(run, capsys):
    note = run.folder / "stages" / "export.json"
    note.write_text('{"made_from": 1, "seconds": 0, "result": [], "files": {}}')
    assert again(run, capsys) == {"export"}


@pytest.mark.parametrize("text", ["[]", "{}", "null", "not JSON"])
def test_a_file_that_is_no_note_is_refused_and_stays(run, text):
    note = run.folder / "stages" / "export.json"
    note.write_text(text)
    with pytest.raises(UserError, match=r"stages/export\.json is no note of a stage"):
        pipeline.pipeline(run)
    assert note.read_text() == text


def test_a_copied_run_reports_its_own_folder(run, capsys):
    copied = dataclasses.replace(run, name="copied")
    shutil.copytree(run.folder, copied.folder)
    shutil.rmtree(run.folder)
    assert again(copied, capsys) == set()
    exports = json.loads((copied.folder / "report.json").read_text())["exports"]
    assert all(Path(place).is_dir() for place in exports.values())
