"""From a config to the parts of a run: what every command starts with."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jeagle import data, dataset, objective, targets
from jeagle.config import DraftConfig, ObjectiveConfig, RunConfig, TrainConfig
from jeagle.drafts import Eagle3
from jeagle.errors import UserError
from jeagle.joints import DraftSpec, Rope, Tables
from jeagle.runtime.checkpoints import load_named
from jeagle.runtime.mesh import logical_sharding, make_mesh, replicated
from jeagle.runtime.progress import bytes_progress
from jeagle.targets import Target, TargetFiles, TargetSpec

# Logical axes of the draft's parameters; the mesh axes behind them: runtime.mesh.RULES.
DRAFT_AXES: dict[str, tuple[str | None, ...]] = {
    "fc": (None, "width"),
    "q_proj": ("width", "heads"),
    "k_proj": ("width", "heads"),
    "v_proj": ("width", "heads"),
    "o_proj": ("heads", "width"),
    "gate_proj": ("width", "mlp"),
    "up_proj": ("width", "mlp"),
    "down_proj": ("mlp", "width"),
    "lm_head": ("vocab", "width"),
}


class LoadedTarget(NamedTuple):
    """A target with what surrounds it."""

    files: TargetFiles
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    target: Target


class TrainState(NamedTuple):
    """All that training changes. Parameters and moments are float32."""

    draft: Any
    optimiser: Any
    step: jax.Array
    skipped: jax.Array


def mesh_of(config: RunConfig) -> Mesh:
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, expert=config.mesh.expert)


def load_target(config: RunConfig, mesh: Mesh, *, dtype: Any = None) -> LoadedTarget:
    """The config's target on the mesh; `dtype` overrides the config's, as measuring in float32 does."""
    files = targets.resolve(config.target.ref)
    source = targets.open_weights(files)
    tokenizer = dataset.load_tokenizer(config, files)
    ends = targets.end_token_ids(tokenizer, source.config)
    family = targets.own_family(config.target.family) if config.target.family else None
    if config.target.taps:
        targets.check_taps(config.target.taps, targets.read_spec(source.config, family).layers)
    with bytes_progress("load target", shown=jax.process_index() == 0) as progress:
        target = targets.load_target(
            source,
            mesh,
            jnp.dtype(dtype or config.target.dtype),
            stored="" if config.target.weights == "dtype" else config.target.weights,
            family=family,
            progress=progress,
        )
    return LoadedTarget(files, tokenizer, ends, target)


def draft_spec(config: RunConfig, target: TargetSpec, draft_vocab: int, ends: tuple[int, ...]) -> DraftSpec:
    """A Llama block with the target's widths and rope, which every engine serves."""
    return DraftSpec(
        target_width=target.width,
        width=target.width,
        target_vocab=target.vocab,
        draft_vocab=draft_vocab,
        taps=targets.check_taps(config.target.taps, target.layers),
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        mlp_width=target.mlp_width,
        layers=config.draft.layers,
        norm_eps=target.norm_eps,
        rope=draft_rope(target.rope),
        max_positions=target.max_positions,
        norm_before_residual=config.draft.norm_before_residual,
        norm_before_fc=config.draft.norm_before_fc,
        fc_norm=config.draft.fc_norm,
        end_token_ids=ends,
    )


def draft_rope(rope: Rope) -> Rope:
    """The target's rotary embedding as far as every engine's Llama layer has it; else a plain one of the same base.

    What turns with the sequence's length (dynamic, longrope) or leaves dimensions still (partial, proportional) is
    not served alike everywhere, and a draft sees too little of a sequence to need it.
    """
    everywhere = rope.scaling_dict.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    return rope if everywhere and "partial_rotary_factor" not in rope.scaling_dict else Rope(rope.theta)


def objective_spec(config: ObjectiveConfig) -> objective.ObjectiveSpec:
    switches = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "dialect"}
    return objective.resolve(config.dialect, **switches)


def make_tables(target: Target, draft_to_target_D: np.ndarray, mesh: Mesh) -> Tables:
    """The frozen rows that the draft reads and is taught through, on the mesh."""
    model = target.model()
    ids = jax.device_put(jnp.asarray(draft_to_target_D), replicated(mesh))
    rows = NamedSharding(mesh, logical_sharding(("vocab", "width"), (len(draft_to_target_D), target.spec.width), mesh))
    head = jax.jit(lambda head, ids: head[ids], out_shardings=rows)(model.head_rows(), ids)
    return Tables(model.embed_tokens[...], head, ids)


def starting_head(config: DraftConfig, target: TargetSpec, tables: Tables) -> jax.Array | None:
    """Where the draft's lm_head starts: the target's rows, with the scale that servers do not apply to a draft's."""
    return tables.head_DH * target.logits.scale if config.head_start == "target" else None


def draft_key(path: tuple[Any, ...]) -> str:
    """("layers", 0, "mlp", "up_proj") -> "layers.0.mlp.up_proj"."""
    return ".".join(map(str, path))


