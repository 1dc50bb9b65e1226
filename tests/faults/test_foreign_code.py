"""What a target's folder, an export or a report holds is data: its code never runs, its values are never options."""

from __future__ import annotations

import ast
import html
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jeagle.errors import UserError
from jeagle.report import render
from jeagle.runtime.cli import shell_word
from jeagle.targets import load_tokenizer, resolve
from jeagle.targets.checkpoint import download
from tests import tiny
from tests.launch.test_launch import launch
from tests.launch.test_serve import KNOWN, WRITERS, run_with, serve

ROOT = Path(__file__).parents[2]
TEXTS = (".py", ".md", ".sh", ".jinja", ".toml", ".yaml", ".json", ".txt")
DASH = "--trust-remote-code"


def sources():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = files.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return [ROOT / name for name in names if name.endswith(TEXTS) and (ROOT / name).is_file()]


def calls(tree: ast.AST):
    """(name of the called function or method, call) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def may_run_code(name: str, call: ast.Call) -> bool:
    """Whether a call of a loader leaves it open that a folder's own code runs."""
    if name == "from_config" and not ast.unparse(call.func).split(".")[-2:][0].startswith("Auto"):
        return False
    given = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in ("from_pretrained", "from_config"):
        return given.get("trust_remote_code") != "False"
    if name == "load" and ast.unparse(call.func) in ("np.load", "numpy.load", "torch.load"):
        return given.get("allow_pickle", "False") != "False" or given.get("weights_only", "True") != "True"
    return name == "get_class_from_dynamic_module" or given.get("trust_remote_code", "False") != "False"


def test_every_loader_says_that_a_folders_code_is_not_trusted():
    found, wrong = 0, []
    for path in sources():
        if path.suffix != ".py":
            continue
        for name, call in calls(ast.parse(path.read_text("utf-8"))):
            found += name == "from_pretrained"
            if may_run_code(name, call):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found >= 10 and not wrong


@pytest.mark.parametrize(
    "line",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "getattr(transformers, name).from_pretrained(folder, **settings)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=trusted)",
        "transformers.AutoModelForCausalLM.from_config(config)",
        "pipeline(model, trust_remote_code=True)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_the_law_sees_a_loader_that_trusts(line):
    assert next(may_run_code(*call) for call in calls(ast.parse(line)))


def test_data_sets_are_read_by_a_library_that_runs_no_scripts():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [version] = [re.fullmatch(r"datasets>=(\d+)\..*", line) for line in wanted if line.startswith("datasets")]
    assert version and int(version[1]) >= 4


def test_no_text_advises_to_trust_a_folders_code():
    mentions = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in sources()
        if path.parent != Path(__file__).parent
        for found in re.finditer(r"trust.remote.code.{0,8}", path.read_text("utf-8"), re.IGNORECASE)
    ]
    assert mentions and all("trust_remote_code=False" in mention for mention in mentions)


# How a folder may ask for its own code, by file: each alone, and all together.
WISHES = {
    "tokenizer, as a list": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}},
    "tokenizer, in the old form": {"tokenizer_config.json": {"auto_map": ["evil.Evil", None]}},
    "tokenizer, of another repository": {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["some/one--evil.Evil", None]}}
    },
    "tokenizer, damaged": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": []}}},
    "configuration": {"config.json": {"auto_map": {"AutoConfig": "evil.EvilConfig"}}},
    "configuration of an unknown kind": {
        "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    },
}
WISHES["all"] = {
    "tokenizer_config.json": WISHES["tokenizer, as a list"]["tokenizer_config.json"],
    "config.json": WISHES["configuration of an unknown kind"]["config.json"]
    | {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("plain") / "target")


def evil(folder: Path, wish: str, own_class: bool) -> Path:
    """The tiny target once more, with code that leaves a file RAN where it runs."""
    tiny.write_target(folder)
    for name, fields in WISHES[wish].items():
        path = folder / name
        more = {"tokenizer_class": "Evil"} if own_class and name == "tokenizer_config.json" else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | fields | more))
    code = (
        f"open({str(folder / 'RAN')!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig: pass\nclass EvilModel: pass\n"
    )
    (folder / "evil.py").write_text(code)
    return folder


class Asked(io.StringIO):
    """Standard input that says yes to everything, and remembers that it was asked."""

    asked = False

    def readline(self, *_):
        self.asked = True
        return "y\n"


