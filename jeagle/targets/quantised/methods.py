"""Checkpoints that were published quantised, shown as the unquantised ones that they stand for.

Weights come out as numbers in float32 or bfloat16. Activations are not quantised: where a server rounds them to fp8
too, its numbers differ from these by that rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.quantised.mxfp4 import experts
from jeagle.targets.quantised.scaled import scaled
from jeagle.targets.quantised.storage import StoredArray
from jeagle.targets.quantised.views import View

Arrays = Mapping[str, StoredArray]
_FP8 = {np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)}
_ONE_BYTE = _FP8 | {np.dtype(np.int8)}
# Scales of activations and of the cache that a server would quantise.
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
# What stands beside weights that are packed or reordered in ways that are not undone here.
_PACKED = ("weight_packed", "qweight", "weight_g_idx", "weight_zero_point", "weight_scale_2", "weight_global_scale")
_COMPRESSED = {"float-quantized", "naive-quantized", "int-quantized"}


def dequantised(arrays: Arrays, quantisation: Mapping[str, Any] | None, folder: Path) -> dict[str, View]:
    """Name -> view, by the names of an unquantised checkpoint.

    Args:
      quantisation: config.json's quantization_config, None if it has none.
      folder: the checkpoint, for messages.

    Raises:
      UserError: for a method that is not supported, naming it, or tensors that do not fit together.
    """
    if quantisation is None:
        loose = sorted(name for name, array in arrays.items() if array.dtype in _FP8)
        if loose:
            raise UserError(
                f"The target {folder} has the fp8 tensor {loose[0]}, but its config.json has no quantization_config to "
                "say how it is scaled: copy the model's own config.json there."
            )
        return dict(arrays)
    method = str(quantisation.get("quant_method", "unnamed"))
    if method not in METHODS:
        raise UserError(
            f"The target {folder} is quantised ({method}), which is not supported in safetensors (supported: "
            f"{', '.join(METHODS)}): give the original bfloat16 model, or a GGUF."
        )
    views = METHODS[method](arrays, quantisation, folder)
    _refuse_packed(views, method, folder)
    return views


def _refuse_packed(views: Mapping[str, View], method: str, folder: Path) -> None:
    for name, view in sorted(views.items()):
        if name.endswith(_PACKED):
            raise UserError(
                f"The target {folder} is quantised ({method}), and its tensor {name} lies in a way that is not "
                "supported: give the original bfloat16 model, or a GGUF."
            )
        if view.dtype in _ONE_BYTE:
            raise UserError(
                f"The target {folder} is quantised ({method}), and its tensor {name} of {view.dtype} has no scales "
                "beside it: is its download complete?"
            )


def _scaled_weights(arrays: Arrays, block: tuple[int, int] | None) -> dict[str, View]:
    """Every array of one byte a number that has scales, times them; the scales themselves fall away."""
    views: dict[str, View] = {name: array for name, array in arrays.items() if not name.endswith(_OF_ACTIVATIONS)}
    for name, array in arrays.items():
        found = next((name + end for end in ("_scale_inv", "_scale") if name + end in arrays), None)
        if found and array.dtype in _ONE_BYTE and len(array.shape) > 1:
            views[name] = scaled(array, arrays[found], block)
            del views[found]
    return views


def _fine_grained(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    """DeepSeek's: `weight` with `weight_scale_inv` for each block of weight_block_size, or one for the whole."""
    return _scaled_weights(arrays, _pair(quantisation.get("weight_block_size")))


def _by_row(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    return _scaled_weights(arrays, None)


def _compressed_tensors(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    """vLLM's: eight bits, symmetric, with `weight_scale` for the whole, each row, or each block."""
    groups = list((quantisation.get("config_groups") or {}).values())
    blocks = {_pair((group.get("weights") or {}).get("block_structure")) for group in groups}
    sparsity = (quantisation.get("sparsity_config") or {}).get("format", "dense")
    wrong = [
        str(kind) for kind in {group.get("format") or quantisation.get("format") for group in groups} - _COMPRESSED
    ]
    wrong += [f"{w['num_bits']} bits" for group in groups if (w := group.get("weights")) and w.get("num_bits") != 8]
    wrong += ["asymmetric" for group in groups if (group.get("weights") or {}).get("symmetric") is False]
    wrong += [sparsity] if sparsity not in ("dense", None) else []
    wrong += ["transform_config"] if quantisation.get("transform_config") else []
    wrong += ["blocks of several sizes"] if len(blocks - {None}) > 1 else []
    if wrong:
        raise UserError(
            f"The target {folder} is quantised (compressed-tensors, {wrong[0]}), which is not supported: give the "
            "original bfloat16 model, one of 8 bits, or a GGUF."
        )
    return _scaled_weights(arrays, next(iter(blocks - {None}), None))


def _modelopt(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    """NVIDIA's: of its algorithms only FP8, with one `weight_scale` for a whole weight."""
    algorithm = quantisation.get("quant_algo")
    if algorithm != "FP8":
        raise UserError(
            f"The target {folder} is quantised (modelopt, {algorithm}), which is not supported: give the original "
            "bfloat16 model, its FP8 one, or a GGUF."
        )
    return _scaled_weights(arrays, None)


def _mxfp4(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    """gpt-oss: `X_blocks` and `X_scales` for X."""
    views: dict[str, View] = dict(arrays)
    for name in arrays:
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            if whole + "_scales" not in arrays:
                raise UserError(f"The target {folder} has the tensor {name}, but no {whole}_scales: download it again.")
            views[whole] = experts(arrays[name], arrays[whole + "_scales"])
            del views[name], views[whole + "_scales"]
    return views


def _pair(size: Any) -> tuple[int, int] | None:
    return (int(size[0]), int(size[1])) if size else None


METHODS: dict[str, Callable[[Arrays, Mapping[str, Any], Path], dict[str, View]]] = {
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _by_row,
    "fp8": _fine_grained,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