def make_draft(spec: DraftSpec, dtype: Any, mesh: Mesh, *, seed: int, head: jax.Array | None) -> tuple[Any, Any]:
    """A fresh draft as (graphdef, state), born sharded; its lm_head starts from `head` where given."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Eagle3(spec, jnp.dtype(dtype), nnx.Rngs(0))))
    shardings = _by_path(abstract, lambda path, leaf: draft_sharding(path, leaf.shape, mesh))

    @functools.partial(jax.jit, out_shardings=shardings)
    def create(key: jax.Array, head: jax.Array | None) -> Any:
        draft = Eagle3(spec, jnp.dtype(dtype), nnx.Rngs(key))
        if head is not None:
            draft.lm_head[...] = head.astype(jnp.float32)
        return nnx.split(draft)[1]

    return graphdef, create(jax.random.key(seed), head)


def draft_sharding(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    axes = DRAFT_AXES.get(str(path[-1]), (None,) * len(shape))
    return NamedSharding(mesh, logical_sharding(axes, shape, mesh))


def _by_path(state: Any, function: Any) -> Any:
    leaves = [(path, leaf.replace(function(path, leaf.get_value()))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(leaves)


def flat_draft(state: Any) -> dict[str, jax.Array]:
    """The draft's parameters by dotted name: what checkpoints and exports hold."""
    return {draft_key(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def draft_from_flat(spec: DraftSpec, dtype: Any, params: dict[str, Any], mesh: Mesh) -> tuple[Any, Any]:
    """The inverse of `flat_draft`. UserError for a name or a shape that the spec does not have."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Eagle3(spec, jnp.dtype(dtype), nnx.Rngs(0))))
    known = {draft_key(path): leaf.get_value().shape for path, leaf in nnx.to_flat_state(abstract)}
    wrong = sorted(set(known) ^ set(params)) or [k for k in known if tuple(params[k].shape) != known[k]]
    if wrong:
        raise UserError(f"The draft's parameters do not fit its configuration: {', '.join(wrong[:5])} differ.")
    put = lambda path, leaf: jax.device_put(  # noqa: E731
        jnp.asarray(params[draft_key(path)], jnp.float32), draft_sharding(path, leaf.shape, mesh)
    )
    return graphdef, _by_path(abstract, put)


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` of the steps, then the schedule down to 0 (or constant)."""
    warmup = max(round(config.warmup * steps), 1)
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # The first step already moves: warm-up counts from 1.
    return lambda step: jnp.where(step < warmup, peak * (step + 1) / warmup, after(step - warmup))


def make_optimiser(
    config: TrainConfig, rate: optax.Schedule, *, train_head: bool = True
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Muon; a frozen lm_head is left out of both."""
    adamw = optax.adamw(rate, b1=0.9, b2=config.beta2, eps=1e-8, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        chosen = adamw
    else:
        # Embedding-like matrices are no linear maps between features: AdamW suits them better.
        chosen = optax.partition(
            {
                "muon": optax.contrib.muon(
                    rate, weight_decay=config.weight_decay, consistent_rms=0.2, adam_learning_rate=rate
                ),
                "adamw": adamw,
            },
            lambda state: _labels(state, lambda name, x: "muon" if x.ndim == 2 and name != "lm_head" else "adamw"),
        )
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    both = optax.chain(*parts, chosen)
    if train_head:
        return both
    return optax.partition(
        {"train": both, "frozen": optax.set_to_zero()},
        lambda state: _labels(state, lambda name, _: "frozen" if name == "lm_head" else "train"),
    )


def _labels(state: Any, label: Any) -> Any:
    def one(path: Any, leaf: Any) -> str:
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        return label(next((n for n in reversed(names) if n not in ("value", "")), ""), leaf)

    return jax.tree_util.tree_map_with_path(one, state)


def train_state(draft: Any, optimiser: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh TrainState; moments lie where their parameters lie."""
    zero = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    moments = optimiser.init(draft)
    everywhere = replicated(mesh)
    moments = jax.tree.map(
        lambda x: x if isinstance(getattr(x, "sharding", None), NamedSharding) else jax.device_put(x, everywhere),
        moments,
    )
    return TrainState(draft, moments, zero, jnp.copy(zero))


def draft_to_target(config: RunConfig) -> np.ndarray:
    """The run's draft vocabulary. UserError where none has been prepared."""
    return data.load_tables(config.folder / "tables")


def trained_vocabulary(folder: Path) -> np.ndarray:
    """The draft vocabulary that a run's draft was trained with. UserError where the one beside it is another."""
    trained_from = json.loads((folder / "draft.json").read_text())["made_from"]["tables"]
    return data.load_tables(folder / "tables", trained_from)


def run_folder(path: str | Path) -> Path:
    """A run's folder. UserError unless it holds a configuration."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run: it has no config.json. Name the folder that training wrote, runs/NAME.")
    return folder


def draft_params(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The draft's parameters by dotted name, from a checkpoint's arrays by tree path."""
    own = {name: array for name, array in tree.items() if name.startswith(".draft")}
    return {".".join(re.findall(r"\['?(\w+)'?\]", name)): np.asarray(array) for name, array in own.items()}


def load_draft(folder: Path, step: int | str) -> tuple[int, DraftSpec, dict[str, np.ndarray]]:
    """(step, spec, parameters by name) of a run's checkpoint."""
    described = folder / "draft.json"
    if not described.is_file():
        raise UserError(f"{folder} holds no trained draft: run python -m jeagle.train first.")
    spec = DraftSpec.from_json(json.loads(described.read_text())["draft"])
    found, tree = load_named(folder / "checkpoints", step)
    return found, spec, draft_params(tree)
