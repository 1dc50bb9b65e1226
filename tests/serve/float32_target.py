"""Writes any target that jeagle reads as a float32 Hugging Face folder, which engines can read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jeagle import targets

SHARD_BYTES = 2**31


def write_float32(ref: str, out: Path) -> Path:
    """Writes config.json and safetensors of the target `ref`, its weights dequantised; returns `out`.

    The tokenizer is left out, because engines are given token ids. At most one shard is in memory.

    Raises:
      UserError: for a target that cannot be found or read.
    """
    source = targets.open_weights(targets.resolve(ref))
    out.mkdir(parents=True, exist_ok=True)
    config = source.config | {"dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    where: dict[str, str] = {}
    for number, names in enumerate(shards({name: source.shape(name) for name in source.names()})):
        file = f"model-{number:05d}.safetensors"
        arrays = {name: np.ascontiguousarray(source.read(name), np.float32) for name in names}
        save_file(arrays, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Groups the names, in their order, into shards of at most SHARD_BYTES in float32."""
    found: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        if found[-1] and size > room:
            found.append([])
            room = SHARD_BYTES
        found[-1].append(name)
        room -= size
    return found
