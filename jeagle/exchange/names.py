"""The draft's parameters under jeagle's names and under those that engines read, and the turning of kernels.

jeagle keeps a kernel as [in, out], torch as [out, in]. Vectors and rows by a vocabulary (lm_head, embed_tokens) lie
alike in both. The first layer is `midlayer.` in SpecForge's and EAGLE's files and `layers.0.` in speculators'; SGLang
and vLLM take either.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

from jeagle.errors import UserError
from jeagle.joints import DraftSpec

Params = dict[str, np.ndarray]
Shape = tuple[int, ...]
FirstLayer = Literal["midlayer", "layers.0"]

EMBEDDING = "embed_tokens.weight"
OFFSETS = "d2t"
MASK = "t2d"
TABLES = (EMBEDDING, OFFSETS, MASK)
"""Torch names of what is no parameter of the draft: they travel beside it."""


def expected_shapes(spec: DraftSpec) -> dict[str, Shape]:
    """Every parameter of a draft of this spec by jeagle's name, with its shape: kernels [in, out], lm_head [D, W]."""
    fused = len(spec.taps) * spec.target_width
    shapes: dict[str, Shape] = {"fc": (fused, spec.width)}
    if spec.norm_before_fc:
        shapes["input_norm"] = (fused,)
    if spec.fc_norm:
        shapes |= {f"fc_norm.{j}": (spec.target_width,) for j in range(len(spec.taps))}
    for i in range(spec.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer_shapes(spec, first=i == 0).items()}
    return shapes | {"norm": (spec.width,), "lm_head": (spec.draft_vocab, spec.width)}


def _layer_shapes(spec: DraftSpec, *, first: bool) -> dict[str, Shape]:
    width, query, key = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    read = 2 * width if first else width
    shapes: dict[str, Shape] = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    if first:
        shapes["hidden_norm"] = (width,)
    attention: dict[str, Shape] = {"q_proj": (read, query), "k_proj": (read, key), "v_proj": (read, key)}
    attention["o_proj"] = (query, width)
    if spec.attention_bias:
        attention |= {"q_bias": (query,), "k_bias": (key,), "v_bias": (key,), "o_bias": (width,)}
    if spec.qk_norm:
        attention |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    shapes |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    for name in ("gate_proj", "up_proj"):
        shapes[f"mlp.{name}"] = (width, spec.mlp_width)
    return shapes | {"mlp.down_proj": (spec.mlp_width, width)}


def check_params(spec: DraftSpec, params: Mapping[str, np.ndarray], *, where: str = "The draft's parameters") -> None:
    """That `params` are exactly those of the spec, and finite; `where` begins an error's sentence.

    Raises:
      UserError: for a missing, unknown, wrongly shaped or non-finite parameter, naming it.
    """
    expected = expected_shapes(spec)
    _check_names(expected, params, where=where)
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise UserError(f"{where}: {name} is {_text(params[name].shape)}; this draft needs {_text(shape)}.")
        _check_finite(name, params[name], where=where)


def to_torch(spec: DraftSpec, params: Mapping[str, np.ndarray], *, first_layer: FirstLayer) -> Params:
    """jeagle's parameters -> contiguous arrays under torch names, kernels turned to [out, in], dtypes kept.

    Raises:
      UserError: as `check_params`.
    """
    check_params(spec, params)
    return {
        _torch_name(name, first_layer): np.ascontiguousarray(array.T if _is_kernel(name, array.shape) else array)
        for name, array in params.items()
    }


def from_torch(spec: DraftSpec, tensors: Mapping[str, np.ndarray], *, where: str) -> Params:
    """Arrays under torch names -> jeagle's float32 parameters.

    Args:
      tensors: kernels [out, in], names as `canonical` gives them, without those of `TABLES`.
      where: what the tensors come from; begins an error's sentence.

    Raises:
      UserError: for a missing, unknown, wrongly shaped or non-finite tensor, by its torch name.
    """
    expected = {_torch_name(name, "layers.0"): (name, shape) for name, shape in expected_shapes(spec).items()}
    _check_names(expected, tensors, where=where)
    params = {}
    for torch_name, (name, shape) in expected.items():
        array, turned = tensors[torch_name], _is_kernel(name, shape)
        wanted = shape[::-1] if turned else shape
        if array.shape != wanted:
            raise UserError(f"{where}: {torch_name} is {_text(array.shape)}; config.json asks for {_text(wanted)}.")
        params[name] = np.ascontiguousarray((array.T if turned else array).astype(np.float32))
        _check_finite(torch_name, params[name], where=where)
    return params


def check_embedding(spec: DraftSpec, embed_VW: np.ndarray | None, *, where: str) -> None:
    """That a draft of another width than its target brings an embedding, and that one that is there fits.

    Raises:
      UserError: otherwise; `where` begins its sentence.
    """
    shape = (spec.target_vocab, spec.width)
    if embed_VW is None and spec.width != spec.target_width:
        raise UserError(
            f"{where}: {EMBEDDING} is missing; a draft of width {spec.width} cannot read the embedding of a target of "
            f"width {spec.target_width}."
        )
    if embed_VW is not None and embed_VW.shape != shape:
        raise UserError(f"{where}: {EMBEDDING} is {_text(embed_VW.shape)}; this draft needs {_text(shape)}.")
    if embed_VW is not None:
        _check_finite(EMBEDDING, embed_VW, where=where)


def canonical(name: str) -> str:
    """A torch name with the first layer called `layers.0.`, whichever of its two names it came under."""
    return re.sub(r"^midlayer\.", "layers.0.", name)


def _torch_name(name: str, first_layer: FirstLayer) -> str:
    name = re.sub(r"\.([qkvo])_bias$", r".\1_proj.bias", name)
    name = re.sub(r"^layers\.0\.", f"{first_layer}.", name)
    return name if name.endswith(".bias") else f"{name}.weight"


def _is_kernel(name: str, shape: Shape) -> bool:
    return len(shape) == 2 and name != "lm_head"


def _check_names(expected: Collection[str], found: Collection[str], *, where: str) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        hint = f", and {_first(unknown)} is there, which belongs to no such draft" if unknown else ""
        raise UserError(f"{where}: {_first(missing)} is missing{hint}.")
    if unknown:
        raise UserError(f"{where}: {_first(unknown)} belongs to no draft of this configuration.")


def _check_finite(name: str, array: np.ndarray, *, where: str) -> None:
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {name} holds NaN or infinity, so the draft is broken; take an earlier checkpoint.")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
