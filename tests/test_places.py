"""Places in settings and flags: ~ in every one of them, every spelling of the same place, and names of runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from jeagle import bench, data, doctor, export, extract, features, flags, import_draft, preview, report, store
from jeagle.config import RunConfig, TargetConfig, from_json, to_json
from jeagle.errors import UserError
from jeagle.extraction import fill
from jeagle.places import absolute, expanded, place_fields, same_place, with_homes
from jeagle.run import assemble, dataset
from jeagle.run.answers import RegenerateArguments
from jeagle.runtime import host
from jeagle.training import teacher
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")
COMMANDS = (
    *(bench.BenchArguments, doctor.DoctorArguments, export.ExportArguments, export.VllmExportArguments),
    *(import_draft.ImportDraftArguments, preview.PreviewArguments, report.ReportArguments, store.StoreArguments),
    RegenerateArguments,
)
NO_PLACES = {
    *("name", "target.family", "draft.module", "objective.loss", "data.system_prompt", "data.template_arguments"),
    *("data.user_header", "data.assistant_header", "data.end_of_turn"),
    *("step", "part", "family", "server", "system_prompt", "data.columns"),
}
"""Fields with a text that names no file or folder: a new field is listed here, or annotated as a place."""


def texts(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that hold any text."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from texts(hint, f"{prefix}{name}.")
        elif hint in (str, str | None):
            yield prefix + name


@pytest.mark.parametrize("kind", [RunConfig, *COMMANDS])
def test_every_text_is_a_place_or_known_to_be_none(kind):
    undecided = set(texts(kind)) - set(place_fields(kind)) - NO_PLACES
    assert not undecided, f"annotate {undecided} as Place, or add it to NO_PLACES"
    assert not set(place_fields(kind)) & NO_PLACES


def test_commands_read_their_arguments_where_places_are_understood():
    """No other module than these two calls tyro."""
    package = Path(flags.__file__).parent
    callers = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if "tyro.cli(" in p.read_text()}
    assert callers == {"flags.py", "runtime/cli.py"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


SINGLE = [field for field, marks in place_fields(RunConfig).items() if "several" not in marks]


def at(config: Any, field: str) -> Any:
    for name in field.split("."):
        config = getattr(config, name)
    return config


def config_of(*arguments: str) -> RunConfig:
    return flags.from_command_line(["--name", "x", *arguments], program="jeagle x", description="x")


@pytest.mark.parametrize("field", SINGLE)
def test_a_tilde_is_the_home_folder_in_every_setting(home, field):
    config = config_of(f"--{field.replace('_', '-')}=~/a b/x")
    assert at(config, field) == f"{home}/a b/x"
    recipe = home / "recipe.py"
    recipe.write_text(
        f"from jeagle.config import from_json, to_json, RunConfig\n\n\ndef get_config():\n"
        f"    return from_json({to_json(dataclasses.replace(RunConfig(name='x')))!r} | {nested(field, '~/y')!r})\n"
    )
    assert at(flags.from_command_line(["--config=~/recipe.py"], program="x", description="x"), field) == f"{home}/y"


def nested(field: str, value: str) -> dict[str, Any]:
    *group, name = field.split(".")
    return {group[0]: {name: value}} if group else {name: value}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_tilde_is_the_home_folder_in_every_flag(home, kind):
    hints = get_type_hints(kind)
    for name, hint in hints.items():
        marks = place_fields(kind).get(name, ("several",))  # each part of a list is expanded where it is read
        if hint in (Path, Path | None) or "several" not in marks:
            required = {f.name: "x" for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
            args = kind(**required | {name: Path("~/x") if "Path" in str(hint) else "~/x"})
            assert str(getattr(with_homes(args), name)) == f"{home}/x", name


def test_a_tilde_is_the_home_folder_in_every_part_of_a_list(home):
    for name in ("a.jsonl", "b c.jsonl"):
        (home / name).write_text('{"messages": []}\n')
    source = "0.7*~/a.jsonl, 0.3*sharegpt:~/b c.jsonl"
    assert [part.files for part in data.parse_source(source)] == [(home / "a.jsonl",), (home / "b c.jsonl",)]
    assert data.parse_source("~/*.jsonl")[0].files == (home / "a.jsonl", home / "b c.jsonl")
    assert features.Storage("~/store/").path == home / "store"
    out, rest = flags.take_flag(["--out=~/store", "--name", "x"], "--out", "a store")
    assert (out, rest) == (f"{home}/store", ["--name", "x"])


def test_caches_lie_where_the_environment_says(home, monkeypatch):
    for name, value, place in (("XDG_CACHE_HOME", "~/xdg", "xdg/jeagle"), ("JEAGLE_CACHE", "~/c", "c")):
        monkeypatch.setenv(name, value)
        assert host.cache_folder() == home / place


def test_a_home_folder_that_is_not_there_is_refused_and_a_file_of_that_name_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"~nobody-here/x begins with ~"):
        expanded("~nobody-here/x")
    Path("~my file").write_text("mine")
    assert expanded("~my file") == "~my file"
    assert expanded("a/~/b") == "a/~/b"


def test_a_long_list_of_files_is_no_path(tmp_path):
    paths = [tmp_path / f"{'n' * 60}{number}.jsonl" for number in range(100)]
    for path in paths:
        path.write_text('{"messages": []}\n')
    assert [part.files for part in data.parse_source(",".join(map(str, paths)))] == [(path,) for path in paths]


def test_a_store_may_have_a_comma_in_its_name(tmp_path):
    (tmp_path / "a,b").mkdir()
    with pytest.raises(UserError, match=r"There is no store at .*a,b: .*--out '?.*a,b"):
        features.StoreSet(str(tmp_path / "a,b"))


def test_settings_that_are_written_down_are_read_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("target", "qwen", "old"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own.jinja").write_text("x")
    given = {"target.ref": "target/", "draft.start": "./old", "data.template": "own.jinja"}
    config = config_of(*(part for name, value in given.items() for part in (f"--{name}", value)))
    assert config.target.ref == "target/"  # messages say what the user wrote
    written = from_json(json.loads(json.dumps(to_json(config))))
    assert {name: at(written, name) for name in given} == {
        "target.ref": f"{tmp_path}/target",
        "draft.start": f"{tmp_path}/old",
        "data.template": f"{tmp_path}/own.jinja",
    }
    for name in ("qwen", "owner/model", "pypi:x==1", ""):  # a template's name, and what is not there
        assert to_json(config_of("--data.template", name))["data"]["template"] == name
        assert absolute(name, ("place", "or a name")) == name


WRONG_NAMES = ["", ".", "..", "../x", "a/b", "/x", "-x", "a\0b", "a\nb", "a\tb", " a", "a ", "a/"]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_that_leaves_the_folder_of_runs_is_refused(name):
    with pytest.raises(UserError, match="--name"):
        flags.from_command_line([f"--name={name}"], program="x", description="x")


@pytest.mark.parametrize("name", ["a", "my run", "o'clock", 'a"b', "$HOME", "läuft", "..a", "~x", "a;b", "llama-3.1"])
def test_other_names_are_taken(name):
    assert flags.from_command_line([f"--name={name}"], program="x", description="x").name == name


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run's rows, and a store, made from places as they are usually written."""
    folder = tmp_path_factory.mktemp("made")
    extract.main([*tiny.flags(folder, runs=folder / "runs", name="x"), "--out", str(folder / "st ore")])
    return folder


