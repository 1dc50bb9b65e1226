"""Writes a trained draft as a folder that SGLang or vLLM loads: config.json, model.safetensors and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jeagle.errors import UserError
from jeagle.exchange.card import (
    EXPORT_FILE,
    EXPORT_FOLDER,
    TOKENIZER_FILES,
    Export,
    export_record,
    limits_of,
    model_card,
)
from jeagle.exchange.config_write import config_json
from jeagle.exchange.draft_tensors import (
    EMBEDDING,
    FirstLayer,
    Readable,
    check_embedding,
    check_params,
    same_embedding,
    torch_name,
    vocabulary_tables,
)
from jeagle.exchange.limits import check_spec, vllm_limits
from jeagle.exchange.safetensors_writer import EXPORT_DTYPES, plan_parameter, plan_table, write_safetensors
from jeagle.runtime.manifest import atomic_folder


def write_export(
    export: Export,
    params: Mapping[str, Any],
    draft_to_target_D: Shaped[np.ndarray, "..."] | None,
    *,
    embed_VW: Readable | None = None,
    target_embed_VW: Readable | None = None,
    tokenizer: Any = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the export and returns its folder. vLLM also loads the plain layout, unless `vllm_limits` says otherwise.

    Args:
      export: the engine, layout, type and folder. An older export of jeagle's in this folder is replaced; a folder with
        other files is refused.
      params: float32, with the names and shapes of `expected_shapes`, each of them `Readable`. They are read one at a
        time, so that together they may be larger than memory, and rounded to nearest.
      draft_to_target_D: the target's token ids, strictly rising; None for a full vocabulary.
      embed_VW: the embedding that the draft reads. A draft of another width than the target's needs its own; the
        speculators library needs one in any case. At equal width SGLang replaces it by the target's.
      target_embed_VW: the target's embedding, where SGLang would replace `embed_VW` by it; the two must be equal.
      tokenizer: a folder of tokenizer files, or an object with `save_pretrained`; its files are written to the export.
      check: is called with the finished folder before it is moved to its place; the older export stays if it raises.

    Raises:
      UserError: for parameters, ids or an embedding that do not fit the spec, for what the engine cannot serve, for
        speculators' layout without `card.target_ref`, or for a folder that cannot be written. Nothing is written then.
    """
    spec = export.spec
    check_spec(spec, export.target_layers)
    _check_served(export)
    if export.dtype not in EXPORT_DTYPES:
        raise UserError(f"An export cannot be stored as {export.dtype!r}: choose {', '.join(EXPORT_DTYPES)}.")
    check_params(spec, params)
    check_embedding(spec, None if embed_VW is None else embed_VW.shape, where="The draft's parameters")
    if (
        embed_VW is not None
        and target_embed_VW is not None
        and not same_embedding(embed_VW, target_embed_VW, spec.target_vocab)
    ):
        raise UserError("SGLang would replace the draft's own embedding by the target's: export the draft for vLLM.")
    first_layer: FirstLayer = "midlayer" if export.layout == "plain" and spec.layers == 1 else "layers.0"
    tensors = {torch_name(name, first_layer): plan_parameter(name, p, export.dtype) for name, p in params.items()}
    if embed_VW is not None:
        tensors[EMBEDDING] = plan_parameter(EMBEDDING, embed_VW, export.dtype)
    tensors |= {name: plan_table(table) for name, table in vocabulary_tables(spec, draft_to_target_D).items()}
    out = Path(export.out)
    try:
        with atomic_folder(out, EXPORT_FOLDER) as folder:
            _write_tokenizer(tokenizer, folder)
            write_safetensors(folder / "model.safetensors", tensors)
            (folder / "README.md").write_text(model_card(export), "utf-8")
            for name, tree in {"config.json": config_json(export), EXPORT_FILE: export_record(export)}.items():
                (folder / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
            if check is not None:
                check(folder)
    except OSError as error:
        raise UserError(f"The export cannot be written to {out}: {error}.") from error
    return out


def _check_served(export: Export) -> None:
    """Raises UserError, naming the engine and the switch, unless the engine serves this draft as it was trained."""
    reasons = limits_of(export)[export.engine]
    if reasons:
        served = not vllm_limits(export.spec, "speculators", export.card.target_architectures)
        hint = " vLLM can, in speculators' layout: export it in that one." if served else ""
        raise UserError(f"{export.engine} cannot serve this draft as it was trained: {'; '.join(reasons)}.{hint}")
    if export.layout == "speculators" and not export.card.target_ref:
        raise UserError('The layout "speculators" names the target: give the target, or choose the layout "plain".')


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
        return
    files = [path for name in TOKENIZER_FILES if (path := Path(tokenizer) / name).is_file()]
    if not files:
        raise UserError(f"{tokenizer} does not contain a tokenizer: expected tokenizer.json or tokenizer.model there.")
    for file in files:
        shutil.copyfile(file, folder / file.name)
