"""Weights as published checkpoints store them: MXFP4 experts, fp8 with scales, experts fused into one tensor.

Each format takes the tensors of a checkpoint and gives (what is stored, what it stands for, what config.json says).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
Format = Callable[[Tensors], tuple[Tensors, Tensors, dict[str, Any]]]
GROUP = 32  # weights that share a scale in MXFP4
BLOCK = 16  # of rows and of columns that share a scale; 128 in published fp8 checkpoints
LARGEST_FP8 = 448.0
# What published fp8 checkpoints leave alone, beside all that is not a matrix.
UNQUANTISED = re.compile(r"embed_tokens|lm_head|norm|mlp\.gate\.|vision|multi_modal")


def mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """gpt-oss: experts [E, I, O] become blocks [E, O, I / 32, 16], two values a byte, and scales [E, O, I / 32]."""
    stored, plain = dict(tensors), dict(tensors)
    for name in [n for n in tensors if re.search(r"experts\.(gate_up|down)_proj$", n)]:
        blocks, scales = _to_mxfp4(stored.pop(name).float().transpose(1, 2))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return stored, plain, {"quant_method": "mxfp4", "modules_to_not_convert": skipped}


def _to_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weights.unflatten(-1, (-1, GROUP))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2  # the largest FP4 value is 6
    distance = (groups[..., None] / torch.exp2(exponent)[..., None] - torch.tensor(FP4_VALUES)).abs()
    codes = distance.argmin(-1).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), (exponent[..., 0] + 127).to(torch.uint8)


def fp8_block(tensors: Tensors, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """DeepSeek: float8_e4m3 with a scale for each block of rows and columns, the last ones cut short."""
    stored, plain = dict(tensors), dict(tensors)
    for name in _quantised(tensors):
        weight = tensors[name].float()
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        largest = padded.abs().unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).amax((1, 3))
        scales = (largest / LARGEST_FP8).to(scale_dtype)
        spread = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        stored[name] = _to_fp8(weight / spread)
        stored[f"{name}_scale_inv"] = scales
        plain[name] = stored[name].float() * spread
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    return stored, plain, said


def fp8_block_bfloat16(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Qwen3: the same with scales in bfloat16."""
    return fp8_block(tensors, torch.bfloat16)


def fp8_tensor(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Ministral 3: float8_e4m3 with one scale a matrix, and one for its input, which weight-only use ignores."""
    stored, plain = dict(tensors), dict(tensors)
    for name in _quantised(tensors):
        scale = (tensors[name].float().abs().max() / LARGEST_FP8).bfloat16()
        stored[name] = _to_fp8(tensors[name].float() / scale.float())
        stored[f"{name}_scale_inv"] = scale
        stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.25).bfloat16()
        plain[name] = stored[name].float() * scale.float()
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    said = {"activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None}
    return stored, plain, said | {"modules_to_not_convert": skipped}


def fused_experts(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Qwen3.5-MoE: all experts of a layer in gate_up_proj [E, 2F, H] and down_proj [E, H, F]."""
    stored = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for first in [n for n in tensors if n.endswith(".experts.0.gate_proj.weight")]:
        prefix = first.removesuffix("0.gate_proj.weight")
        count = len([n for n in tensors if n.startswith(prefix) and n.endswith("gate_proj.weight")])
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{i}.{kind}_proj.weight"] for i in range(count)])
            for kind in ("gate", "up", "down")
        )
        stored |= {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    return stored, tensors, {}


def _quantised(tensors: Tensors) -> list[str]:
    return [n for n, t in tensors.items() if t.ndim == 2 and n.endswith(".weight") and not UNQUANTISED.search(n)]


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)


FORMATS: dict[str, Format] = {
    "mxfp4": mxfp4,
    "fp8_block": fp8_block,
    "fp8_block_bfloat16": fp8_block_bfloat16,
    "fp8_tensor": fp8_tensor,
    "fused_experts": fused_experts,
}
