"""Where a model's folder has its chat templates, which one is used, and how another one is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jeagle import data, targets
from jeagle.config import DataConfig, RunConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.exporting.target_files import open_target
from jeagle.run import dataset
from jeagle.targets.checkpoint.reference import TargetFiles
from jeagle.targets.tokenizers.load import chat_templates
from tests import tiny


def template(name: str) -> str:
    """ChatML that names itself, so that a text says which one was used."""
    return f"{{{{ '[{name}]' }}}}{tiny.CHATML}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A target without any chat template."""
    made = tiny.write_target(tmp_path / "target")
    (made / "chat_template.jinja").unlink()
    return made


def settings(folder: Path, value: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))


def jinja(folder: Path, name: str = "") -> None:
    path = folder / "additional_chat_templates" / f"{name}.jinja" if name else folder / "chat_template.jinja"
    path.parent.mkdir(exist_ok=True)
    path.write_text(template(name or "jinja"))


def processor(folder: Path, value: Any = None) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": value or template("processor")}))


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template(f"settings {name}")} for name in names]


def entries(*names: str) -> dict[str, str]:
    return {name: template(f"settings {name}") for name in names}


FORMS = {  # what the folder has -> the template that is used, those by name, and whether transformers agrees
    "one text": ([lambda f: settings(f, template("settings"))], "settings", (), True),
    "jinja beside it": ([lambda f: settings(f, template("settings")), jinja], "jinja", (), True),
    "a list": ([lambda f: settings(f, named("default", "rag"))], "settings default", ("default", "rag"), True),
    "an object": ([lambda f: settings(f, entries("default", "rag"))], "settings default", ("default", "rag"), True),
    "a list of one": ([lambda f: settings(f, named("default"))], "settings default", (), False),
    "jinja beside a list": ([lambda f: settings(f, named("default", "rag")), jinja], "jinja", (), True),
    "more in jinja": ([jinja, lambda f: jinja(f, "rag")], "jinja", ("default", "rag"), True),
    "more in jinja beside a text": (
        [lambda f: settings(f, template("settings")), lambda f: jinja(f, "rag")],
        "settings",
        ("default", "rag"),
        False,  # it would have no default
    ),
    "a processor's": ([processor], "processor", (), False),
    "a processor's by name": ([lambda f: processor(f, named("default"))], "settings default", (), False),
    "a processor's beside a text": ([processor, lambda f: settings(f, template("settings"))], "settings", (), True),
    "a processor's beside jinja": ([processor, jinja], "jinja", (), True),
    "none": ([], None, (), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_template_of_a_folder_is_the_one_that_servers_use(folder, form):
    makers, used, names, agrees = FORMS[form]
    for make in makers:
        make(folder)
    own = targets.load_tokenizer(TargetFiles("target", folder, "safetensors", ""))
    assert (set(own.chat_template) if isinstance(own.chat_template, dict) else set()) == set(names)
    if used is None:
        assert own.chat_template is None
    else:
        text = own.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        assert text.startswith(f"[{used}]")
    if agrees:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template
        assert own.chat_template == theirs


@pytest.mark.parametrize("value", [7, True, ["x"], [{"name": "default"}], {"default": 1}, [{"template": "x"}]])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_of_another_kind_is_named(tmp_path, file, value):
    (tmp_path / file).write_text(json.dumps({"chat_template": value}))
    with pytest.raises(UserError, match=f"{file} has a chat_template that is neither"):
        chat_templates(tmp_path)


def run(folder: Path, source: str, rows: list[dict[str, Any]], **settings: Any) -> RunConfig:
    path = folder.parent / source
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = DataConfig(source=str(path), row_length=64, held_out=0.0, **settings)
    return RunConfig(name=source, runs=str(folder.parent / "runs"), target=TargetConfig(ref=str(folder)), data=made)


def prepared_text(folder: Path, **settings: Any) -> str:
    chats = [{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "a mat"}]}]
    config = run(folder, "chats.jsonl", chats, **settings)
    rows = data.load_rows(dataset.prepare(config).data / "train")
    tokenizer = targets.load_tokenizer(TargetFiles("target", folder, "safetensors", ""))
    return tokenizer.decode(rows.tokens_BT[0])


def test_one_of_several_is_chosen_by_its_name(folder):
    settings(folder, named("default", "rag", "qwen"))
    assert prepared_text(folder).startswith("[settings default]")
    assert prepared_text(folder, template="rag").startswith("[settings rag]")
    assert prepared_text(folder, template="qwen").startswith("[settings qwen]")  # its own, before jeagle's
    assert prepared_text(folder, template="chatml").startswith("<|im_start|>")
    with pytest.raises(UserError, match=r"no template rga: did you mean rag\?"):
        prepared_text(folder, template="rga")


def test_several_without_a_default_need_a_choice(folder):
    settings(folder, named("rag", "tool_use"))
    with pytest.raises(UserError, match=r"several chat templates and no default.*--data\.template \(rag, tool_use\)"):
        prepared_text(folder)
    assert prepared_text(folder, template="rag").startswith("[settings rag]")


def test_conversations_need_a_template_and_texts_do_not(folder):
    with pytest.raises(UserError, match="has no chat template: choose one with --data.template"):
        prepared_text(folder)
    config = run(folder, "texts.jsonl", [{"text": "the cat sat on a mat"}])
    assert dataset.prepare(config).statistics["train"]["documents"] == 1
    assert dataset.prepare(config).reused
    assert data.template_hash(dataset.load_tokenizer(config, open_target(config.target).files)) == ""
