"""The model card and jeagle_export.json of an export."""

import dataclasses
import json

from jeagle.exchange import ExportCard
from tests.exchange.drafts import LAYERS, PLAIN, SPECULATORS_ONLY, VLLM_ONLY, card_commands, to_sglang, to_vllm

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


def serving(folder):
    """The servers that the card has a command for, in its order."""
    return [c[0] if c[0] == "vllm" else c[2].split(".")[0] for c in card_commands(folder) if c[0] != "hf"]


def test_the_record_says_where_the_draft_comes_from(tmp_path):
    record = json.loads(
        (to_sglang(PLAIN, tmp_path / "draft", card=KNOWN, dtype="bfloat16") / "jeagle_export.json").read_text()
    )
    assert (record["engine"], record["layout"], record["dtype"]) == ("SGLang", "plain", "bfloat16")
    assert (record["run"], record["step"]) == ("quickstart", 300)
    assert record["template_hash"] == "fedcba9876543210"
    assert record["target"] == {"ref": "someone/tiny", "fingerprint": "0123456789abcdef", "layers": LAYERS}
    assert {"jeagle", "jax", "safetensors"} <= record["versions"].keys()
    assert record["data"] == KNOWN.data
    assert record["limits"] == {"SGLang": [], "vLLM": [], "sglang-jax": []}
    assert type(PLAIN).from_json(record["spec"]) == PLAIN


def test_the_card_holds_commands_that_serve_this_folder(tmp_path):
    out = to_sglang(PLAIN, tmp_path / "a draft", card=KNOWN)
    sglang, vllm, on_tpu, upload = card_commands(out)
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
    text = (to_sglang(PLAIN, tmp_path / "draft", card=KNOWN, dtype="bfloat16") / "README.md").read_text()
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
    assert "Not measured" in (to_sglang(PLAIN, tmp_path / "bare") / "README.md").read_text()
    assert "None" not in (to_sglang(PLAIN, tmp_path / "bare") / "README.md").read_text()


def test_the_card_gives_no_command_that_would_serve_the_draft_wrongly(tmp_path):
    cases = {"norm_before_residual": "plain", "two_layers": "plain", "qk_norm": "speculators"}
    for name, layout in cases.items():
        spec = (VLLM_ONLY | SPECULATORS_ONLY)[name]
        out = to_vllm(spec, tmp_path / name, layout=layout)
        assert serving(out) == ["vllm"]
        assert "SGLang" in (out / "README.md").read_text()
    assert serving(to_vllm(PLAIN, tmp_path / "s")) == ["vllm"]
    assert serving(to_vllm(PLAIN, tmp_path / "p", layout="plain", card=ExportCard())) == ["vllm", "sglang", "sgl_jax"]
    other = dataclasses.replace(PLAIN, aux_layers=(1, 4, 5))
    assert serving(to_sglang(other, tmp_path / "o")) == ["sglang", "vllm"]
    assert "always uses [2, 4, 5]" in (tmp_path / "o" / "README.md").read_text()


def test_layers_of_both_kinds_need_one_group_of_vllms_cache(tmp_path):
    flag = "--disable-hybrid-kv-cache-manager"
    mixed, alike = (to_vllm(VLLM_ONLY[name], tmp_path / name) for name in ("windowed_last_layer", "window"))
    assert card_commands(mixed)[0][-1] == flag
    assert flag not in card_commands(alike)[0]
    assert "of both kinds was checked by reading" in (mixed / "README.md").read_text()


def test_a_target_that_engines_cannot_load_is_a_placeholder(tmp_path):
    for ref in ("pypi:smollm2==1.0", "models/tiny.gguf", None):
        out = to_sglang(PLAIN, tmp_path / "draft", card=ExportCard(target_ref=ref))
        assert all("TARGET" in command for command in card_commands(out) if command[0] != "hf")
        assert "TARGET is" in (out / "README.md").read_text()
