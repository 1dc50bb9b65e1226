"""What a run's draft is and what its parameters start from: derived from the target, from a file, or an older draft."""

import dataclasses
import importlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle import exchange, targets
from jeagle.config import DraftConfig, RunConfig
from jeagle.drafts import Eagle3
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec, Rope, Tables
from jeagle.run.claim import EMBEDDING
from jeagle.runtime import distributed
from jeagle.runtime.manifest import atomic_write
from jeagle.runtime.trackers import scores
from jeagle.targets import TargetSpec, is_target_embedding

SHAPE = ("width", "heads", "kv_heads", "head_dim", "mlp_width")
"""Sizes in `DraftConfig` whose 0 is the target's own."""
SWITCHES = (
    "layers",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "carry_normed",
    "head_norm",
    "qk_norm",
    "attention_bias",
    "sliding_window",
    "layer_types",
)
EMBEDDING_FILE = "embedding.npy"
"""In a run's folder: a warm start's own embedding, which is carried on."""

HELD_OUT = "held_out"
"""In a run's folder: where the figures of held-out rows are."""
BEST_BY = "expected_acceptance_length"
"""Which of them says how good a checkpoint is."""


class Start(NamedTuple):
    """An older draft to go on from: its spec, parameters by name, and embedding where it has one of its own."""

    spec: DraftSpec
    params: dict[str, np.ndarray]
    embed_VW: np.ndarray | None = None


def held_out_scores(folder: Path) -> dict[int, float]:
    """How good the checkpoints of a run are, by step: what --step best goes by. Higher is better."""
    return scores(folder / HELD_OUT, BEST_BY)


def draft_spec(
    config: RunConfig, target: TargetSpec, draft_vocab: int, ends: tuple[int, ...], start: Start | None = None
) -> DraftSpec:
    """The run's draft: of --draft.json, of the older draft that it starts from, or derived from the target.

    Derived, it is a Llama block with the target's widths and rope, which every engine serves, unless `config.draft`
    says otherwise.

    Raises:
      UserError: for a draft that is not of this target, makes no sense, or is described twice.
    """
    draft, given = config.draft, config.draft.json or config.draft.start
    for name in (*SHAPE, *SWITCHES) if given else ():
        if getattr(draft, name) != getattr(DraftConfig(), name):
            flag = name.replace("_", "-")
            raise UserError(f"{given} says what the draft is: leave --draft.{flag} out, or change it there.")
    if draft.json:
        spec = exchange.read_draft_config(
            draft.json,
            draft_vocab=draft_vocab,
            target_width=target.width,
            default_aux_layers=lambda: targets.check_aux_layers(config.target.aux_layers, target.layers),
            norm_output=draft.norm_output or "head",
        )
    elif start:
        spec = start.spec
    else:
        spec = DraftSpec(
            target_width=target.width,
            target_vocab=target.vocab,
            draft_vocab=draft_vocab,
            aux_layers=targets.check_aux_layers(config.target.aux_layers, target.layers),
            norm_eps=target.norm_eps,
            rope=draft_rope(target.rope),
            max_positions=target.max_positions,
            **{name: getattr(draft, name) or getattr(target, name) for name in SHAPE},
            **{name: getattr(draft, name) for name in SWITCHES},
        )
    spec = dataclasses.replace(spec, end_token_ids=ends)
    _check_fits(spec, config, target, draft_vocab, given or "The draft")
    exchange.check_spec(spec, target.layers)
    return spec


def draft_rope(rope: Rope) -> Rope:
    """The target's rotary embedding as far as every engine's Llama layer has it; else a plain one of the same base.

    What turns with the sequence's length (dynamic, longrope) or leaves dimensions still (partial, proportional) is
    not served alike everywhere, and a draft sees too little of a sequence to need it.
    """
    everywhere = rope.scaling_dict.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    return rope if everywhere and "partial_rotary_factor" not in rope.scaling_dict else Rope(rope.theta)


