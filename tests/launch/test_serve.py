"""Scripts that start a server with a run's export: the command is the one on the export's card; what they refuse."""

import dataclasses
import json
import shlex
import sys

import pytest

from tests.exchange.drafts import CARD, PLAIN, VLLM_ONLY, card_commands, to_sglang, to_vllm
from tests.launch.test_launch import LAUNCH, launch

KNOWN = dataclasses.replace(CARD, target_ref="someone/a model")
WRITERS = {"serve_sglang.sh": (to_sglang, "sglang"), "serve_vllm.sh": (to_vllm, "vllm")}


def run_with(script, tmp_path, spec=PLAIN, card=KNOWN, **settings):
    write, engine = WRITERS[script]
    write(spec, tmp_path / "a run" / "exports" / engine, card=card, **settings)
    return tmp_path / "a run"


def serve(script, *arguments):
    return launch(script, *map(str, arguments), PYTHON=sys.executable)


def printed(script, *arguments):
    done = serve(script, *arguments, "--print-only")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    return shlex.split(line)


@pytest.mark.parametrize("script", WRITERS)
def test_the_command_is_the_one_on_the_exports_card(script, tmp_path):
    run = run_with(script, tmp_path)
    on_card = card_commands(run / "exports" / WRITERS[script][1])[0]
    assert same(printed(script, "--run", run), on_card)


def test_layers_of_both_kinds_are_served_with_the_flag_on_the_card(tmp_path):
    run = run_with("serve_vllm.sh", tmp_path, VLLM_ONLY["windowed_last_layer"])
    on_card = card_commands(run / "exports" / "vllm")[0]
    assert printed("serve_vllm.sh", "--run", run)[-1] == on_card[-1] == "--disable-hybrid-kv-cache-manager"


def same(ours, theirs):
    """Equal up to the order of flags, and the spaces of JSON."""
    pairs = lambda c: {a: json.loads(b) if b[:1] == "{" else b for a, b in zip(c[3::2], c[4::2], strict=True)}  # noqa: E731
    return ours[:3] == theirs[:3] and pairs(ours) == pairs(theirs)


def test_sglang_jax_takes_the_same_folder(tmp_path):
    run = run_with("serve_sglang.sh", tmp_path)
    ours = printed("serve_sglang.sh", "--run", run)
    assert printed("serve_sglang.sh", "--run", run, "--jax") == [*ours[:2], "sgl_jax.launch_server", *ours[3:]]


def test_what_is_given_overrules_what_the_export_says(tmp_path):
    export = run_with("serve_sglang.sh", tmp_path) / "exports" / "sglang"
    line = printed("serve_sglang.sh", "--export", export, "--target", "my/own", "--draft-tokens", 5)
    flags = dict(zip(line[3::2], line[4::2], strict=True))
    assert (flags["--model-path"], flags["--speculative-draft-model-path"]) == ("my/own", str(export))
    assert (flags["--speculative-num-steps"], flags["--speculative-num-draft-tokens"]) == ("5", "6")


@pytest.mark.parametrize("script", WRITERS)
def test_what_follows_the_dashes_goes_to_the_server(script, tmp_path):
    line = launch(
        script, "--run", str(run_with(script, tmp_path)), "--print-only", "--", "--port", "1 2", PYTHON=sys.executable
    )
    assert shlex.split(line.stdout)[-2:] == ["--port", "1 2"]


REFUSED = {
    "no run": (["--draft-tokens", "3"], "--run is missing"),
    "no value": (["--run"], "--run needs a value"),
    "no export": (["--run", "{empty}"], "is not an export of jeagle. Run python converters/"),
    "no number": (["--run", "{run}", "--draft-tokens", "some"], "--draft-tokens is 'some'"),
    "no option": (["--run", "{run}", "--port", "1"], "there is no option --port"),
    "no target": (["--run", "{run}", "--target", "pypi:a==1"], "cannot load the target 'pypi:a==1'"),
}


@pytest.mark.parametrize("script", WRITERS)
@pytest.mark.parametrize("fault", REFUSED)
def test_bad_arguments_are_refused_in_a_sentence(script, fault, tmp_path):
    arguments, sentence = REFUSED[fault]
    places = {"{run}": run_with(script, tmp_path), "{empty}": tmp_path}
    done = serve(script, *[places.get(a, a) for a in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def test_an_export_that_the_engine_does_not_serve_is_refused(tmp_path):
    run = run_with("serve_sglang.sh", tmp_path, dataclasses.replace(PLAIN, fc_norm=True))
    done = serve("serve_sglang.sh", "--run", run, "--jax")
    assert done.returncode == 2 and "fc_norm" in done.stderr
    vllms = to_vllm(PLAIN, tmp_path / "speculators")
    done = serve("serve_sglang.sh", "--export", vllms)
    assert done.returncode == 2 and "speculators' layout" in done.stderr


def test_a_broken_record_is_a_sentence(tmp_path):
    run = run_with("serve_vllm.sh", tmp_path)
    (run / "exports" / "vllm" / "jeagle_export.json").write_text("{")
    done = serve("serve_vllm.sh", "--run", run)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", WRITERS)
def test_help_shows_every_option(script):
    done = launch(script, "--help")
    lines = [line.strip() for name in (script, "serving.sh") for line in (LAUNCH / name).read_text().splitlines()]
    read = {o for line in lines if line.startswith("--") and ")" in line for o in line.split(")")[0].split(" | ")}
    own = {"--jax"} & set((LAUNCH / script).read_text().split())
    assert done.returncode == 0 and read >= {"--run", "--print-only"}
    assert all(option in done.stdout for option in (read | own) - {"--", "-h"})
