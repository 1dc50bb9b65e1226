"""The command line of commands that take a run's settings."""

import contextlib
import importlib
import re
import runpy
from pathlib import Path

import pytest

from jeagle import __main__, flags
from jeagle.config import RunConfig, from_json, to_json
from jeagle.errors import UserError

COMMANDS = ("train", "prepare", "extract", "import_features")
CONVERTERS = sorted((Path(__file__).parents[1] / "converters").glob("*.py"))


def shown(command: str, capsys) -> set[str]:
    """The fields that a command's --help lists, as flags spell them."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"jeagle.{command}").main(["--help"])
    assert ended.value.code == 0
    listed = re.findall(r"^\W{1,3}--([a-z][a-z0-9.-]*)", capsys.readouterr().out, re.MULTILINE)
    return set(listed) - {"help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_a_command_reads_and_nothing_else_without_a_recipe(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    reads = [read.replace("_", "-") for read in importlib.import_module(f"jeagle.{command}").READS]
    wanted = {path for path in flags.field_paths() if any(path == r or path.startswith(f"{r}.") for r in reads)}
    assert shown(command, capsys) == wanted
    for read in reads:  # no entry of the list names nothing
        assert any(path == read or path.startswith(f"{read}.") for path in flags.field_paths()), read


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_the_help_of_every_command_names_it(command, capsys):
    for arguments in (["--help"], ["-h"]):
        with contextlib.suppress(SystemExit):
            assert not __main__.main([command, *arguments])
        usage = capsys.readouterr().out.partition("\n")[0]
        assert re.match(rf"usage: (python -m jeagle\.|jeagle ){command}\b", usage), usage


@pytest.mark.parametrize("path", CONVERTERS, ids=lambda path: path.name)
def test_the_help_of_every_converter_names_it_and_no_other(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert not ended.value.code and said.startswith(f"usage: {path.name} ")
    assert [other.name for other in CONVERTERS if other.name in said] == [path.name]


def test_help_shows_the_values_of_the_recipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        importlib.import_module("jeagle.prepare").main(["--config", "configs/smollm2_135m.py", "--help"])
    assert "(default: quickstart)" in capsys.readouterr().out


def config_of(*arguments: str) -> RunConfig:
    return flags.from_command_line(arguments, program="jeagle x", description="x")


def test_a_recipe_is_optional_and_a_name_is_not():
    assert config_of("--name", "mine", "--train.batch_rows", "4").train.batch_rows == 4
    for arguments in ((), ("--name", "")):
        with pytest.raises(UserError, match="needs --name NAME"):
            config_of(*arguments)


def test_the_target_has_the_spelling_of_other_commands_too():
    assert config_of("--name", "x", "--target", "DIR").target.ref == "DIR"
    assert config_of("--name", "x", "--target=DIR").target.ref == "DIR"


def test_fresh_is_taken_in_either_spelling():
    for flag in ("--fresh", "--no-resume-from-checkpoint"):
        assert flags.take_fresh(["--name", "x", flag]) == (True, ["--name", "x"])
    assert flags.take_fresh(["--name", "x"]) == (False, ["--name", "x"])


@pytest.mark.parametrize(("old", "new"), flags.RENAMED_FLAGS.items())
def test_a_flag_that_was_renamed_is_named(old, new):
    assert new in flags.field_paths()
    with pytest.raises(UserError, match=f"--{old} is called --{new} now"):
        config_of("--name", "x", f"--{old}", "1")


def test_a_flag_that_does_not_exist_has_the_nearest_one_suggested():
    with pytest.raises(UserError, match=r"did you mean --train\.learning-rate\?"):
        config_of("--name", "x", "--train.lerning-rate", "1")


def test_settings_of_earlier_versions_are_read():
    tree = to_json(RunConfig(name="x"))
    tree["target"] = {"ref": "DIR", "taps": [1, 2, 3]}
    tree["store"] = {"taps": "int8", "last": "fp8", "taps_at": "all"}
    tree["data"]["rewritten"] = "set_aside"
    config = from_json(tree)
    assert config.target.aux_layers == (1, 2, 3)
    assert (config.store.aux_dtype, config.store.last_dtype, config.data.rewritten) == ("int8", "fp8", "reject")
    with pytest.raises(UserError, match=r"does not know: train\.stepz"):
        from_json(tree | {"train": {"stepz": 1}})