def _check_fits(spec: DraftSpec, config: RunConfig, target: TargetSpec, draft_vocab: int, where: str) -> None:
    problems = {
        f"is for a target of width {spec.target_width} and vocabulary {spec.target_vocab}; this one has {target.width} "
        f"and {target.vocab}.": (spec.target_width, spec.target_vocab) != (target.width, target.vocab),
        f"has a draft vocabulary of {spec.draft_vocab}, the run one of {draft_vocab}: give --draft.vocab "
        f"{spec.draft_vocab}.": spec.draft_vocab != draft_vocab,
        f"reads the layers {list(spec.aux_layers)}; --target.aux-layers says {list(config.target.aux_layers)}.": (
            config.target.aux_layers not in ((), spec.aux_layers)
        ),
        f"has {spec.heads} heads for {spec.kv_heads} key heads: it must be a multiple.": spec.heads % spec.kv_heads,
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"{where} {problem}")


def check_engines(draft: DraftConfig, spec: DraftSpec, target_layers: int) -> None:
    """UserError, naming engine and switch, where one of --draft.engines could not serve this draft once trained."""
    own = [f"its class is one of your own ({draft.module})"] if draft.module else []
    limits = {
        "sglang": ("SGLang", lambda: exchange.sglang_limits(spec, target_layers)),
        "vllm": ("vLLM", lambda: exchange.vllm_limits(spec, "speculators")),
    }
    for engine in draft.engines:
        name, limits_of = limits[engine]
        if reasons := own + limits_of():
            rest = " ".join(e for e in draft.engines if e != engine)
            raise UserError(
                f"{name} could not serve this draft: {'; '.join(reasons)}. Change the draft, or give "
                f"--draft.engines{' ' * bool(rest)}{rest} to train it without {name}."
            )


def draft_class(draft: DraftConfig) -> Any:
    """Eagle3, or the user's own class with the same methods. UserError where there is none."""
    if not draft.module:
        return Eagle3
    module, _, name = draft.module.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--draft.module {draft.module} cannot be imported ({error}): give package.module:NAME."
        ) from error
    missing = [method for method in ("fuse", "finish", "logits") if not callable(getattr(kind, method, None))]
    if missing:
        raise UserError(
            f"--draft.module {draft.module} has no {', '.join(missing)}: it must do what drafts.Eagle3 does."
        )
    return kind


def starting_head(draft: DraftConfig, spec: DraftSpec, target: TargetSpec, tables: Tables) -> jax.Array | None:
    """Where the draft's lm_head starts: the target's rows, with the scale that servers do not apply to a draft's.

    None, for noise, where the draft has another width.
    """
    same_width = spec.width == spec.target_width
    return tables.head_DH * target.logits.scale if draft.head_start == "target" and same_width else None


def own_embedding(folder: Path, spec: DraftSpec, embed_VH: jax.Array, start: Start | None = None) -> jax.Array | None:
    """The embedding that the draft reads, float32 [V, W]: the run's own, as a draft of another width than the target's
    or a published one has it; None where the target's serves.

    The one that an older draft came with, else the target's rows through a fixed random projection, which keeps
    distances. It is frozen, as SpecForge has it, and exported with the draft.
    """
    if (folder / EMBEDDING_FILE).is_file():
        return jnp.asarray(np.load(folder / EMBEDDING_FILE))
    older_VW = start.embed_VW if start else None
    if spec.width == spec.target_width:
        if older_VW is not None and not is_target_embedding(older_VW, embed_VH):
            raise UserError(
                "The draft to start from has an embedding that is not the target's: engines would replace it."
            )
        return None
    if older_VW is not None:
        return jnp.asarray(older_VW)
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal((spec.target_width, spec.width), np.float32)
    project = jnp.asarray(noise / np.sqrt(np.float32(spec.target_width)))
    return jnp.matmul(embed_VH.astype(jnp.float32), project, precision=jax.lax.Precision.HIGHEST)


def keep_embedding(folder: Path, spec: DraftSpec, tables: Tables) -> None:
    """Writes the embedding of a draft of another width than the target's beside it: exports carry it."""
    path = folder / EMBEDDING_FILE
    if spec.width != spec.target_width and not path.is_file() and distributed.is_leader():
        whole = io.BytesIO()
        np.save(whole, np.asarray(tables.embed_VW, np.float32))
        atomic_write(path, whole.getvalue(), EMBEDDING)
