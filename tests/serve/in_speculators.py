"""Runs in vLLM's environment with speculators beside it: python in_speculators.py EXPORT ARRAYS; prints JSON.

EXPORT is a draft in the speculators layout, ARRAYS an npz of `loss.raw`. The library's own classes load the export, cut
and pack the documents, and compute the loss. Imports nothing of jeagle.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
from safetensors import safe_open
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig, shift_batch
from speculators.train.data import CollateFn

TTT_STEPS = 3


def main(export: Path, arrays: Path) -> dict[str, Any]:
    config = Eagle3SpeculatorConfig.from_pretrained(export, trust_remote_code=False)
    config.transformer_layer_config._attn_implementation = "sdpa"  # what a CPU has
    model = Eagle3DraftModel.from_pretrained(export, config=config, dtype=torch.float32, trust_remote_code=False).eval()
    documents = samples(dict(np.load(arrays)))
    slots = sum(len(document["input_ids"]) - 1 for document in documents)
    width = config.transformer_layer_config.hidden_size
    batch = CollateFn(slots, width, dtype=torch.float32, preprocess=shift_batch)(documents)
    batch.pop("error_records")
    with torch.no_grad():
        _, loss, metrics = model(
            **batch, ttt_steps=TTT_STEPS, loss_config=resolve_loss_config("kl_div", implementation="eager")
        )
    steps = range(TTT_STEPS)
    return {
        "loss": loss.item(),
        "by_step": [metrics[f"loss_{k}_sum"].item() for k in steps],
        "counting": [int(metrics[f"full_acc_{k}_total"]) for k in steps],
        "not_loaded": not_loaded(model, export),
    }


def samples(arrays: dict[str, np.ndarray]) -> list[dict[str, torch.Tensor]]:
    """The documents one by one."""
    lengths = arrays.pop("lengths")
    ends = np.cumsum(lengths)
    found = []
    for start, end in zip(ends - lengths, ends, strict=True):
        sample = {name: torch.from_numpy(array[start:end]) for name, array in arrays.items()}
        sample["lengths"] = torch.tensor([end - start])
        sample["position_ids"] = torch.arange(end - start)
        found.append(sample)
    return found


def not_loaded(model: torch.nn.Module, export: Path) -> list[str]:
    """Tensors of the file that the model does not hold as they are, and parameters that hold NaN."""
    held = model.state_dict()
    wrong = [f"{name} holds NaN" for name, tensor in held.items() if tensor.isnan().any()]
    with safe_open(export / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name not in held or not torch.equal(held[name], file.get_tensor(name)):
                wrong.append(name)
    return wrong


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
