"""Weights of GGUF files are read entirely and by slices, and damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jeagle.errors import UserError
from jeagle.targets import TargetFiles, open_weights, resolve

GOLDEN = Path(__file__).parents[2] / "goldens" / "smollm2_135m.npz"
WIDTH, MLP, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 40, 4, 2, 16, 2
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
SHAPES = {
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "attn_q": (Q, WIDTH),
    "attn_k": (KV, WIDTH),
    "attn_v": (KV, WIDTH),
    "attn_output": (WIDTH, Q),
    "ffn_gate": (MLP, WIDTH),
    "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
}
METADATA = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "rope.freq_base": 5e5,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def tiny_tensors() -> dict[str, np.ndarray]:
    """A tiny Llama under GGUF's names, its rows in Hugging Face's order."""
    rng = np.random.default_rng(0)
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def as_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tensors: dict, kind: Kind = Kind.F32, metadata: dict | None = None, arch: str = "llama"):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (METADATA | (metadata or {})).items():
        add = {float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_uint32)
        add(f"{arch}.{key}", value)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    for name, value in tensors.items():
        for part, heads in (("attn_q.", HEADS), ("attn_k.", KV_HEADS)):
            value = as_llama_cpp(value, heads) if part in name else value
        stored = kind if value.ndim == 2 else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_tiny(path: Path, *arguments, **options):
    write_gguf(path, *arguments, **options)
    return open_weights(resolve(str(path)))


@pytest.mark.parametrize(
    ("kind", "error"), [(Kind.F32, 0), (Kind.F16, 1e-3), (Kind.BF16, 1e-2), (Kind.Q8_0, 0.02), (Kind.Q4_1, 0.25)]
)
def test_gguf_gives_back_what_was_written(kind: Kind, error: float, tmp_path: Path):
    tensors = tiny_tensors()
    source = open_tiny(tmp_path / "m.gguf", tensors, kind)
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    assert len(source.names()) == len(tensors)
    for name, stored in expected.items():
        assert source.shape(name) == tensors[stored].shape
        assert source.read(name).dtype == np.float32
        np.testing.assert_allclose(source.read(name), tensors[stored], atol=error)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_gguf_slices_are_slices_of_the_whole(kind: Kind, tmp_path: Path):
    source = open_tiny(tmp_path / "m.gguf", tiny_tensors(), kind)
    for name in source.names():
        whole = source.read(name)
        for rows, columns in ((slice(8, 24), slice(None)), (slice(None), slice(32, 64)), (slice(3, 9), slice(5, 37))):
            index = (rows, columns)[: whole.ndim]
            np.testing.assert_array_equal(source.read(name, index), whole[index])


def test_gguf_config(tmp_path: Path):
    tensors = tiny_tensors()
    config = open_tiny(tmp_path / "m.gguf", tensors).config
    expected = {"architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": VOCAB, "head_dim": HEAD_DIM}
    expected |= {"num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": None}
    expected |= {"tie_word_embeddings": False, "eos_token_id": [2, 7], "max_position_embeddings": 128}
    assert {key: config[key] for key in expected} == expected
    del tensors["output.weight"]
    assert open_tiny(tmp_path / "tied.gguf", tensors).config["tie_word_embeddings"] is True


def llama3_divisors() -> np.ndarray:
    wavelength = 2 * np.pi * 5e5 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def test_gguf_llama3_rope(tmp_path: Path):
    tensors = tiny_tensors() | {"rope_freqs.weight": llama3_divisors()}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    assert open_tiny(tmp_path / "m.gguf", tensors).config["rope_scaling"] == scaling
    tensors["rope_freqs.weight"] = llama3_divisors() + np.float32(0.1)
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        open_tiny(tmp_path / "other.gguf", tensors)


@pytest.mark.parametrize("key", METADATA)
@pytest.mark.parametrize("value", ["7", float("nan"), float("inf")])
def test_metadata_of_the_wrong_kind_is_named(tmp_path: Path, key: str, value):
    with pytest.raises(UserError, match=rf"has the metadata llama\.{key} = .*; it must be a number"):
        open_tiny(tmp_path / "m.gguf", tiny_tensors(), metadata={key: value})


def test_unsupported_gguf_files_are_refused(tmp_path: Path):
    tensors = tiny_tensors()
    with pytest.raises(UserError, match=r"architecture mamba; supported in GGUF: deepseek2, .*llama"):
        open_tiny(tmp_path / "a.gguf", tensors, arch="mamba")
    with pytest.raises(UserError, match=r"lacks the metadata llama\.expert_used_count"):
        open_tiny(tmp_path / "b.gguf", tensors, metadata={"expert_count": 4})
    with pytest.raises(UserError, match=r"blk\.0\.attn_q_norm\.weight"):
        open_tiny(tmp_path / "c.gguf", tensors | {"blk.0.attn_q_norm.weight": np.ones(HEAD_DIM, np.float32)})
    source = open_tiny(tmp_path / "d.gguf", {n: t for n, t in tensors.items() if n != "blk.1.ffn_up.weight"})
    with pytest.raises(UserError, match=r"d\.gguf has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        source.shape("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        UserError, match=r"blk\.0\.attn_k\.weight in .*e\.gguf has 32 rows, but the file's metadata makes it 64"
    ):
        open_tiny(tmp_path / "e.gguf", tensors, metadata={"attention.head_count_kv": 4})


def test_truncated_gguf_names_the_tensor_or_the_file(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf", tiny_tensors())
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 20, 200, 700, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:length])
        message = r"cut short at its tensor \S+\.weight" if length > len(whole) // 4 else r"cut\.gguf"
        with pytest.raises(UserError, match=message):
            open_weights(TargetFiles("cut", cut, "gguf", ""))


def test_smollm2s_first_layer_is_that_of_transformers(smollm2_files: TargetFiles):
    """One layer in plain numpy, straight from the formulas: rows of q and k in the right order, every type decoded."""
    golden, source = np.load(GOLDEN), open_weights(smollm2_files)
    x = source.read("model.embed_tokens.weight")[golden["ids"]]
    np.testing.assert_array_equal(x[golden["positions"]], golden["hidden"][0])

    def weight(name: str) -> np.ndarray:
        return source.read(f"model.layers.0.{name}.weight")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + source.config["rms_norm_eps"]) * weight(name)

    def rotated(x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None, None] / source.config["rope_theta"] ** (np.arange(32) / 32)
        low, high = np.split(x, 2, -1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    h = norm(x, "input_layernorm")
    q, k, v = ((h @ weight(f"self_attn.{n}_proj").T).reshape(len(x), -1, 64) for n in "qkv")
    q, k, v = rotated(q).reshape(len(x), 3, 3, 64), rotated(k), v
    scores = np.einsum("tgrc,sgc->grts", q, k) / 8 + np.triu(np.full((len(x), len(x)), -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads = np.einsum("grts,sgc->tgrc", weights / weights.sum(-1, keepdims=True), v).reshape(len(x), -1)
    x = x + heads @ weight("self_attn.o_proj").T
    h = norm(x, "post_attention_layernorm")
    gate, up = h @ weight("mlp.gate_proj").T, h @ weight("mlp.up_proj").T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ weight("mlp.down_proj").T
    np.testing.assert_allclose(x[golden["positions"]], golden["hidden"][1], atol=1e-5 * golden["hidden_max"][1])
