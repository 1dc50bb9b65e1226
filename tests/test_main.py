"""`jeagle COMMAND` is `python -m jeagle.COMMAND`."""

import importlib
import sys
import types

import pytest

from jeagle import __main__ as dispatch
from jeagle.errors import UserError


def test_the_help_has_a_line_for_every_command(capsys):
    for arguments in ([], ["--help"]):
        assert dispatch.main(arguments) == 0
        listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert listed == list(dispatch.COMMANDS)


@pytest.mark.parametrize("name", dispatch.COMMANDS)
def test_every_command_is_a_module_with_a_main(name):
    assert callable(importlib.import_module(f"jeagle.{name}").main)


def test_a_command_gets_the_rest_of_the_arguments(monkeypatch):
    command = types.ModuleType("jeagle.train")
    command.main = lambda arguments: (7, arguments)
    monkeypatch.setitem(sys.modules, "jeagle.train", command)
    assert dispatch.main(["train", "--config", "x", "train"]) == (7, ["--config", "x", "train"])


@pytest.mark.parametrize(("name", "hint"), [("trian", "train"), ("xyz", "pipeline, regenerate")])
def test_an_unknown_command_suggests_one(name, hint):
    with pytest.raises(UserError, match=hint):
        dispatch.main([name])
