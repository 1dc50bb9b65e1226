"""What the oracle itself has to hold before anything is compared with it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

TOLERANCE = 1e-4


def check(folder: Path) -> str:
    """Holds a golden to its laws; what is remarkable, in words.

    The folder, loaded anew, gives the golden. Which tensors do not change the logits. Decoding with a cache,
    token by token, gives the golden, and so does each of two documents packed into one row, where transformers can.

    Raises:
      AssertionError: if the folder does not give the golden.
    """
    golden = {k: torch.from_numpy(v) for k, v in np.load(folder / "golden.npz").items()}
    tokens, logits = golden["tokens"].long(), golden["logits"]
    model = load(folder)
    error = _apart(model(input_ids=tokens, use_cache=False).logits, logits)
    assert error < TOLERANCE, f"{folder.name}: loaded anew, its logits are off by {error:.1e}"
    dead = _without_effect(model, tokens, logits)
    with torch.no_grad():
        found = {"cached": _cached(model, tokens, logits), "packed": _packed(model, tokens, logits)}
    words = [f"{law} {value}" if isinstance(value, str) else f"{law} {value:.0e}" for law, value in found.items()]
    return ", ".join(words + [f"without effect: {' '.join(dead)}"] * bool(dead))


@torch.no_grad()
def load(folder: Path) -> Any:
    """The model of a folder as transformers reads it, in float32."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    said = config.get("quantization_config", {})
    if said.get("quant_method") == "fp8":
        with tempfile.TemporaryDirectory() as plain:
            _dequantise(folder, config, Path(plain))
            return load(Path(plain))
    more = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if said else {}
    settings = {"dtype": torch.float32, "attn_implementation": "eager"} | more
    return cls.from_pretrained(folder, trust_remote_code=False, **settings).float().eval()


def _dequantise(folder: Path, config: dict[str, Any], plain: Path) -> None:
    """fp8 by transformers' function for a matrix: its loader takes a last, shorter block for an equal share of rows."""
    size = config.pop("quantization_config")["weight_block_size"]
    (plain / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("weight_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = _dequantize_fp8_weight(tensors[weight], tensors.pop(name), size, torch.float32)
    save_file({k: v for k, v in tensors.items() if "activation_scale" not in k}, plain / "model.safetensors")


@torch.no_grad()
def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def _without_effect(model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> list[str]:
    """Tensors whose values, shifted by one place, leave the logits as they are, which some may.

    A last layer's scalar vanishes in the final norm; a key's bias without rotation, in the softmax.
    """
    saved, dead = set(model.state_dict()), []
    buffers = {k: b for k, b in model.named_buffers() if k in saved}
    for name, tensor in (dict(model.named_parameters()) | buffers).items():
        if any(part in name for part in ("vision", "visual", "multi_modal", "embed_audio")):
            continue
        kept = tensor.clone()
        tensor.copy_(kept.flatten().roll(1).view_as(kept) if kept.numel() > 1 else kept * 1.1)
        if _apart(model(input_ids=tokens, use_cache=False).logits, logits) < 10 * TOLERANCE:
            dead.append(name)
        tensor.copy_(kept)
    return dead


def _cached(model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> float | str:
    cache, pieces = None, []
    try:
        for i in range(tokens.shape[1]):
            output = model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"impossible ({str(error)[:60]})"
    return _apart(torch.cat(pieces, 1), logits)


def _packed(model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> float | str:
    """Row 0 behind row 1's beginning: its positions start anew, so transformers masks what came before."""
    before = 7
    row = torch.cat([tokens[1, :before], tokens[0]])[None]
    positions = torch.cat([torch.arange(before), torch.arange(tokens.shape[1])])[None]
    try:
        output = model(input_ids=row, position_ids=positions, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError) as error:
        return f"impossible ({str(error)[:60]})"
    return _apart(output[:, before:], logits[:1])
