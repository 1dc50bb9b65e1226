"""A target's weights from a GGUF file, under Hugging Face's names.

The gguf package maps Hugging Face's names to those of a GGUF; this module undoes what llama.cpp's convert_hf_to_gguf.py
changes in the numbers besides: it permutes, stacks, splits and transposes some tensors, and adds 1 to Gemma's norms.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from jeagle.errors import UserError
from jeagle.targets.families import family_of
from jeagle.targets.gguf.config import read_config
from jeagle.targets.gguf.reader import GgufTensor, open_gguf
from jeagle.targets.quantised.views import (
    View,
    WeightSource,
    as_row,
    flattened,
    interleaved,
    joined,
    mapped,
    picked,
    reordered,
    swapped,
)

Make = Callable[[list[GgufTensor], Mapping[str, Any]], View]


class TensorRecipe(NamedTuple):
    """How a tensor of a Hugging Face checkpoint is made.

    Attributes:
      sources: GGUF names, {i} the layer; the tensor exists where all of them do.
      make: (the sources, config.json) -> the tensor.
    """

    sources: tuple[str, ...]
    make: Make = lambda tensors, config: tensors[0]


def _halves(heads: str) -> Make:
    """Reorders the rows of each head for rotating its halves; `heads` is the entry of config.json that counts heads.

    In some architectures llama.cpp rotates the pairs (0, 1), (2, 3), ..., where Hugging Face rotates (0, d/2), (1,
    d/2 + 1), ...: the converter interleaves the two halves of each head's rows.
    """

    def make(tensors: list[GgufTensor], config: Mapping[str, Any]) -> View:
        rows, expected = tensors[0].shape[0], config[heads] * config["head_dim"]
        if rows != expected:
            raise UserError(
                f"The tensor {tensors[0].blocks.name} in {tensors[0].blocks.path} has {rows} rows, but the file's "
                f"metadata makes it {expected}."
            )
        return reordered(tensors[0], np.arange(rows).reshape(config[heads], -1, 2).swapaxes(1, 2).reshape(-1))

    return make


_LAYER, _BLOCK = "model.layers.{i}.", "blk.{i}."
# Tensors that are made of others, or that the gguf package does not map, by their names in Hugging Face's checkpoint.
RECIPES: dict[str, TensorRecipe] = {
    # MLA: for each head the rows of its key without rotation, then those of its value; the keys' part is transposed.
    f"{_LAYER}self_attn.kv_b_proj.weight": TensorRecipe(
        (f"{_BLOCK}attn_k_b.weight", f"{_BLOCK}attn_v_b.weight"),
        lambda tensors, config: flattened(joined([swapped(tensors[0]), tensors[1]], axis=1)),
    ),
    f"{_LAYER}mlp.shared_expert_gate.weight": TensorRecipe(
        (f"{_BLOCK}ffn_gate_inp_shexp.weight",), lambda tensors, config: as_row(tensors[0])
    ),
    # gpt-oss: gate and up are interleaved, and matrices are [in, out].
    f"{_LAYER}mlp.experts.gate_up_proj": TensorRecipe(
        (f"{_BLOCK}ffn_gate_exps.weight", f"{_BLOCK}ffn_up_exps.weight"),
        lambda tensors, config: interleaved([swapped(tensor) for tensor in tensors]),
    ),
    f"{_LAYER}mlp.experts.gate_up_proj_bias": TensorRecipe(
        (f"{_BLOCK}ffn_gate_exps.bias", f"{_BLOCK}ffn_up_exps.bias"), lambda tensors, config: interleaved(tensors)
    ),
    f"{_LAYER}mlp.experts.down_proj": TensorRecipe(
        (f"{_BLOCK}ffn_down_exps.weight",), lambda tensors, config: swapped(tensors[0])
    ),
}
# Architectures in which llama.cpp rotates neighbouring pairs.
_PAIRED = {"granite", "llama", "mistral3", "smollm3"}
# Architectures whose norms multiply by 1 + weight; the converter stores the sum.
_ZERO_CENTRED = {"gemma", "gemma2", "gemma3"}
# Tensors that are read as part of the configuration.
_OF_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


class GgufWeights(WeightSource):
    """The WeightSource of a GGUF file or its parts. Arrays are float32, whatever their type in the file.

    Raises:
      UserError: for an architecture, a metadata key or a tensor that is not supported.
    """

    def __init__(self, path: Path):
        opened = open_gguf(path)
        self.config = read_config(opened)
        architecture, layers = opened.metadata["general.architecture"], self.config["num_hidden_layers"]
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        name_map = gguf.get_tensor_name_map(kinds[architecture], layers)
        counts = (self.config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        experts = next(filter(None, counts), 0)
        views: dict[str, View] = {}
        used = set(_OF_CONFIG)
        for pieces in family_of(self.config).names.values():
            patterns = [piece.name for piece in (pieces if isinstance(pieces, tuple) else (pieces,))]
            for i in range(layers) if "{i}" in patterns[0] else [0]:
                for pattern in patterns:  # the first one that the file has
                    recipe = _recipe(pattern, i, architecture, name_map)
                    sources = [source.format(i=i) for source in recipe.sources]
                    if not sources or not all(source in opened.tensors for source in sources):
                        continue
                    used.update(sources)
                    view = recipe.make([opened.tensors[source] for source in sources], self.config)
                    if "{e}" in pattern:
                        views |= {pattern.format(i=i, e=e): picked(view, e) for e in range(experts)}
                    else:
                        views[pattern.format(i=i)] = view
                    break
        for name in sorted(set(opened.tensors) - used):
            # Layers that only predict further tokens (multi-token prediction of DeepSeek and GLM) are not part of a
            # target; the file counts them as blocks.
            match, blocks = re.match(r"blk\.(\d+)\.", name), int(opened.metadata[f"{architecture}.block_count"])
            if not (match and layers <= int(match[1]) < blocks):
                raise UserError(
                    f"The target {path} has a tensor {name} that jeagle does not know for this architecture: it would "
                    "be left out of the model, so the file is refused."
                )
        super().__init__(path, views)


def _recipe(pattern: str, layer: int, architecture: str, name_map: gguf.TensorNameMap) -> TensorRecipe:
    """The recipe of a tensor of Hugging Face's checkpoint; without sources where the architecture has none."""
    if pattern in RECIPES:
        return RECIPES[pattern]
    # The converter stacks experts and gives every tensor a suffix, as the names of the map have them.
    name = re.sub(r"_bias$", ".bias", pattern.replace(".{e}", "").format(i=layer))
    name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
    source = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
    sources = (source,) if source else ()
    if architecture in _PAIRED and (projection := re.search(r"self_attn\.([qk])_proj", name)):
        return TensorRecipe(sources, _halves("num_attention_heads" if projection[1] == "q" else "num_key_value_heads"))
    if architecture in _ZERO_CENTRED and name.endswith("norm.weight"):
        return TensorRecipe(sources, lambda tensors, config: mapped(tensors[0], lambda weight: weight - 1))
    return TensorRecipe(sources)
