"""A draft's tensors: their names and shapes here and in torch files, and the vocabulary tables d2t and t2d.

jeagle stores a kernel as [in, out], torch as [out, in]. Vectors and tables with one row for each token (lm_head,
embed_tokens) have the same shape in both. The files of SpecForge and EAGLE call the first layer `midlayer.`, those of
speculators `layers.0.`; SGLang and vLLM load both.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec

TensorShape = tuple[int, ...]
FirstLayer = Literal["midlayer", "layers.0"]

LM_HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
D2T = "d2t"
T2D = "t2d"
TABLES = (EMBEDDING, D2T, T2D)
"""Torch names of the tensors that are stored with a draft and are not its parameters."""


@runtime_checkable
class Readable(Protocol):
    """A parameter: a numpy array, or an object that reads an array from storage each time it is indexed."""

    @property
    def shape(self) -> TensorShape: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that `read` reads from storage, or computes, each time it is indexed with `...` or a slice of rows."""

    shape: TensorShape
    read: Callable[[Any], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read(index)


def expected_shapes(spec: DraftSpec) -> dict[str, TensorShape]:
    """Returns the shape of every parameter of a draft by jeagle's name: kernels are [in, out], lm_head is [D, W]."""
    fused = len(spec.aux_layers) * spec.target_width
    shapes: dict[str, TensorShape] = {"fc": (fused, spec.width)}
    if spec.norm_before_fc:
        shapes["input_norm"] = (fused,)
    if spec.fc_norm:
        shapes |= {f"fc_norm.{a}": (spec.target_width,) for a in range(len(spec.aux_layers))}
    width, query, key = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for i in range(spec.layers):
        read = 2 * width if i == 0 else width  # the first layer reads the token's embedding beside the state
        layer: dict[str, TensorShape] = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (read, query),
            "self_attn.k_proj": (read, key),
            "self_attn.v_proj": (read, key),
            "self_attn.o_proj": (query, width),
            "mlp.gate_proj": (width, spec.mlp_width),
            "mlp.up_proj": (width, spec.mlp_width),
            "mlp.down_proj": (spec.mlp_width, width),
        }
        if i == 0:
            layer["hidden_norm"] = (width,)
        if spec.attention_bias:
            sizes = {"q": query, "k": key, "v": key, "o": width}
            layer |= {f"self_attn.{kernel}_bias": (size,) for kernel, size in sizes.items()}
        if spec.qk_norm:
            layer |= {"self_attn.q_norm": (spec.head_dim,), "self_attn.k_norm": (spec.head_dim,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm": (width,), "lm_head": (spec.draft_vocab, width)}


def canonical_tensor_name(name: str) -> str:
    """Returns a torch name as speculators writes it: without `module.` and `model.`, the first layer as `layers.0.`."""
    return re.sub(r"^midlayer\.", "layers.0.", re.sub(r"^(module\.)?(model\.)?", "", name))


def torch_name(name: str, first_layer: FirstLayer) -> str:
    """Returns torch's name of a parameter from jeagle's."""
    name = re.sub(r"\.([qkvo])_bias$", r".\1_proj.bias", name)
    name = re.sub(r"^layers\.0\.", f"{first_layer}.", name)
    return name if name.endswith(".bias") else f"{name}.weight"


def is_transposed(name: str, shape: TensorShape) -> bool:
    """Returns whether torch stores the parameter as the transpose of jeagle's, as it does with every kernel."""
    return len(shape) == 2 and name not in ("lm_head", EMBEDDING)


def check_params(spec: DraftSpec, params: Mapping[str, Any]) -> None:
    """Checks that `params`, each of them `Readable`, are exactly the parameters of the spec, by name and shape.

    Raises:
      UserError: for a missing, unknown or wrongly shaped parameter. The message names it.
    """
    check_shapes(expected_shapes(spec), params, where="The draft's parameters")


def check_embedding(spec: DraftSpec, shape: TensorShape | None, *, where: str) -> None:
    """Checks the draft's own embedding: one is needed where the draft and the target differ in width.

    Args:
      shape: of the embedding; None where there is none.
      where: begins the error's sentence.

    Raises:
      UserError: for an embedding that is missing and needed, or that is not [V, W].
    """
    wanted = (spec.target_vocab, spec.width)
    if shape is None and spec.width != spec.target_width:
        raise UserError(
            f"{where}: {EMBEDDING} is missing; a draft of width {spec.width} cannot read the embedding of a target of "
            f"width {spec.target_width}."
        )
    if shape not in (None, wanted):
        raise UserError(f"{where}: {EMBEDDING} has the shape {list(shape or ())}; this draft needs {list(wanted)}.")


def check_shapes(expected: Mapping[str, TensorShape], tensors: Mapping[str, Any], *, where: str) -> None:
    """Raises UserError, naming one tensor, for one that is missing, unknown or wrongly shaped; `where` begins the
    sentence."""

    def first(names: list[str]) -> str:
        return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"

    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        hint = f", and the unknown tensor {first(unknown)} is present" if unknown else ""
        raise UserError(f"{where}: {first(missing)} is missing{hint}.")
    if unknown:
        raise UserError(f"{where}: a draft of this configuration has no tensor {first(unknown)}.")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            stored = list(tensors[name].shape)
            raise UserError(f"{where}: {name} has the shape {stored}; a draft of this configuration has {list(shape)}.")


def check_finite(name: str, array: Shaped[np.ndarray, "..."], *, where: str) -> None:
    """Raises UserError, naming the array, where it contains NaN or infinity; `where` begins the sentence."""
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {name} contains NaN or infinity, so the draft is broken; use an earlier checkpoint.")


def same_embedding(one: Readable, other: Readable, vocab: int) -> bool:
    """Returns whether two embeddings [V, W] are equal up to rounding to bfloat16; rows are compared block by block."""
    blocks = (slice(start, start + 8192) for start in range(0, vocab, 8192))
    pairs = ((np.asarray(one[rows], np.float32), np.asarray(other[rows], np.float32)) for rows in blocks)
    return all(np.allclose(*pair, rtol=2.0**-8, atol=1e-30) for pair in pairs)


def check_draft_vocabulary(
    spec: DraftSpec, draft_to_target_D: Shaped[np.ndarray, "..."] | None
) -> Int[np.ndarray, " D"]:
    """Returns the target's token id of each entry of the draft vocabulary as int64.

    Args:
      draft_to_target_D: these ids; None for a full vocabulary, where they are 0 to V - 1.

    Raises:
      UserError: where a reduced vocabulary has no ids, or they are not D integers below V that rise strictly.
    """
    if draft_to_target_D is None:
        if spec.draft_vocab < spec.target_vocab:
            raise UserError(
                f"The draft vocabulary has {spec.draft_vocab} entries of the target's {spec.target_vocab}, but there "
                "is no map of ids (d2t), so that an engine would use the first ids: give the map that the draft was "
                "trained with."
            )
        return np.arange(spec.target_vocab, dtype=np.int64)
    ids_D = np.asarray(draft_to_target_D)
    if ids_D.shape != (spec.draft_vocab,) or ids_D.dtype.kind not in "iu":
        raise UserError(
            f"The draft's map of ids has the type {ids_D.dtype} and the shape {list(ids_D.shape)}; it needs "
            f"{spec.draft_vocab} integers."
        )
    ids_D = ids_D.astype(np.int64)
    if (np.diff(ids_D) <= 0).any() or ids_D[0] < 0 or ids_D[-1] >= spec.target_vocab:
        raise UserError(
            f"The ids in the draft's map of ids must rise strictly, from 0 or above, and be below {spec.target_vocab}; "
            f"they are {ids_D.min()} to {ids_D.max()}. Give the target's ids themselves, not their offsets (d2t)."
        )
    return ids_D


def vocabulary_tables(
    spec: DraftSpec, draft_to_target_D: Shaped[np.ndarray, "..."] | None
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Returns the tables that engines read: d2t, int64 offsets [D] with target id = i + d2t[i], and t2d, bool [V].

    The dict is empty for a full vocabulary: vLLM 0.32.0 has no parameter for its offsets and refuses a file that
    contains them, and SGLang takes a missing map as the identity.

    Raises:
      UserError: as `check_draft_vocabulary`.
    """
    ids_D = check_draft_vocabulary(spec, draft_to_target_D)
    if spec.draft_vocab == spec.target_vocab:
        return {}
    t2d_V = np.zeros(spec.target_vocab, dtype=bool)
    t2d_V[ids_D] = True
    return {D2T: ids_D - np.arange(spec.draft_vocab), T2D: t2d_V}


def draft_vocabulary(
    spec: DraftSpec, d2t_D: Shaped[np.ndarray, "..."] | None, t2d_V: Shaped[np.ndarray, "..."] | None, *, where: str
) -> Int[np.ndarray, " D"]:
    """Returns the target's token ids, int64 [D]: the inverse of `vocabulary_tables`.

    A full vocabulary may also be stored as zero offsets and a mask of ones.

    Args:
      d2t_D, t2d_V: the stored tables; None where there is none.
      where: begins the error's sentence.

    Raises:
      UserError: for a missing map, token ids in the place of offsets, or a mask that contradicts the offsets.
    """
    for name, table, size in ((D2T, d2t_D, spec.draft_vocab), (T2D, t2d_V, spec.target_vocab)):
        if table is not None and table.shape != (size,):
            raise UserError(f"{where}: {name} has the shape {list(table.shape)}; config.json says that it is [{size}].")
    rows_D = np.arange(spec.draft_vocab)
    marked = None if t2d_V is None else np.flatnonzero(t2d_V)
    if d2t_D is not None and marked is not None and not np.array_equal(d2t_D + rows_D, marked):
        if np.array_equal(d2t_D, marked):
            raise UserError(
                f"{where}: d2t holds target ids, but engines read offsets there: subtract the number of its row from "
                "each id."
            )
        raise UserError(f"{where}: t2d does not mark the ids of d2t, so one of them belongs to another draft.")
    return check_draft_vocabulary(spec, None if d2t_D is None else d2t_D + rows_D)
