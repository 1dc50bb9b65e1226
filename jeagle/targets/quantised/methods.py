"""Checkpoints that were published quantised, read as the unquantised checkpoints that they represent.

Weights are float32 or bfloat16 numbers. Activations are not quantised; where a server rounds them to fp8 as well, its
numbers differ from these by that rounding.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.quantised.views import Computed, Index, StoredArray, View, full_index, swapped

Arrays = Mapping[str, StoredArray]
_FP8 = {np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)}
_ONE_BYTE = _FP8 | {np.dtype(np.int8)}
# Scales for activations and for a KV cache, which are not quantised here.
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")
# Tensors of methods that pack or reorder weights in ways that are not supported.
_PACKED = ("weight_packed", "qweight", "weight_g_idx", "weight_zero_point", "weight_scale_2", "weight_global_scale")
_COMPRESSED = {"float-quantized", "naive-quantized", "int-quantized"}
_MXFP4_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_MXFP4_VALUES = np.concatenate([_MXFP4_VALUES, -_MXFP4_VALUES])
_MXFP4_BYTES, _MXFP4_GROUP, _MXFP4_BIAS = 16, 32, 127


def dequantised(arrays: Arrays, quantisation: Mapping[str, Any] | None, folder: Path) -> dict[str, View]:
    """Returns the views of an unquantised checkpoint, by the names of its tensors.

    Args:
      arrays: the tensors in the checkpoint's files.
      quantisation: quantization_config of config.json; None if it has none.
      folder: the checkpoint, for messages.

    Raises:
      UserError: for a method that is not supported, and for tensors that do not fit together.
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
    for name, view in sorted(views.items()):
        if name.endswith(_PACKED):
            raise UserError(
                f"The target {folder} is quantised ({method}), and its tensor {name} has a layout that is not "
                "supported: give the original bfloat16 model, or a GGUF."
            )
        if view.dtype in _ONE_BYTE:
            raise UserError(
                f"The target {folder} is quantised ({method}), and its tensor {name} of {view.dtype} has no scales "
                "beside it: is its download complete?"
            )
    return views


def _scaled_weights(arrays: Arrays, block: tuple[int, int] | None) -> dict[str, View]:
    """Multiplies every array of one-byte numbers by its scales; the scales themselves are not among the views."""
    views: dict[str, View] = {name: array for name, array in arrays.items() if not name.endswith(_OF_ACTIVATIONS)}
    for name, array in arrays.items():
        scales = next((name + end for end in ("_scale_inv", "_scale") if name + end in arrays), None)
        if scales and array.dtype in _ONE_BYTE and len(array.shape) > 1:
            views[name] = scaled(array, arrays[scales], block)
            del views[scales]
    return views


