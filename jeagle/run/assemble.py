"""From a config to the parts of a run: what every command starts with."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jeagle import data, drafts, exchange, objective, targets
from jeagle.config import CHECKSUM, DraftConfig, ObjectiveConfig, RunConfig, from_json
from jeagle.drafts import Eagle3, by_path, draft_sharding
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec, Tables
from jeagle.run import dataset, resume
from jeagle.run.draft_init import EMBEDDING_FILE, Start, draft_class, held_out_scores, own_embedding, starting_head
from jeagle.run.parameters import Trained, served_from, served_params
from jeagle.runtime.checkpoints import first_line, load_named
from jeagle.runtime.manifest import fingerprint
from jeagle.runtime.mesh import logical_sharding, make_mesh, replicated
from jeagle.runtime.progress import bytes_progress
from jeagle.targets import Target, TargetFiles, TargetSpec

_SEALED = ("target", "data", "draft", "objective", "train")


class LoadedTarget(NamedTuple):
    """A target with what surrounds it."""

    files: TargetFiles
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    target: Target


def mesh_of(config: RunConfig) -> Mesh:
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, expert=config.mesh.expert)


def target_spec(config: RunConfig) -> tuple[TargetSpec, str]:
    """What the target's files say of it, and their fingerprint; nothing is loaded.

    UserError for a target that is missing or not supported, or aux layers that it does not have.
    """
    files = targets.resolve(config.target.ref)
    family = targets.own_family(config.target.family)
    spec = targets.read_spec(targets.open_weights(files).config, family)
    if config.target.aux_layers:
        targets.check_aux_layers(config.target.aux_layers, spec.layers)
    return spec, files.fingerprint


def load_target(config: RunConfig, mesh: Mesh, *, dtype: Any = None) -> LoadedTarget:
    """The config's target on the mesh; `dtype` overrides the config's, as measuring in float32 does."""
    files = targets.resolve(config.target.ref)
    source = targets.open_weights(files)
    tokenizer = dataset.load_tokenizer(config, files)
    ends = targets.end_token_ids(tokenizer, source.config)
    family = targets.own_family(config.target.family)
    if config.target.aux_layers:
        targets.check_aux_layers(config.target.aux_layers, targets.read_spec(source.config, family).layers)
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


def objective_spec(config: ObjectiveConfig) -> objective.ObjectiveSpec:
    return objective.resolve_objective(**vars(config))


def make_tables(target: Target, draft_to_target_D: np.ndarray, mesh: Mesh) -> Tables:
    """The target's frozen rows that a draft reads and is taught through, on the mesh."""
    model = target.model()
    ids = jax.device_put(jnp.asarray(draft_to_target_D), replicated(mesh))
    rows = NamedSharding(mesh, logical_sharding(("vocab", "width"), (len(draft_to_target_D), target.spec.width), mesh))
    head = jax.jit(lambda head, ids: head[ids], out_shardings=rows)(model.head_rows(), ids)
    return Tables(model.embed_tokens[...], head, ids)


def draft_tables(tables: Tables, mesh: Mesh, *, spec: DraftSpec, folder: Path, start: Start | None = None) -> Tables:
    """The target's tables, with the embedding of a draft of another width in place of the target's.

    Args:
      folder: the run's. start: the older draft that it begins with.
    """
    own_VW = own_embedding(folder, spec, tables.embed_VW, start)
    return tables if own_VW is None else tables._replace(embed_VW=jax.device_put(own_VW, replicated(mesh)))


def draft_key(path: tuple[Any, ...]) -> str:
    """("layers", 0, "mlp", "up_proj") -> "layers.0.mlp.up_proj"."""
    return ".".join(map(str, path))


def make_draft(
    config: RunConfig, spec: DraftSpec, target: TargetSpec, tables: Tables, mesh: Mesh, dtype: str
) -> tuple[Any, Any]:
    """A fresh draft as (graphdef, state), born sharded; its lm_head starts as `starting_head` says."""
    kind, head = draft_class(config.draft), starting_head(config.draft, spec, target, tables)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: kind(spec, jnp.dtype(dtype), nnx.Rngs(0))))
    shardings = by_path(abstract, lambda path, leaf: draft_sharding(path, leaf.shape, mesh))

    @functools.partial(jax.jit, out_shardings=shardings)
    def create(key: jax.Array, head: jax.Array | None) -> Any:
        draft = kind(spec, jnp.dtype(dtype), nnx.Rngs(key))
        if head is not None:
            draft.lm_head[...] = head.astype(jnp.float32)
        return nnx.split(draft)[1]

    return graphdef, create(jax.random.key(config.train.seed), head)