def spellings(folder: Path, name: str) -> dict[str, str]:
    """The same file or folder; the working directory is FOLDER/here, the home folder is FOLDER."""
    slash = "/" * (folder / name).is_dir()
    return {
        "with a slash": f"{folder / name}{slash}",
        "doubled": str(folder / name).replace("/", "//"),
        "with dots": f"{folder}/runs/../{name}",
        "relative": f"../{name}",
        "relative with a dot": f"./../{name}{slash}",
        "from home": f"~/{name}{slash}",
        "a link": f"../links/{name}",
        "a copy": f"../copies/{name}",
    }


@pytest.mark.parametrize("spelling", spellings(Path("x"), "y"))
def test_the_same_files_are_the_same_however_they_are_spelled(made, monkeypatch, capsys, spelling):
    """Rows are found again, a store is known to be complete, and training may read it."""
    for folder in ("here", "links", "copies"):
        (made / folder).mkdir(exist_ok=True)
    for name in ("target", "chats.jsonl", "st ore"):
        if not (made / "links" / name).is_symlink():
            (made / "links" / name).symlink_to(made / name)
            subprocess.run(["cp", "-r", made / name, made / "copies" / name], check=True)
    monkeypatch.chdir(made / "here")
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.setattr(fill.assemble, "load_target", lambda *args: pytest.fail("the store is made again"))
    target, chats, out = (spellings(made, name)[spelling] for name in ("target", "chats.jsonl", "st ore"))
    arguments = tiny.flags(made, runs="../runs", name="x", target__ref=target, data__source=chats)
    extract.main([*arguments, "--out", out])
    said = capsys.readouterr().out
    assert "anew" not in said and "reading" not in said
    config = flags.from_command_line([*arguments, "--features", out], program="x", description="x")
    assert len(teacher.open_stores(config).members) == 1
    assert dataset.prepare(config).reused


def test_a_target_that_is_not_here_is_known_by_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_place("gone", f"{tmp_path}/gone/") and same_place("o/n", "o/n") and not same_place("gone", "other")


def test_a_run_is_measured_from_another_working_directory(tmp_path, monkeypatch):
    """What a run's config.json says of its target holds wherever the command is started."""
    monkeypatch.chdir(tmp_path)
    tiny.flags(tmp_path)
    written = to_json(RunConfig(name="x", target=TargetConfig(ref="target")))
    monkeypatch.chdir(os.sep)
    assert assemble.targets.resolve(from_json(written).target.ref).path == tmp_path / "target"
