"""`python converters/to_sglang.py --checkpoint RUN --out DIR` and `to_vllm.py`: a run's draft as servers load it.

The export is read back and its logits are compared with the trained draft's before the command ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jeagle import assemble, data, dataset, exchange, targets
from jeagle import config as configs
from jeagle.config import RunConfig
from jeagle.drafts import Eagle3, advance, empty_cache
from jeagle.errors import UserError
from jeagle.joints import DraftSpec, Tables
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.mesh import make_mesh
from jeagle.starting import EMBEDDING_FILE

# Largest difference of logits allowed, relative to the largest logit: float32 must be exact but for its own rounding.
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.05, "float16": 0.01}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a trained draft in an engine's layout, reads it back and compares."""

    checkpoint: Path
    """The run's folder, runs/NAME."""
    out: Path | None = None
    """Folder to write; default: exports/ENGINE in the run's folder."""
    step: str = "last"
    """Checkpoint step, or last."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored parameters."""
    check: bool = True
    """Read the export back and compare its logits with the trained draft's."""


@dataclasses.dataclass(frozen=True)
class VllmArguments(Arguments):
    """Writes a trained draft in vLLM's layout, reads it back and compares."""

    layout: Literal["speculators", "plain"] = "speculators"
    """speculators is vLLM's own; plain is the one that SGLang loads too."""


def to_sglang(arguments: list[str]) -> None:
    """The command converters/to_sglang.py."""
    args = tyro.cli(Arguments, args=arguments, prog="to_sglang.py")
    prepare_host()
    print(export(args.checkpoint, "sglang", out=args.out, step=args.step, dtype=args.dtype, check=args.check))


def to_vllm(arguments: list[str]) -> None:
    """The command converters/to_vllm.py."""
    args = tyro.cli(VllmArguments, args=arguments, prog="to_vllm.py")
    prepare_host()
    layout = args.layout
    print(
        export(args.checkpoint, "vllm", out=args.out, step=args.step, dtype=args.dtype, check=args.check, layout=layout)
    )


def main(arguments: list[str]) -> None:
    """`jeagle export sglang|vllm ...`."""
    engines = {"sglang": to_sglang, "vllm": to_vllm}
    if not arguments or arguments[0] not in engines:
        raise UserError("jeagle export needs an engine first: sglang or vllm, then --checkpoint runs/NAME.")
    engines[arguments[0]](arguments[1:])


def export(
    folder: Path,
    engine: Literal["sglang", "vllm"],
    *,
    out: Path | None = None,
    step: int | str = "last",
    dtype: str = "bfloat16",
    check: bool = True,
    layout: Literal["speculators", "plain"] = "speculators",
    acceptance: dict[str, Any] | None = None,
) -> str:
    """Writes one export; returns a sentence that says where it is and how close it came.

    Raises:
      UserError: for a run without a checkpoint, what the engine cannot serve, or an export that does not read back.
    """
    folder = assemble.run_folder(folder)
    config = configs.from_json(json.loads((folder / "config.json").read_text()))
    found, spec, params = assemble.load_draft(folder, step)
    vocabulary = assemble.trained_vocabulary(folder)
    out = out or folder / "exports" / engine
    files = targets.resolve(config.target.ref)
    source, tokenizer = targets.open_weights(files), dataset.load_tokenizer(config, files)
    card = _card(config, files, source.config, tokenizer, found, acceptance)
    family = targets.own_family(config.target.family) if config.target.family else None
    own = folder / EMBEDDING_FILE
    options = {
        "embed_VW": np.load(own) if own.is_file() else None,
        "target_layers": targets.read_spec(source.config, family).layers,
        "dtype": dtype,
        "card": card,
        "tokenizer": tokenizer,
    }
    if engine == "sglang":
        exchange.export_sglang(spec, params, vocabulary, out, **options)
    else:
        exchange.export_vllm(spec, params, vocabulary, out, layout=layout, **options)
    if not check:
        return f"{out}: step {found}, {dtype}, not read back"
    try:
        difference = check_export(out, spec, params, vocabulary, dtype)
    except UserError:
        shutil.rmtree(out)  # what does not read back must not be found by a server
        raise
    return f"{out}: step {found}, {dtype}, read back: logits within {difference:.1e} of the trained draft's"


def _card(config: RunConfig, files: Any, target: dict[str, Any], tokenizer: Any, step: int, acceptance: Any) -> Any:
    return exchange.ExportCard(
        name=f"{config.name} EAGLE-3 draft",
        target_ref=config.target.ref,
        target_fingerprint=files.fingerprint,
        target_architectures=tuple(target.get("architectures", ())),
        run=config.name,
        step=step,
        template_hash=data.template_hash(tokenizer),
        recipe=json.dumps(configs.to_json(config)["train"], sort_keys=True),
        acceptance=acceptance,
    )


def check_export(
    out: Path, spec: DraftSpec, params: dict[str, np.ndarray], vocabulary: np.ndarray, dtype: str
) -> float:
    """Largest difference of logits between the trained draft and the export, relative to the largest logit.

    The export is rebuilt from its own config.json and tensors alone. Both run a few slots on the target's features and
    on their own states, on fixed noise.

    Raises:
      UserError: when vocabulary maps differ, or logits by more than the stored type's rounding explains.
    """
    read = exchange.read_export(out)
    if not np.array_equal(read.draft_to_target_D, vocabulary):
        raise UserError(f"The vocabulary map in {out} is not the trained draft's: the export was discarded.")
    ours, theirs = (_probe(s, p, vocabulary) for s, p in ((spec, params), (read.spec, read.params)))
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"The export in {out} does not give the trained draft's logits (off by {difference:.1e} of the largest; "
            f"{TOLERANCE[dtype]:.0e} is allowed for {dtype}): it was discarded."
        )
    return difference


def _probe(spec: DraftSpec, params: dict[str, np.ndarray], vocabulary: np.ndarray) -> np.ndarray:
    """float32 logits [2, slots, D] of six slots on features and three on the draft's own states."""
    graphdef, state = assemble.draft_from_flat(spec, "float32", params, make_mesh(devices=jax.devices()[:1]))
    draft: Eagle3 = nnx.merge(graphdef, state)
    noise = np.random.Generator(np.random.PCG64(0))
    embed = jnp.asarray(noise.standard_normal((64, spec.width), np.float32))
    head = jnp.zeros((1, spec.target_width))
    tables = Tables(embed, head, jnp.asarray(vocabulary))
    taps = jnp.asarray(noise.standard_normal((2, 6, len(spec.taps), spec.target_width), np.float32))
    tokens = jnp.asarray(noise.integers(0, 64, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9)) + 100  # far enough that a lost RoPE scaling shows
    cache = empty_cache(draft, 2, 110)
    for_head, states, cache = advance(draft, tables, draft.fuse(taps), tokens[:, :6], positions[:, :6], cache)
    logits, state = [draft.logits(for_head)], states[:, -1:]
    for slot in range(6, 9):
        here = slice(slot, slot + 1)
        for_head, state, cache = advance(draft, tables, state, tokens[:, here], positions[:, here], cache)
        logits.append(draft.logits(for_head))
    return np.asarray(jnp.concatenate(logits, axis=1))


if __name__ == "__main__":
    run(main)
