"""GGUF files give the checkpoint that llama.cpp's converter made them from, entirely and by slices."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jeagle.errors import UserError
from jeagle.targets import TargetFiles, open_weights, resolve
from tests.goldens.make_gguf import HERE, MODELS, seeded_weights

GOLDENS = json.loads((HERE / "models.json").read_text())
# llama.cpp keeps no record that a Llama was called Mistral, and the ids of special tokens belong to its tokenizer.
UNKEPT = {"mistral": {"architectures", "model_type", "sliding_window"}}
IMMATERIAL = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "transformers_version"}


def golden(name: str):
    return open_weights(TargetFiles(name, HERE / f"{name}.gguf", "gguf", ""))


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_that_were_converted(name: str):
    source, expected = golden(name), seeded_weights(GOLDENS[name]["shapes"])
    assert source.names() == sorted(expected)
    for tensor, value in expected.items():
        assert source.shape(tensor) == value.shape
        assert source.dtype(tensor) == np.float32
        np.testing.assert_array_equal(source.read(tensor), value, err_msg=tensor)


@pytest.mark.parametrize("name", MODELS)
def test_slices_are_slices_of_the_whole(name: str):
    source, expected = golden(name), seeded_weights(GOLDENS[name]["shapes"])
    rng = np.random.default_rng(0)
    for tensor, value in expected.items():
        for _ in range(5):
            index = tuple(slice(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in value.shape)
            np.testing.assert_array_equal(source.read(tensor, index), value[index], err_msg=f"{tensor} {index}")


@pytest.mark.parametrize("name", MODELS)
def test_config_means_the_same_to_transformers(name: str):
    from transformers import AutoConfig

    ours = AutoConfig.for_model(**golden(name).config).to_dict()
    theirs = AutoConfig.for_model(**GOLDENS[name]["config"]).to_dict()
    theirs.get("rope_parameters", {}).pop("type", None)  # the old name of rope_type
    same = set(theirs) - IMMATERIAL - UNKEPT.get(name, set())
    if theirs.get("head_dim") is None:
        same -= {"head_dim"}
    assert {key: ours.get(key) for key in same} == {key: theirs[key] for key in same}


def blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Stored rows of any type: random bytes, whose scales are finite numbers wherever they lie among them."""
    size, bytes_each = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // size * bytes_each), dtype=np.uint8)
    if kind == Kind.MXFP4:
        return raw & 0x7F  # an exponent of 127 is 1
    raw[:, 1::2] &= 0x3B  # no float16 among them is large, infinite or not a number
    return raw


KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
KINDS += [Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ3_S, Kind.TQ2_0, Kind.MXFP4, Kind.F16, Kind.BF16]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_decodes_as_the_gguf_package_does(kind: Kind, tmp_path: Path):
    """Rows and columns of a matrix, and of an expert in a stack, whose edges lie within blocks."""
    matrix, stack = blocks(kind, 6, 512), np.stack([blocks(kind, 4, 512)] * 3)
    stack[1] ^= 1
    path = tmp_path / "m.gguf"
    writer = tiny_llama(path)
    writer.add_uint32("llama.expert_count", 3)
    writer.add_uint32("llama.expert_used_count", 2)
    writer.add_tensor("blk.0.attn_v.weight", matrix, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_up_exps.weight", stack, raw_dtype=kind)
    finish(writer)
    source = open_weights(resolve(str(path)))
    for name, stored in (("self_attn.v_proj", matrix), ("block_sparse_moe.experts.1.w3", stack[1])):
        name, expected = f"model.layers.0.{name}.weight", gguf.quants.dequantize(stored, kind)
        assert source.shape(name) == expected.shape and np.isfinite(expected).all() and expected.std() > 0
        for rows, columns in ((slice(0, 4), slice(0, 512)), (slice(1, 3), slice(37, 300)), (slice(2, 3), slice(5, 6))):
            np.testing.assert_array_equal(source.read(name, (rows, columns)), expected[rows, columns])


def tiny_llama(path: Path, **metadata: int) -> gguf.GGUFWriter:
    """A writer with the metadata of one layer and its embedding."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 512, "feed_forward_length": 6}
    for key, value in (sizes | {"attention.head_count": 4} | metadata).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((8, 512), np.float32))
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unsupported_metadata_is_named(tmp_path: Path):
    finish(tiny_llama(tmp_path / "a.gguf", **{"attention.clamp_kqv": 8}))
    with pytest.raises(UserError, match=r"llama\.attention\.clamp_kqv = 8, which jeagle does not support"):
        open_weights(resolve(str(tmp_path / "a.gguf")))


def test_a_type_that_cannot_be_decoded_is_named(tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = tiny_llama(path)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((6, 512), np.int8), raw_dtype=Kind.I8)
    finish(writer)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight in .* is of type I8, which the gguf package cannot"):
        open_weights(resolve(str(path)))
    whole = bytearray(path.read_bytes())
    start = whole.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    whole[start : start + 4] = (999).to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(UserError, match="type number 999"):
        open_weights(resolve(str(path)))


def split(folder: Path, name: str) -> list[Path]:
    """A golden as gguf's writer splits it: three parts, the metadata in the first."""
    reader = gguf.GGUFReader(HERE / f"{name}.gguf")
    writer = gguf.GGUFWriter(folder / "m.gguf", name, split_max_tensors=10)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return sorted(folder.glob("*.gguf"))


def test_split_files_are_one_model(tmp_path: Path):
    parts, expected = split(tmp_path, "qwen3"), golden("qwen3")
    assert len(parts) == 3
    for reference in (tmp_path, parts[0], parts[1]):
        files = resolve(str(reference))
        source = open_weights(files)
        assert files.path == parts[0] and source.config == expected.config
        for name in expected.names():
            np.testing.assert_array_equal(source.read(name), expected.read(name))
    before = files.fingerprint
    content = bytearray(parts[2].read_bytes())
    content[-1] ^= 1
    parts[2].write_bytes(content)
    assert resolve(str(tmp_path)).fingerprint != before
    kept = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())  # a part that was downloaded twice
    with pytest.raises(UserError, match=r"hold \d+ tensors of 25"):
        open_weights(TargetFiles("", parts[0], "gguf", ""))
    parts[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf is cut short at its tensor"):
        open_weights(TargetFiles("", parts[0], "gguf", ""))
    parts[1].unlink()
    with pytest.raises(UserError, match=r"one of 3 parts, and m-00002-of-00003\.gguf is not beside it"):
        resolve(str(tmp_path))


def test_layers_for_multi_token_prediction_are_skipped(tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = tiny_llama(path, block_count=2, nextn_predict_layers=1)
    for layer in (0, 1):
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", np.zeros((6, 512), np.float32))
    writer.add_tensor("blk.1.nextn.eh_proj.weight", np.zeros((6, 512), np.float32))
    finish(writer)
    source = open_weights(resolve(str(path)))
    assert source.names() == ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    assert source.config["num_hidden_layers"] == 1


def test_big_endian_files_are_refused(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    finish(writer)
    with pytest.raises(UserError, match="in big-endian byte order"):
        open_weights(resolve(str(tmp_path / "m.gguf")))