def flat_draft(state: Any) -> dict[str, jax.Array]:
    """The draft's parameters by dotted name: what checkpoints and exports hold."""
    return {draft_key(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def draft_from_flat(
    spec: DraftSpec, dtype: Any, params: dict[str, Any], mesh: Mesh, *, kind: Any = Eagle3
) -> tuple[Any, Any]:
    """The inverse of `flat_draft`. UserError for a name or a shape that such a draft does not have."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: kind(spec, jnp.dtype(dtype), nnx.Rngs(0))))
    known = {draft_key(path): leaf.get_value().shape for path, leaf in nnx.to_flat_state(abstract)}
    wrong = sorted(set(known) ^ set(params)) or [k for k in known if tuple(params[k].shape) != known[k]]
    if wrong:
        raise UserError(f"The draft's parameters do not fit its configuration: {', '.join(wrong[:5])} differ.")
    put = lambda path, leaf: jax.device_put(  # noqa: E731
        jnp.asarray(params[draft_key(path)], jnp.float32), draft_sharding(path, leaf.shape, mesh)
    )
    return graphdef, by_path(abstract, put)


def trained_vocabulary(folder: Path) -> np.ndarray:
    """The draft vocabulary that a run's draft was trained with. UserError where the one beside it is another."""
    trained_from = _read(folder / "draft.json", lambda tree: {**tree["made_from"]["tables"]})
    return data.load_tables(folder / "tables", trained_from)


def run_folder(path: str | Path) -> Path:
    """A run's folder. UserError unless it holds a configuration."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run: it has no config.json. Name the folder that training wrote, runs/NAME.")
    return folder


def load_draft(folder: Path, step: int | str) -> tuple[int, DraftSpec, dict[str, np.ndarray]]:
    """(step, spec, parameters by name) of a run's checkpoint: those that are measured and exported."""
    spec = described_draft(folder)
    served = lambda names: itertools.chain(*served_from(names).values())  # noqa: E731
    found, tree = load_named(folder / "checkpoints", step, held_out_scores(folder), served)
    return found, spec, drafts.merge_adapters(served_params(tree))


def described_draft(folder: Path, *, where: str = "") -> DraftSpec:
    """What a run's checkpoints are of. UserError where nothing has been trained; `where` names the run."""
    described = folder / "draft.json"
    if not described.is_file():
        raise UserError(f"{where or folder} holds no trained draft: run python -m jeagle.train first.")
    return _read(described, lambda tree: DraftSpec.from_json(tree["draft"]), where=where)


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of `to_json` with a checksum of the settings that a draft depends on, so that an edited one is noticed."""
    return tree | {CHECKSUM: fingerprint({name: tree.get(name) for name in _SEALED})}


def read_config(folder: Path, *, where: str = "") -> RunConfig:
    """The settings of a run. UserError where they are damaged, edited or of a later version; `where` names the run."""

    def read(tree: dict[str, Any]) -> RunConfig:
        if CHECKSUM in tree and tree != sealed(tree):
            raise UserError(
                f"{where or folder}/config.json was edited or damaged, its {CHECKSUM} does not fit it: restore it, or "
                f"remove its {CHECKSUM} where the edit is meant."
            )
        return from_json(tree)

    return _read(folder / "config.json", read, where=where)


def check_files(folder: Path) -> None:
    """UserError where a run has checkpoints, and the files that say what they are of are missing or damaged."""
    if resume.last_step(folder) is not None:
        for name in (resume.CONFIG_FILE, resume.DRAFT_FILE):
            resume.check_there(folder / name)
        read_config(folder)
        described_draft(folder)


def _read(path: Path, read: Callable[[dict[str, Any]], Any], *, where: str = "") -> Any:
    """What `read` makes of a JSON file. UserError where it cannot; `where` names the run's folder."""
    try:
        return read(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(
            f"{where or path.parent}/{path.name} is damaged, or was written by another version of jeagle "
            f"({first_line(error)}): restore it from a copy."
        ) from error


def open_start(config: RunConfig) -> Start | None:
    """The older draft that --draft.start names, a run or a draft's folder. UserError where there is none."""
    folder = Path(config.draft.start)
    if not config.draft.start:
        return None
    if not folder.is_dir():
        raise UserError(f"--draft.start {folder} is no folder: give a run of jeagle's, or a folder with a draft.")
    if (folder / "draft.json").is_file():
        _, spec, params = load_draft(folder, "last")
        own = folder / EMBEDDING_FILE
        return Start(spec, params, np.load(own) if own.is_file() else None)
    read = exchange.read_draft(folder, exchange.Hints(config.target.aux_layers or None, config.draft.norm_output))
    return Start(read.spec, read.params, read.embed_VW)


def draft_state(
    config: RunConfig, spec: DraftSpec, target: TargetSpec, tables: Tables, mesh: Mesh, start: Start | None
) -> tuple[Any, Any]:
    """The run's draft before its first step, (graphdef, what is trained): fresh, or the older one's parameters; with
    adapters beside them where --draft.lora says so."""
    if start is None:
        return make_draft(config, spec, target, tables, mesh, config.train.dtype)
    kind = draft_class(config.draft)
    graphdef, state = draft_from_flat(spec, config.train.dtype, start.params, mesh, kind=kind)
    if not config.draft.lora:
        return graphdef, state
    tree = drafts.add_adapters(state, config.draft.lora, jax.random.key(config.train.seed))
    return graphdef, tree | {"lora": jax.device_put(tree["lora"], replicated(mesh))}


def trained(draft: DraftConfig) -> Trained:
    """Which parameters the optimiser moves: adapters alone, or all but a frozen lm_head."""
    return Trained(bool(draft.lora), draft.train_head)
