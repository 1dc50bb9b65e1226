"""Checkpoints published in fp8, int8 or MXFP4 read as the unquantised ones; others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp  # its types, to write fp8 with safetensors
from safetensors.flax import save_file

from jeagle.errors import UserError
from jeagle.targets import TargetFiles, open_weights

RNG = np.random.default_rng(0)
FP8 = ml_dtypes.float8_e4m3fn


def checkpoint(folder: Path, arrays: dict[str, np.ndarray], quantisation: dict[str, Any] | None):
    save_file({name: jnp.asarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    config = {"hidden_size": 4} | ({"quantization_config": quantisation} if quantisation else {})
    (folder / "config.json").write_text(json.dumps(config))
    return open_weights(TargetFiles("", folder, "safetensors", ""))


def fp8(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 50).astype(FP8)


def scales(*shape: int) -> np.ndarray:
    return RNG.uniform(0.001, 2, shape).astype(np.float32)


def slow_product(values: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Number by number, from the definition."""
    out = np.zeros(values.shape, np.float32)
    for *lead, i, j in np.ndindex(values.shape):
        out[(*lead, i, j)] = np.float32(values[(*lead, i, j)]) * scale[(*lead, i // block[0], j // block[1])]
    return out


def check_slices(source, name: str, expected: np.ndarray) -> None:
    assert source.shape(name) == expected.shape
    assert source.dtype(name) == expected.dtype
    np.testing.assert_array_equal(source.read(name), expected)
    for _ in range(20):
        index = tuple(slice(*sorted(RNG.integers(0, size + 1, 2).tolist())) for size in expected.shape)
        np.testing.assert_array_equal(source.read(name, index), expected[index], err_msg=str(index))


BLOCKS = {"quant_method": "fp8", "weight_block_size": [4, 6], "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.mark.parametrize("shape", [(8, 12), (9, 13), (3, 5), (2, 9, 13)])  # whole blocks, cut ones, a stack of experts
def test_blocks_of_fp8(shape: tuple[int, ...], tmp_path: Path):
    grid = (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 6))
    values, scale, plain = fp8(*shape), scales(*grid), np.ones((3, 3), ml_dtypes.bfloat16)
    arrays = {"a.weight": values, "a.weight_scale_inv": scale, "lm_head.weight": plain}
    source = checkpoint(tmp_path, arrays, BLOCKS)
    assert source.names() == ["a.weight", "lm_head.weight"]
    assert "quantization_config" not in source.config
    check_slices(source, "a.weight", slow_product(values, scale, (4, 6)))
    check_slices(source, "lm_head.weight", plain)


def test_scales_that_are_powers_of_two(tmp_path: Path):
    exponents = np.array([[126, 127], [128, 130]], np.uint8)
    values = fp8(8, 12)
    source = checkpoint(tmp_path, {"a.weight": values, "a.weight_scale_inv": exponents}, BLOCKS)
    check_slices(source, "a.weight", slow_product(values, 2.0 ** (exponents.astype(np.float32) - 127), (4, 6)))


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantisation", "shape", "block"),
    [
        (compressed(strategy="tensor"), (1,), (9, 13)),
        (compressed(strategy="channel"), (9, 1), (1, 13)),
        (compressed(strategy="block", block_structure=[4, 6]), (3, 3), (4, 6)),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (9, 1), (1, 13)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, (), (9, 13)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (), (9, 13)),
    ],
)
def test_scales_of_a_weight_or_of_its_rows(quantisation: dict, shape: tuple, block: tuple, tmp_path: Path):
    values, scale = fp8(9, 13), scales(*shape)
    scale_name = "a.weight_scale_inv" if quantisation["quant_method"] == "fp8" else "a.weight_scale"
    beside = {"a.input_scale": scales(1), "k_proj.k_scale": scales(1), "norm.weight": scales(5), "a.bias": scales(9)}
    source = checkpoint(tmp_path, {"a.weight": values, scale_name: scale, **beside}, quantisation)
    assert source.names() == ["a.bias", "a.weight", "norm.weight"]
    grid = (-(-9 // block[0]), -(-13 // block[1]))
    check_slices(source, "a.weight", slow_product(values, scale.reshape(grid), block))


def test_int8_weights(tmp_path: Path):
    values = RNG.integers(-127, 128, (9, 13)).astype(np.int8)
    scale = scales(9, 1)
    quantisation = compressed(type="int") | {"format": "int-quantized"}
    source = checkpoint(tmp_path, {"a.weight": values, "a.weight_scale": scale}, quantisation)
    check_slices(source, "a.weight", slow_product(values, scale, (1, 13)))


def slow_mxfp4(blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """[E, rows, groups, 16] -> [E, groups * 32, rows]: sign, two bits of exponent and one of mantissa a number."""
    out = np.zeros((blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1]))
    for e, row, group, byte in np.ndindex(blocks.shape):
        for half, code in enumerate((int(blocks[e, row, group, byte]) & 15, int(blocks[e, row, group, byte]) >> 4)):
            sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
            size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            scale = 2.0 ** (int(exponents[e, row, group]) - 127)
            out[e, group * 32 + byte * 2 + half, row] = sign * size * scale
    return out.astype(ml_dtypes.bfloat16)


def test_mxfp4_experts(tmp_path: Path):
    blocks = RNG.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    exponents = RNG.integers(110, 135, (2, 6, 3), dtype=np.uint8)
    bias = np.ones((2, 6), ml_dtypes.bfloat16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    arrays = {f"{name}_blocks": blocks, f"{name}_scales": exponents, f"{name}_bias": bias}
    source = checkpoint(tmp_path, arrays, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert source.names() == [name, f"{name}_bias"]
    check_slices(source, name, slow_mxfp4(blocks, exponents))
    check_slices(source, f"{name}_bias", bias)


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        *(({"quant_method": m}, rf"quantised \({m}\), which is not supp") for m in ("awq", "gptq", "bitsandbytes")),
        ({}, "fp8 tensor a.weight, but its config.json has no quantization_config"),
        (compressed() | {"format": "pack-quantized"}, r"compressed-tensors, pack-quantized\)"),
        (compressed(num_bits=4), "compressed-tensors, 4 bits"),
        (compressed(symmetric=False), "compressed-tensors, asymmetric"),
        (compressed() | {"transform_config": {"config_groups": {}}}, "compressed-tensors, transform_config"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        (BLOCKS, r"a\.weight of float8_e4m3fn has no scales beside it"),
    ],
)
def test_what_is_not_supported_is_named(quantisation: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        checkpoint(tmp_path, {"a.weight": fp8(4, 6)}, quantisation)


@pytest.mark.parametrize(
    ("arrays", "quantisation", "message"),
    [
        ({"a.weight": fp8(9, 13), "a.weight_scale_inv": scales(2, 2)}, BLOCKS, r"\(2, 2\), which fits neither"),
        (
            {"a.weight_packed": np.ones((4, 2), np.int32)},
            compressed(),
            "a.weight_packed has a layout that is not supported",
        ),
        ({"x_blocks": np.ones((1, 2, 1, 16), np.uint8)}, {"quant_method": "mxfp4"}, "x_blocks, but no x_scales"),
        (
            {"x_blocks": np.ones((1, 2, 1, 8), np.uint8), "x_scales": np.ones((1, 2, 1), np.uint8)},
            {"quant_method": "mxfp4"},
            "are not MXFP4's",
        ),
    ],
)
def test_tensors_that_do_not_fit_together_are_named(arrays: dict, quantisation: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        checkpoint(tmp_path, arrays, quantisation)
