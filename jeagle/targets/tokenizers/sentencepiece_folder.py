"""The tokenizer of a model's folder that has sentencepiece's tokenizer.model and no tokenizer.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jeagle.targets.checkpoint.weights import read_json
from jeagle.targets.tokenizers.load import wrapped
from jeagle.targets.tokenizers.sentencepiece import build_tokenizer
from jeagle.targets.tokenizers.sentencepiece_model import Pieces, read_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def sentencepiece_folder(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, with what tokenizer_config.json and its neighbours add: tokens, their roles, a chat template.

    Where transformers and sentencepiece differ, as they do at spaces that start a text, this is sentencepiece's way.

    Raises:
      UserError: for files that are broken or of a kind that is not supported.
    """
    config = _optional(folder / "special_tokens_map.json") | _optional(folder / "tokenizer_config.json")
    pieces = _configured(read_pieces(folder / "tokenizer.model"), config)
    defaults = {"bos": pieces.bos, "eos": pieces.eos, "pad": pieces.pad, "unk": pieces.unknown}
    roles = {
        role: _text(config[f"{role}_token"]) if f"{role}_token" in config else None if i is None else pieces.texts[i]
        for role, i in defaults.items()
    }
    return wrapped(
        build_tokenizer(pieces, _added(folder, config)),
        {role: text for role, text in roles.items() if text},
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
        chat_template=_chat_template(folder, config),
        longest=config.get("model_max_length"),
    )


def _configured(pieces: Pieces, config: Mapping[str, Any]) -> Pieces:
    """`legacy` puts the first space after every special token too; `add_prefix_space` false puts it nowhere."""
    if pieces.space_first == "never" or config.get("add_prefix_space") is False:
        return dataclasses.replace(pieces, space_first="never")
    return dataclasses.replace(pieces, space_first="always" if config.get("legacy") else "first")


def _added(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    older = _optional(folder / "added_tokens.json")
    added = {int(i): {"content": text, "special": False} for text, i in older.items()}
    return added | {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> Any:
    """The text of chat_template.jinja, or what the configuration holds: one template, or several by name."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else template


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
