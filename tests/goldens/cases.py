"""Reads a golden case of either trainer into jeagle's own types.

A case is an .npz file in a folder named after its dialect. JEAGLE_GOLDENS names further folders, separated by colons.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jeagle.interfaces import Batch, DraftSpec, Rope

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step of a peer: what went in, and what came out."""

    batch: Batch
    aux_BTAH: np.ndarray
    last_BTH: np.ndarray
    target_head_VH: np.ndarray
    spec: DraftSpec
    steps: int
    weights: dict[str, np.ndarray]  # torch names without "midlayer." or "layers.0." differences
    draft_to_target: np.ndarray
    switches: dict[str, Any]
    arrays: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]


def folders() -> list[Path]:
    extra = [Path(p) for p in os.environ.get("JEAGLE_GOLDENS", "").split(":") if p]
    return [HERE / "specforge", HERE / "speculators", *extra]


def case_files(dialect: str) -> list[Path]:
    """Training-step cases of a dialect, optimiser tables and loose losses left out."""
    files = [p for folder in folders() if folder.name == dialect for p in sorted(folder.glob("*.npz"))]
    key = {"specforge": "expected/total_loss", "speculators": "batch/document_ids"}[dialect]
    return [p for p in files if key in np.load(p).files]


def load_json(value: np.ndarray) -> Any:
    return json.loads(bytes(value).decode() if value.dtype == np.uint8 else str(value))


def _rope(config: dict[str, Any]) -> Rope:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    return Rope(theta) if kind == "default" else Rope(theta, tuple(sorted({**scaling, "rope_type": kind}.items())))


def _spec(config: dict[str, Any], aux_layers: int, target_width: int, **switches: Any) -> DraftSpec:
    heads = config["num_attention_heads"]
    return DraftSpec(
        target_width=target_width,
        width=config["hidden_size"],
        target_vocab=config["vocab_size"],
        aux_layers=tuple(range(aux_layers)),
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        norm_eps=config["rms_norm_eps"],
        rope=_rope(config),
        **switches,
    )


def specforge(path: Path) -> Case:
    z = np.load(path)
    config, meta = load_json(z["config_json"]), load_json(z["meta_json"])
    mask = z["batch/attention_mask"]
    segments = mask.astype(np.int32)
    # Their positions run over the row, padding included, wherever the padding lies; only differences matter.
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    width = z["batch/target"].shape[-1]
    aux_layers = z["batch/hidden_state"]
    weights = {k[6:].replace("midlayer.", "layers.0."): z[k] for k in z.files if k.startswith("draft/")}
    supervised = z["batch/loss_mask"].astype(bool)
    offsets = weights.pop("d2t")
    weights.pop("t2d")
    return Case(
        batch=Batch(z["batch/input_ids"].astype(np.int32), segments, positions, supervised),
        aux_BTAH=aux_layers.reshape(*aux_layers.shape[:2], -1, width),
        last_BTH=z["batch/target"],
        target_head_VH=z["target_lm_head"],
        spec=_spec(
            config,
            aux_layers.shape[-1] // width,
            width,
            draft_vocab=len(offsets),
            fc_norm=config.get("fc_norm") or False,
            head_norm=config.get("norm_output", True),
        ),
        steps=meta["ttt_length"],
        weights=weights,
        draft_to_target=np.arange(len(offsets)) + offsets,
        switches=_specforge_switches(meta),
        arrays={k[9:]: z[k] for k in z.files if k.startswith("expected/")},
        grads={k[5:].replace("midlayer.", "layers.0."): z[k] for k in z.files if k.startswith("grad/")},
    )


def _specforge_switches(meta: dict[str, Any]) -> dict[str, Any]:
    """Their acceptance-driven losses take a mean over the slots that carry loss, whatever divides the cross entropy."""
    switches = {"decay": meta["ploss_decay"]}
    if meta["lk_loss_type"] == "alpha":
        return switches | {"loss": "nla", "normaliser": "counting"}
    if meta["lk_loss_type"] == "lambda":
        return switches | {"loss": "lk_step", "lk_scale": meta["kl_scale"], "lk_decay": meta["kl_decay"]}
    return switches


def speculators(path: Path) -> Case:
    z = np.load(path)
    info = load_json(z["info_json"])
    config, layer = info["config"], dict(info["transformer_layer_config_full"])
    documents = _speculators_documents(z)
    width = documents[0]["last"].shape[-1]
    packed = {k: np.concatenate([d[k] for d in documents])[None] for k in documents[0]}
    weights = {k[2:]: z[k] for k in z.files if k.startswith("w/")}
    offsets = weights.pop("d2t", np.zeros(weights["lm_head.weight"].shape[0], np.int64))
    weights.pop("t2d", None)
    norm = weights.pop("verifier_norm.weight")
    last = packed["last"].astype(np.float32)
    last = last / np.sqrt((last**2).mean(-1, keepdims=True) + layer["rms_norm_eps"]) * norm
    draft_to_target = np.arange(len(offsets)) + offsets
    head = np.zeros((layer["vocab_size"], width), np.float32)
    head[draft_to_target] = weights.pop("verifier_lm_head.weight")
    return Case(
        batch=Batch(packed["tokens"], packed["segments"], packed["positions"], packed["supervised"].astype(bool)),
        aux_BTAH=packed["taps"].reshape(*packed["taps"].shape[:2], -1, width),
        last_BTH=last,
        target_head_VH=head,
        spec=_spec(
            layer,
            packed["taps"].shape[-1] // width,
            width,
            draft_vocab=len(offsets),
            norm_before_residual=config["norm_before_residual"],
            norm_before_fc=config["norm_before_fc"],
            fc_norm=config["fc_norm"],
            carry_normed=config["norm_output"],
            qk_norm=layer["model_type"] == "qwen3",
            attention_bias=layer.get("attention_bias") or False,
            sliding_window=_window(layer),
        ),
        steps=info["ttt_steps"],
        weights=weights,
        draft_to_target=draft_to_target,
        switches={"decay": info["ttt_step_loss_decay"], "loss": info["loss_fn"]},
        arrays={k: z[k] for k in z.files if k == "loss" or k.startswith("metric/")},
        grads={k[5:]: z[k] for k in z.files if k.startswith("grad/")},
    )


def _window(layer: dict[str, Any]) -> int:
    kinds = layer.get("layer_types") or []
    return (layer.get("sliding_window") or 0) if "sliding_attention" in kinds else 0


def _speculators_documents(z: Any) -> list[dict[str, np.ndarray]]:
    """The documents whole, as jeagle packs them, from what their packer cut: a document's slots are one fewer than
    its tokens, and the row ends after `S` slots."""
    room = z["batch/input_ids"].shape[1]
    documents = []
    for i in range(sum(k.startswith("sample") and k.endswith("/input_ids") for k in z.files)):
        kept = min(len(z[f"sample{i}/input_ids"]) - 1, room) + 1
        if kept < 2:
            break
        room -= kept - 1
        documents.append(
            {
                "tokens": z[f"sample{i}/input_ids"][:kept].astype(np.int32),
                "supervised": z[f"sample{i}/loss_mask"][:kept],
                "taps": z[f"sample{i}/hidden_states"][:kept],
                "last": z[f"sample{i}/verifier_last_hidden_states"][:kept],
                "segments": np.full(kept, i + 1, np.int32),
                "positions": np.arange(kept, dtype=np.int32),
            }
        )
    return documents
