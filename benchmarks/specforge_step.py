"""`python benchmarks/specforge_step.py ARRAYS`, in an environment with SpecForge and torch: a step for each line read.

ARRAYS is an npz of `benchmarks.beside`. SpecForge's own unchanged classes take the step (OnlineEagle3Model over
LlamaForCausalLMEagle3, sdpa, torch.compile); only its Triton loss, which needs a GPU, is replaced by its own reference
implementation in torch. Imports nothing of jeagle. A line is answered with JSON: loss, gradient_norm, wall_s, cpu_s.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}  # CPU-seconds mean work

import numpy as np
import torch
import torch._inductor.compile_fx  # before the stand-in for triton, whose absence it must notice
from transformers import LlamaConfig

DECAY = 0.8


@contextlib.contextmanager
def stand_in_for_triton() -> Iterator[None]:
    """SpecForge decorates kernels with triton's names when it is imported; none of them runs here."""
    names = ("triton", "triton.language")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["triton"].jit = lambda function: function
    sys.modules["triton"].language = sys.modules["triton.language"]
    sys.modules["triton.language"].constexpr = object
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Step:
    """One training step of the work: the teacher's logits, seven TTT steps, gradients, clip, AdamW, figures."""

    def __init__(self, arrays: dict[str, np.ndarray], config: dict[str, Any]):
        with stand_in_for_triton():
            import specforge.core.loss as losses
            from specforge.algorithms.eagle3 import model as eagle3
            from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

        eagle3.LogSoftmaxLoss = types.SimpleNamespace(apply=losses._compute_loss)
        steps = config.pop("steps")
        draft = LlamaForCausalLMEagle3(LlamaConfig(**config), attention_backend="sdpa").float()
        held = {name[6:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("draft/")}
        missing, unknown = draft.load_state_dict(held, strict=False)
        assert not unknown and not [name for name in missing if "rotary" not in name], (missing, unknown)
        draft.embed_tokens.weight.requires_grad_(False)
        self.model = torch.compile(eagle3.OnlineEagle3Model(draft, length=steps, attention_backend="sdpa"))
        self.trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)
        given = {name: torch.from_numpy(arrays[name]) for name in ("tokens", "mask", "taps", "last", "head")}
        self.head, self.last = given["head"], shifted(given["last"])
        self.inputs = {
            "input_ids": shifted(given["tokens"].long()),
            "attention_mask": torch.ones_like(given["mask"]),
            "loss_mask": shifted(given["mask"])[..., None],
            "hidden_states": given["taps"],
        }

    def __call__(self) -> dict[str, float]:
        with torch.no_grad():
            target = self.last @ self.head.T
        losses, accepted, correct, *_ = self.model(target=target, **self.inputs)
        loss = sum(DECAY**k * one for k, one in enumerate(losses))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack([*accepted, *correct]).tolist()
        return {"loss": loss.item(), "gradient_norm": norm.item()}


def shifted(x: torch.Tensor) -> torch.Tensor:
    """One position to the left, zeros at the end, as SpecForge's data path does."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(path: str) -> None:
    arrays = dict(np.load(path))
    step = Step(arrays, json.loads(str(arrays.pop("config"))))
    for _ in sys.stdin:
        cpu, begun = cpu_s(), time.perf_counter()
        found = step()
        found |= {"wall_s": time.perf_counter() - begun, "cpu_s": cpu_s() - cpu}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