@pytest.mark.parametrize("own_class", [True, False], ids=["its own class", "a known class"])
@pytest.mark.parametrize("wish", WISHES)
def test_a_folder_with_code_works_with_its_ordinary_parts(tmp_path, monkeypatch, plain, wish, own_class):
    folder = evil(tmp_path / "target", wish, own_class)
    monkeypatch.setattr(sys, "stdin", answers := Asked())
    tokenizer, ordinary = load_tokenizer(resolve(str(folder))), load_tokenizer(resolve(str(plain)))
    text = "the cat sat<|im_end|> on 7 über-stones"
    assert tokenizer(text).input_ids == ordinary(text).input_ids
    chat = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == ordinary.apply_chat_template(chat, tokenize=False)
    assert tokenizer.eos_token_id == ordinary.eos_token_id
    assert not answers.asked and not (folder / "RAN").exists()


def test_a_tokenizer_that_is_only_code_is_refused_in_a_sentence(tmp_path, monkeypatch):
    folder = evil(tmp_path / "target", "tokenizer, as a list", True)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    monkeypatch.setattr(sys, "stdin", answers := Asked())
    with pytest.raises(UserError, match=r"needs Python code of that folder, which jeagle never runs: put") as refused:
        load_tokenizer(resolve(str(folder)))
    assert "trust" not in str(refused.value)
    assert not answers.asked and not (folder / "RAN").exists()


@pytest.mark.parametrize("reference", [DASH, "-x", " --config", "--index-url=x==1"])
def test_a_target_that_begins_with_a_dash_is_refused(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    tiny.write_target(tmp_path / reference.strip())  # even where it exists
    with pytest.raises(UserError, match="begins with a dash"):
        resolve(reference)
    assert resolve(f"./{reference.strip()}").format == "safetensors"


@pytest.mark.parametrize("ref", [DASH, f" {DASH}", "-x", "--config=evil.yaml"])
@pytest.mark.parametrize("script", WRITERS)
def test_a_target_that_an_export_names_is_never_an_option_of_the_server(script, tmp_path, ref):
    run = run_with(script, tmp_path, card=KNOWN)
    record = run / "exports" / WRITERS[script][1] / "jeagle_export.json"
    tree = json.loads(record.read_text())
    record.write_text(json.dumps(tree | {"target": tree["target"] | {"ref": ref}}))
    refused(serve(script, "--run", run, "--print-only"), "--target")


OPTIONS = {
    "serve_vllm.sh": ["--run", "--export", "--target"],
    "serve_sglang.sh": ["--run", "--export", "--target"],
    "tpu_pod.sh": ["--name", "--zone", "--project", "--folder"],
}


@pytest.mark.parametrize(("script", "option"), [(s, o) for s, options in OPTIONS.items() for o in options])
def test_a_value_of_a_launch_script_is_never_an_option(script, option, tmp_path):
    given = dict.fromkeys(OPTIONS[script], "a")
    if script in WRITERS:
        run = run_with(script, tmp_path)
        given = {"--run": str(run), "--export": str(run / "exports" / WRITERS[script][1]), "--target": "my/own"}
    words = [word for name, value in (given | {option: DASH}).items() for word in (name, value)]
    refused(launch(script, "--print-only", *words, "--", "true", PYTHON=sys.executable), f"{option} is '{DASH}'")


@pytest.mark.parametrize(
    ("script", "options"), [("tpu_pod.sh", ["--name", "n", "--zone", "z"]), ("slurm.sh", []), ("gpu_node.sh", [])]
)
def test_a_command_of_a_launch_script_is_never_an_option(script, options):
    refused(launch(script, "--print-only", *options, "--", "-c", "true"), "the command '-c' begins with a dash")


def refused(done, sentence):
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def test_pip_gets_values_that_it_cannot_take_for_options(tmp_path, monkeypatch):
    commands = []

    def started(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "No matching distribution")

    monkeypatch.setattr(download.subprocess, "run", started)
    with pytest.raises(UserError, match="no wheel"):
        download._pip_download("a==1", tmp_path / "wheel")
    [command] = commands
    assert command[-2:] == ["--", "a==1"] and f"--dest={tmp_path / 'wheel'}" in command


@pytest.mark.parametrize("value", [DASH, "-x y", "a b", "$(true)"])
def test_commands_that_are_written_down_hold_no_options_from_files(value):
    [word] = shlex.split(shell_word(value))
    assert word in (value, f"./{value}") and not word.startswith("-")
    exports = {"sglang": f"{value}/sglang", "vllm": f"{value}/vllm"}
    page = render({"target": value, "exports": exports}, [], None)
    blocks = [
        shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"<pre>(.*?)</pre>", html.unescape(page), re.S)
    ]
    assert len(blocks) == 2
    assert all(word in block for block in blocks) and not any(value in block for block in blocks if value[0] == "-")
