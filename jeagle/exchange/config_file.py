"""A draft's configuration without its parameters: the JSON that SpecForge and speculators start training from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jeagle.errors import UserError
from jeagle.exchange.config_kinds import check_kinds
from jeagle.exchange.config_read import Hints, NormOutput, layout_of, spec_from_config
from jeagle.exchange.config_write import LAYER_IDS
from jeagle.interfaces import DraftSpec


def read_draft_config(
    path: str | Path,
    *,
    draft_vocab: int,
    target_width: int,
    default_aux_layers: Callable[[], tuple[int, ...]],
    norm_output: NormOutput = "head",
) -> DraftSpec:
    """The draft that a configuration file describes, in either form.

    What such a file may leave open: draft_vocab_size and target_hidden_size are then those given, layer ids the
    default ones, head_dim hidden_size / heads.

    Args:
      norm_output: what that field means in SpecForge's form, see `Hints`; its trainer reads it as "head".

    Raises:
      UserError: for a file that is missing or no such configuration, or fields that jeagle's draft cannot follow.
    """
    path = Path(path)
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"--draft.json {path} is no file: give a draft's configuration, or leave it out.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"--draft.json {path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"--draft.json {path} holds no configuration, but a {type(config).__name__}.")
    check_kinds(config)
    if layout_of(config) == "speculators":
        decoder = config["transformer_layer_config"] = dict(config.get("transformer_layer_config") or {})
    else:
        decoder = config
    if not decoder.get("head_dim") and decoder.get("hidden_size") and decoder.get("num_attention_heads"):
        decoder["head_dim"] = decoder["hidden_size"] // decoder["num_attention_heads"]
    config["draft_vocab_size"] = config.get("draft_vocab_size") or draft_vocab
    config["target_hidden_size"] = config.get("target_hidden_size") or target_width
    named = config.get(LAYER_IDS) or (config.get("eagle_config") or {}).get(LAYER_IDS)
    return spec_from_config(config, {}, Hints(None if named else default_aux_layers(), norm_output))
