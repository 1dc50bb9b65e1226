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
from jeagle.exchange.stream import Readable
from jeagle.interfaces import DraftSpec

Params = dict[str, np.ndarray]
Shape = tuple[int, ...]
FirstLayer = Literal["midlayer", "layers.0"]

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
OFFSETS = "d2t"
MASK = "t2d"
TABLES = (EMBEDDING, OFFSETS, MASK)
"""Torch names of what is no parameter of the draft: they travel beside it."""


def expected_shapes(spec: DraftSpec) -> dict[str, Shape]:
    """Every parameter of a draft of this spec by jeagle's name, with its shape: kernels [in, out], lm_head [D, W]."""
    fused = len(spec.aux_layers) * spec.target_width
    shapes: dict[str, Shape] = {"fc": (fused, spec.width)}
    if spec.norm_before_fc:
        shapes["input_norm"] = (fused,)
    if spec.fc_norm:
        shapes |= {f"fc_norm.{j}": (spec.target_width,) for j in range(len(spec.aux_layers))}
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


def check_params(spec: DraftSpec, params: Mapping[str, Readable], *, where: str = "The draft's parameters") -> None:
    """That `params` are exactly those of the spec, by name and shape; `where` begins an error's sentence.

    Raises:
      UserError: for a missing, unknown or wrongly shaped parameter, naming it.
    """
    expected = expected_shapes(spec)
    check_names(expected, params, where=where)
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise UserError(f"{where}: {name} is {text(params[name].shape)}; this draft needs {text(shape)}.")


def check_embedding(spec: DraftSpec, shape: Shape | None, *, where: str) -> None:
    """That a draft of another width than its target brings an embedding, and that one that is there fits.

    Args:
      shape: of the embedding; None where there is none.

    Raises:
      UserError: otherwise; `where` begins its sentence.
    """
    wanted = (spec.target_vocab, spec.width)
    if shape is None and spec.width != spec.target_width:
        raise UserError(
            f"{where}: {EMBEDDING} is missing; a draft of width {spec.width} cannot read the embedding of a target of "
            f"width {spec.target_width}."
        )
    if shape not in (None, wanted):
        raise UserError(f"{where}: {EMBEDDING} is {text(shape)}; this draft needs {text(wanted)}.")


def canonical(name: str) -> str:
    """A torch name as speculators has it: without the prefixes that some put first, and the first layer `layers.0.`."""
    return re.sub(r"^midlayer\.", "layers.0.", re.sub(r"^(module\.)?(model\.)?", "", name))


def torch_name(name: str, first_layer: FirstLayer) -> str:
    """jeagle's name of a parameter -> torch's."""
    name = re.sub(r"\.([qkvo])_bias$", r".\1_proj.bias", name)
    name = re.sub(r"^layers\.0\.", f"{first_layer}.", name)
    return name if name.endswith(".bias") else f"{name}.weight"


def is_kernel(name: str, shape: Shape) -> bool:
    """Whether jeagle and torch keep a parameter turned against one another."""
    return len(shape) == 2 and name not in ("lm_head", EMBEDDING)


def check_names(expected: Collection[str], found: Collection[str], *, where: str) -> None:
    """UserError, naming one, where a name is missing or belongs to no such draft."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        hint = f", and {_first(unknown)} is there, which belongs to no such draft" if unknown else ""
        raise UserError(f"{where}: {_first(missing)} is missing{hint}.")
    if unknown:
        raise UserError(f"{where}: {_first(unknown)} belongs to no draft of this configuration.")


def check_finite(name: str, array: np.ndarray, *, where: str) -> None:
    """UserError, naming the array, where it holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {name} holds NaN or infinity, so the draft is broken; take an earlier checkpoint.")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def text(shape: Shape) -> str:
    """A shape as people write it: [4, 8]."""
    return "[" + ", ".join(map(str, shape)) + "]"