def _compressed_tensors(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    """vLLM's method: eight symmetric bits, with a `weight_scale` for the weight, for each row, or for each block."""
    groups = list((quantisation.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    blocks = {_pair(weight.get("block_structure")) for weight in weights}
    sparsity = (quantisation.get("sparsity_config") or {}).get("format", "dense")
    kinds = {group.get("format") or quantisation.get("format") for group in groups}
    wrong = [str(kind) for kind in kinds - _COMPRESSED]
    wrong += [f"{weight['num_bits']} bits" for weight in weights if weight and weight.get("num_bits") != 8]
    wrong += ["asymmetric" for weight in weights if weight.get("symmetric") is False]
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
    """NVIDIA's method, of which only the algorithm FP8 is supported: one `weight_scale` for each weight."""
    algorithm = quantisation.get("quant_algo")
    if algorithm != "FP8":
        raise UserError(
            f"The target {folder} is quantised (modelopt, {algorithm}), which is not supported: give the original "
            "bfloat16 model, its FP8 one, or a GGUF."
        )
    return _scaled_weights(arrays, None)


def _mxfp4(arrays: Arrays, quantisation: Mapping[str, Any], folder: Path) -> dict[str, View]:
    """gpt-oss's method: the tensor X is stored as `X_blocks` and `X_scales`."""
    views: dict[str, View] = dict(arrays)
    for name in arrays:
        weight = name.removesuffix("_blocks")
        if weight == name:
            continue
        if (scales := f"{weight}_scales") not in arrays:
            raise UserError(f"The target {folder} has the tensor {name}, but no {scales}: download it again.")
        views[weight] = mxfp4_experts(arrays[name], arrays[scales])
        del views[name], views[scales]
    return views


def _pair(size: Any) -> tuple[int, int] | None:
    return (int(size[0]), int(size[1])) if size else None


def scaled(values: StoredArray, scales: StoredArray, block: tuple[int, int] | None) -> View:
    """Returns the float32 products of a matrix, or a stack of matrices, and the scale of each of its blocks.

    Args:
      values: [..., out, in], fp8 or int8.
      scales: one for each block of `block` = (rows, columns), one for each row, or one. Leading axes may be 1; blocks
        at the far edges may be smaller.

    Raises:
      UserError: where the shape of the scales is none of these.
    """
    *lead, rows, columns = values.shape
    sizes = [(1, columns), (rows, columns)]
    fitting = [
        (grid, size)
        for size in ([block, *sizes] if block else sizes)
        for grid in ((*axes, -(-rows // size[0]), -(-columns // size[1])) for axes in (lead, (1,) * len(lead)))
        if [n for n in scales.shape if n != 1] == [n for n in grid if n != 1]
    ]
    if not fitting:
        raise UserError(
            f"The scales {scales.name} in {scales.path} are {scales.shape}, which fits neither the weight "
            f"{values.name} of {values.shape} nor its blocks of {block}: download the model again."
        )
    grid, (high, wide) = fitting[0]

    def read(index: Index) -> np.ndarray:
        rows, columns = index[-2:]
        product = values.read(index).astype(np.float32)
        stored = scales.read(full_index(None, scales.shape))  # all of them, since they are few
        if stored.dtype == np.uint8:  # exponents of two, plus 127
            stored = stored.view(ml_dtypes.float8_e8m0fnu)
        stored = stored.astype(np.float32).reshape(grid)
        stored = np.broadcast_to(stored, (*lead, *grid[-2:]))[index[:-2]]
        factors = np.take(stored, np.arange(rows.start, rows.stop) // high, axis=-2)
        for number in range(columns.start // wide, -(-columns.stop // wide)):  # block by block, without a second array
            start, stop = max(number * wide, columns.start), min((number + 1) * wide, columns.stop)
            product[..., start - columns.start : stop - columns.start] *= factors[..., number : number + 1]
        return product

    return Computed(values.shape, np.dtype(np.float32), read)


def mxfp4_experts(blocks: StoredArray, scales: StoredArray) -> View:
    """Returns the weight of the unquantised checkpoint, gate_up_proj [E, H, 2F] or down_proj [E, F, H].

    It is bfloat16, which represents every MXFP4 number exactly. Two numbers of four bits share a byte, and 32 numbers
    share an exponent.

    Args:
      blocks: uint8 [..., rows, groups, 16]; the low half of a byte comes first.
      scales: uint8 [..., rows, groups], exponents of two plus 127.

    Raises:
      UserError: where shapes or types are not those of MXFP4.

    Source: the OCP Microscaling specification (E2M1 with E8M0 scales); transformers' integrations/mxfp4.py for the
    layout.
    """
    right = blocks.shape[-1:] == (_MXFP4_BYTES,) and blocks.shape[:-1] == scales.shape
    if not right or {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}:
        raise UserError(
            f"The tensors {blocks.name} {blocks.shape} and {scales.name} {scales.shape} in {blocks.path} are not "
            f"MXFP4's [..., {_MXFP4_BYTES}] and [...] of bytes: download the model again."
        )
    dtype = np.dtype(ml_dtypes.bfloat16)

    def read(index: Index) -> np.ndarray:
        *lead, columns = index
        groups = slice(columns.start // _MXFP4_GROUP, -(-columns.stop // _MXFP4_GROUP))
        packed = blocks.read((*lead, groups, slice(0, _MXFP4_BYTES)))
        exponents = scales.read((*lead, groups)).astype(np.int32) - _MXFP4_BIAS
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], _MXFP4_GROUP)
        numbers = np.ldexp(_MXFP4_VALUES[halves], exponents[..., None]).astype(dtype)
        numbers = numbers.reshape(*packed.shape[:-2], packed.shape[-2] * _MXFP4_GROUP)
        start = columns.start - groups.start * _MXFP4_GROUP
        return numbers[..., start : start + columns.stop - columns.start]

    return swapped(Computed((*scales.shape[:-1], scales.shape[-1] * _MXFP4_GROUP), dtype, read))


METHODS: dict[str, Callable[[Arrays, Mapping[str, Any], Path], dict[str, View]]] = {
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": lambda arrays, quantisation, folder: _scaled_weights(arrays, None),
    # DeepSeek's method: `weight_scale_inv` has a scale for each block of weight_block_size, or one for the weight.
    "fp8": lambda arrays, quantisation, folder: _scaled_weights(arrays, _pair(quantisation.get("weight_block_size"))),
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
