"""Makes the goldens of targets: tiny random models of transformers' own classes, and the numbers that they compute.

    python -m tests.targets.make_goldens [--only REGEX] [--seed N] [--out DIR] [--hidden N] [--layers N] [--check]

Each case of golden_cases.py becomes a folder: config.json, model.safetensors, and golden.npz with
    tokens [2, T], hidden [L + 1, 2, T, H] (the residual stream before the first layer and after each one), last
    [2, T, H] (after the final norm), logits [2, T, V]; float32, eager attention.
The same (case, seed, shape) gives the same folder. Needs torch and transformers; those in goldens/ were made with
torch 2.13.0 (CPU) and transformers 5.23.0. --check also holds the oracle to its own laws.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.targets import golden_checks, golden_formats
from tests.targets.golden_cases import BASE, CASES, Case, Shape

FOLDER = Path(__file__).parent / "goldens"
HIDDEN = 32
ROWS = 2
FLOAT32 = re.compile("e_score_correction_bias|A_log|sinks")
KEPT_NONE = {"pad_token_id", "sliding_window", "q_lora_rank", "audio_config"}  # null means something there


def main() -> None:
    options = _options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, case in CASES.items():
        if re.search(options.only, name):
            shape = Shape(options.hidden, options.layers or case.layers)
            make(name, case, shape, options.seed, options.out / name)
            size = sum(file.stat().st_size for file in (options.out / name).iterdir())
            found = golden_checks.check(options.out / name) if options.check else ""
            print(f"{name:<34}{size / 1000:7.0f} kB  {found}", flush=True)


def make(name: str, case: Case, shape: Shape, seed: int, folder: Path) -> None:
    """Writes the folder of one case."""
    torch.manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    model = build(case, shape)
    randomise(model)
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = written_config(case, shape, folder)
    tensors = {k: narrowed(k, v) for k, v in load_file(folder / "model.safetensors").items()}
    tokens = torch.randint(3, BASE["vocab_size"], (ROWS, case.tokens))
    if case.stored:
        tensors, plain, said = golden_formats.FORMATS[case.stored](tensors)
        write(folder, plain, config)
        model = golden_checks.load(folder)
        config |= {"quantization_config": said} if said else {}
    tensors |= {extra.format(L=shape.layers): torch.randn(shape.hidden) for extra in case.extra}
    write(folder, tensors, config)
    arrays = {"tokens": tokens.int(), **run(model, tokens)}
    np.savez_compressed(folder / "golden.npz", **{k: v.numpy() for k, v in arrays.items()})


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def narrowed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """As checkpoints have it: bfloat16, which holds these values exactly, but for what they keep in float32."""
    return tensor if FLOAT32.search(name) else tensor.bfloat16()


def build(case: Case, shape: Shape) -> torch.nn.Module:
    """The model, in float32, with transformers' own initial values."""
    cls = getattr(transformers, case.architecture)
    config = cls.config_class(**settings(case, shape))
    config._attn_implementation = "eager"
    return cls(config).float().eval()


def settings(case: Case, shape: Shape) -> dict[str, Any]:
    """What the case says, as config.json does: its text part nested where there are other modalities."""
    if case.text is None:
        return _resolved(BASE | case.config, shape)
    return _resolved(case.config, shape) | {"text_config": _resolved(BASE | case.text, shape)}


def _resolved(tree: dict[str, Any], shape: Shape) -> dict[str, Any]:
    values = {}
    for key, value in tree.items():
        value = value(shape) if callable(value) else value
        values[key] = _resolved(value, shape) if isinstance(value, dict) else value
    return {k: v for k, v in values.items() if v is not None or k in KEPT_NONE}


def written_config(case: Case, shape: Shape, folder: Path) -> dict[str, Any]:
    """config.json: save_pretrained's, or only what the case says."""
    saved = json.loads((folder / "config.json").read_text())
    if not case.published:
        return saved
    return settings(case, shape) | {
        "architectures": saved["architectures"],
        "model_type": saved["model_type"],
        "torch_dtype": "bfloat16",
    }


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Random values for every parameter and every buffer that is saved, exact in bfloat16.

    Matrices keep the variance of their input; everything else is what transformers starts from, and noise.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    saved = set(model.state_dict())
    tensors = dict(model.named_parameters()) | {k: b for k, b in model.named_buffers() if k in saved}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape)
        if id(tensor) in embeddings:
            value = noise * 0.5
        elif tensor.ndim >= 2:
            fan_in = (
                tensor.shape[-1] if tensor.ndim == 2 or "conv" in name else model.config.get_text_config().hidden_size
            )
            gain = 3.0 if re.search(r"router|mlp\.gate\.|shared_expert_gate|q_proj|q_b_proj", name) else 1.2
            value = noise * gain / math.sqrt(fan_in)
        else:
            value = tensor + 0.3 * noise
        tensor.copy_(value.bfloat16())


@torch.no_grad()
def run(model: torch.nn.Module, tokens: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    """hidden [L + 1, B, T, H], last and logits of a forward pass."""
    decoder = text_decoder(model)
    streams: list[torch.Tensor] = []
    finals: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(module: Any, args: Any, output: Any) -> None:
        streams.append((output if torch.is_tensor(output) else output[0]).clone())

    hooks = [decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in decoder.layers]
    hooks += [decoder.norm.register_forward_hook(lambda module, args, output: finals.append(output.clone()))]
    output = model(input_ids=tokens, **({"use_cache": False} | more))
    for hook in hooks:
        hook.remove()
    return {"hidden": torch.stack(streams), "last": finals[0], "logits": output.logits}


def text_decoder(model: torch.nn.Module) -> Any:
    """The module that holds embed_tokens, layers and norm."""
    inner = model.model if hasattr(model, "model") else model.language_model.model
    return inner if hasattr(inner, "layers") else inner.language_model


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of cases, a regular expression")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="a multiple of 32")
    parser.add_argument("--layers", type=int, help="instead of each case's own number")
    parser.add_argument("--check", action="store_true", help="hold the oracle to its own laws")
    return parser.parse_args()


if __name__ == "__main__":
    main()
