"""The fixed works that draft steps are timed on: the same arrays for every trainer that is compared.

W1 to W4 are small enough for two CPU cores, W3 is a Llama-3.1-8B draft that is only compiled, S1 is what the quickstart
trains. All numbers come from one seed; `checksum` lets two trainers prove that they were given the same.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import numpy as np

from jeagle.interfaces import Batch, DraftSpec

SEED = 20261121


@dataclasses.dataclass(frozen=True)
class Work:
    """Shapes and switches of a work.

    Attributes:
      rows, length: B and T. width: H and W alike. supervised: share of the tokens that are learnt.
      steps: K. vocab, draft_vocab: V and D.
      slots: which slots count. dialect fields beside it are those of `benchmarks.step.OBJECTIVES`.
      dtype: of the matrix products, unless told otherwise.
    """

    rows: int
    length: int
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp_width: int = 1024
    vocab: int = 8192
    draft_vocab: int = 4096
    steps: int = 7
    supervised: float = 1.0
    objective: str = "peers"
    dtype: str = "float32"

    def spec(self) -> DraftSpec:
        return DraftSpec(
            target_width=self.width,
            width=self.width,
            target_vocab=self.vocab,
            draft_vocab=self.draft_vocab,
            aux_layers=(1, 2, 3),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            norm_eps=1e-5,
        )


_LLAMA_8B: dict[str, Any] = {
    "width": 4096,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "mlp_width": 14336,
    "vocab": 128256,
    "draft_vocab": 32000,
    "dtype": "bfloat16",
}
_SMOLLM2: dict[str, Any] = {
    "width": 576,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "mlp_width": 1536,
    "vocab": 49152,
    "draft_vocab": 6144,
    "dtype": "bfloat16",
}
W4_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)

WORKS: dict[str, Work] = {
    "W1": Work(rows=2, length=512),
    "W2": Work(rows=2, length=512, supervised=0.35),
    "W3": Work(rows=1, length=2048, **_LLAMA_8B),
    "S1": Work(rows=2, length=256, supervised=0.74, steps=3, objective="ours", **_SMOLLM2),
    **{f"W4_{length}": Work(rows=1, length=length) for length in W4_LENGTHS},
}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What a step starts from.

    Attributes:
      params: by the names of Hugging Face checkpoints, [out, in].
      taps_BTAH, last_BTH: of the frozen target; last after its final norm.
      head_VH, embed_VW: the frozen target's tables.
      draft_to_target_D: ids of the draft vocabulary, rising.
    """

    batch: Batch
    params: dict[str, np.ndarray]
    aux_BTAH: np.ndarray
    last_BTH: np.ndarray
    head_VH: np.ndarray
    embed_VW: np.ndarray
    draft_to_target_D: np.ndarray
    checksum: str


def param_shapes(work: Work) -> dict[str, tuple[int, ...]]:
    width, mlp = work.width, work.mlp_width
    query, key = work.heads * work.head_dim, work.kv_heads * work.head_dim
    return {
        "fc.weight": (width, 3 * width),
        "midlayer.input_layernorm.weight": (width,),
        "midlayer.hidden_norm.weight": (width,),
        "midlayer.self_attn.q_proj.weight": (query, 2 * width),
        "midlayer.self_attn.k_proj.weight": (key, 2 * width),
        "midlayer.self_attn.v_proj.weight": (key, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, query),
        "midlayer.post_attention_layernorm.weight": (width,),
        "midlayer.mlp.gate_proj.weight": (mlp, width),
        "midlayer.mlp.up_proj.weight": (mlp, width),
        "midlayer.mlp.down_proj.weight": (width, mlp),
        "norm.weight": (width,),
        "lm_head.weight": (work.draft_vocab, width),
    }


def make(work: Work) -> Arrays:
    """The arrays of a work; what is drawn, in which order, is part of its definition."""
    rng = np.random.Generator(np.random.PCG64(SEED))

    def normal(shape: tuple[int, ...], deviation: float) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)

    width, vocab, shape = work.width, work.vocab, (work.rows, work.length)
    chosen = np.sort(rng.permutation(vocab)[: work.draft_vocab]).astype(np.int32)
    head = normal((vocab, width), 2.0 / np.sqrt(width))
    # The teacher's argmax shall nearly always lie in the draft vocabulary.
    head[np.setdiff1d(np.arange(vocab), chosen)] *= np.float32(0.5)
    embed = normal((vocab, width), 0.5)
    params = {
        name: np.ones(s, np.float32) if len(s) == 1 else normal(s, 1.0 / np.sqrt(s[1]))
        for name, s in param_shapes(work).items()
    }
    tokens = rng.integers(0, vocab, shape, dtype=np.int32)
    aux_layers, last = normal((*shape, 3 * width), 1.0), normal((*shape, width), 1.0)
    mask = np.stack([_answer_spans(rng, work.length, work.supervised) for _ in range(work.rows)])
    crc = 0
    for array in (chosen, head, embed, tokens, aux_layers, last, mask, *params.values()):
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    segments, positions = np.ones(shape, np.int32), np.broadcast_to(np.arange(work.length, dtype=np.int32), shape)
    batch = Batch(tokens, segments, np.ascontiguousarray(positions), mask.astype(bool))
    return Arrays(batch, params, aux_layers.reshape(*shape, 3, width), last, head, embed, chosen, f"{crc:08x}")


def array_shapes(work: Work) -> dict[str, Any]:
    """The fields of `Arrays` but its checksum, as shapes."""

    def like(shape: tuple[int, ...], kind: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    shape, table = (work.rows, work.length), (work.vocab, work.width)
    return {
        "batch": Batch(*(like(shape, kind) for kind in (np.int32, np.int32, np.int32, bool))),
        "params": {name: like(s) for name, s in param_shapes(work).items()},
        "aux_BTAH": like((*shape, 3, work.width)),
        "last_BTH": like((*shape, work.width)),
        "head_VH": like(table),
        "embed_VW": like(table),
        "draft_to_target_D": like((work.draft_vocab,), np.int32),
    }


def make_batch(work: Work) -> Batch:
    """A batch of the work's shape and supervised share alone, for what needs no arrays; spans from the same seed."""
    rng, shape = np.random.Generator(np.random.PCG64(SEED)), (work.rows, work.length)
    mask = np.stack([_answer_spans(rng, work.length, work.supervised) for _ in range(work.rows)])
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(work.length, dtype=np.int32), shape))
    return Batch(np.zeros(shape, np.int32), np.ones(shape, np.int32), positions, mask.astype(bool))


def _answer_spans(rng: np.random.Generator, length: int, share: float) -> np.ndarray:
    """Prompts and answers in turn, int32 [T]; exactly round(share * length) ones."""
    if share >= 1:
        return np.ones(length, np.int32)
    turns, ones = max(2, length // 128), round(share * length)

    def split(total: int) -> np.ndarray:
        parts = np.floor(rng.dirichlet(np.full(turns, 4.0)) * (total - turns)).astype(int) + 1
        parts[-1] += total - parts.sum()
        return parts

    answers, prompts = split(ones), split(length - ones)
    bits = np.tile(np.array([0, 1], np.int32), turns)
    return np.repeat(bits, np.stack([prompts, answers], axis=1).ravel())
