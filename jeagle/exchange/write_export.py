"""A trained draft -> a folder that SGLang or vLLM loads: config.json, model.safetensors, a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.errors import UserError
from jeagle.exchange.card import EXPORT, EXPORT_FILE, TOKENIZER_FILES, Export, ExportCard, readme, record
from jeagle.exchange.config_write import plain_config, speculators_config
from jeagle.exchange.limits import Layout, check_sglang, check_spec, check_vllm
from jeagle.exchange.names import EMBEDDING, FirstLayer, check_embedding, check_params, torch_name
from jeagle.exchange.rounding import DTYPES, Dtype, planned
from jeagle.exchange.stream import Planned, Readable, whole, write_safetensors
from jeagle.exchange.vocabulary import tables_of
from jeagle.interfaces import DraftSpec
from jeagle.runtime.manifest import atomic_folder

Check = Callable[[Path], None]

_ROWS = 8192  # of an embedding at a time
_BFLOAT16_STEP = 2.0**-8


def export_sglang(
    spec: DraftSpec,
    params: Mapping[str, Readable],
    draft_to_target_D: np.ndarray | None,
    out: str | Path,
    *,
    target_layers: int,
    dtype: Dtype = "bfloat16",
    card: ExportCard | None = None,
    embed_VW: Readable | None = None,
    target_embed_VW: Readable | None = None,
    tokenizer: Any = None,
    check: Check | None = None,
) -> Path:
    """Writes the plain layout for SGLang and returns `out`; vLLM loads the same folder, unless `vllm_limits` says no.

    Args:
      params: float32, as `names.expected_shapes` lists them; read one at a time, so they may be larger than memory.
      draft_to_target_D: target ids, strictly rising; None for a full vocabulary.
      out: the folder; an older export of jeagle's is replaced, anything else that is not empty is refused.
      target_layers: n, decoder layers of the target, which the taps are checked against.
      dtype: of the stored parameters, rounded to nearest.
      card: what is known of the training, for the model card; see `ExportCard`.
      embed_VW: the embedding that the draft reads: its own, which a draft of another width than the target's needs, or
        the target's, which the speculators library needs. At equal width SGLang puts the target's in its place.
      target_embed_VW: the target's; where given, an `embed_VW` that SGLang would replace must equal it.
      tokenizer: a folder of tokenizer files, or an object with `save_pretrained`; its files are put beside the draft.
      check: is given the finished folder before it stands at `out`; an older export stays there if it raises.

    Raises:
      UserError: for parameters, ids or an embedding that do not fit the spec, for what SGLang cannot serve, for a place
        that cannot be written. Nothing is written then.
    """
    check_spec(spec, target_layers)
    card = card or ExportCard()
    check_sglang(spec, target_layers, card.target_architectures)
    _check_replaced(spec, embed_VW, target_embed_VW)
    tensors = _tensors(spec, params, draft_to_target_D, embed_VW, "midlayer", dtype)
    export = Export("SGLang", "plain", dtype, str(out), spec, target_layers, card)
    return _write(export, tensors, plain_config(spec, dtype=dtype), tokenizer, check)


def export_vllm(
    spec: DraftSpec,
    params: Mapping[str, Readable],
    draft_to_target_D: np.ndarray | None,
    out: str | Path,
    *,
    target_layers: int,
    layout: Layout = "speculators",
    dtype: Dtype = "bfloat16",
    card: ExportCard | None = None,
    embed_VW: Readable | None = None,
    tokenizer: Any = None,
    check: Check | None = None,
) -> Path:
    """Writes the speculators or the plain layout for vLLM; arguments and result as of `export_sglang`.

    Raises:
      UserError: as `export_sglang`, for what vLLM cannot serve in this layout; and for speculators' layout without
        `card.target_ref`, which that layout names.
    """
    check_spec(spec, target_layers)
    card = card or ExportCard()
    check_vllm(spec, layout, card.target_architectures)
    if layout == "plain":
        config = plain_config(spec, dtype=dtype)
    elif not card.target_ref:
        raise UserError('The layout "speculators" names the target: say which one it is, or choose the layout "plain".')
    else:
        config = speculators_config(
            spec,
            dtype=dtype,
            verifier=card.target_ref,
            architectures=card.target_architectures,
            speculative_tokens=card.speculative_tokens,
        )
    first_layer: FirstLayer = "midlayer" if layout == "plain" and spec.layers == 1 else "layers.0"
    tensors = _tensors(spec, params, draft_to_target_D, embed_VW, first_layer, dtype)
    export = Export("vLLM", layout, dtype, str(out), spec, target_layers, card)
    return _write(export, tensors, config, tokenizer, check)


def _tensors(
    spec: DraftSpec,
    params: Mapping[str, Readable],
    draft_to_target_D: np.ndarray | None,
    embed_VW: Readable | None,
    first_layer: FirstLayer,
    dtype: Dtype,
) -> dict[str, Planned]:
    """Everything that goes into the safetensors file under torch names, its shapes checked; read when it is written."""
    if dtype not in DTYPES:
        raise UserError(f"No export is stored as {dtype!r}: choose {', '.join(DTYPES)}.")
    check_params(spec, params)
    check_embedding(spec, None if embed_VW is None else embed_VW.shape, where="The draft's parameters")
    named = {torch_name(name, first_layer): planned(name, array, dtype) for name, array in params.items()}
    if embed_VW is not None:
        named[EMBEDDING] = planned(EMBEDDING, embed_VW, dtype)
    return named | {name: whole(table) for name, table in tables_of(spec, draft_to_target_D).items()}


def _write(
    export: Export, tensors: dict[str, Planned], config: dict[str, Any], tokenizer: Any, check: Check | None
) -> Path:
    out = Path(export.out)
    try:
        with atomic_folder(out, EXPORT) as folder:
            _put_tokenizer(tokenizer, folder)
            write_safetensors(folder / "model.safetensors", tensors)
            (folder / "config.json").write_text(_json(config), "utf-8")
            (folder / "README.md").write_text(readme(export), "utf-8")
            (folder / EXPORT_FILE).write_text(_json(record(export)), "utf-8")
            if check is not None:
                check(folder)
    except OSError as error:
        raise UserError(f"The export cannot be written to {out}: {error}.") from error
    return out


def _check_replaced(spec: DraftSpec, embed_VW: Readable | None, target_embed_VW: Readable | None) -> None:
    """UserError where SGLang would put other rows in place of the draft's own, rounding to bfloat16 aside."""
    if embed_VW is None or target_embed_VW is None or spec.width != spec.target_width:
        return
    for start in range(0, spec.target_vocab, _ROWS):
        ours, theirs = (np.asarray(e[start : start + _ROWS], np.float32) for e in (embed_VW, target_embed_VW))
        if not np.allclose(ours, theirs, rtol=_BFLOAT16_STEP, atol=1e-30):
            raise UserError("SGLang would put the target's embedding in place of the draft's own: export it for vLLM.")


def _put_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
        return
    files = [Path(tokenizer) / name for name in TOKENIZER_FILES]
    if not any(file.is_file() for file in files):
        raise UserError(f"{tokenizer} holds no tokenizer: expected tokenizer.json or tokenizer.model there.")
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
