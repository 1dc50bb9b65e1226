"""Reading a target from a GGUF file: its configuration, and its weights under Hugging Face's names.

Source: the GGUF specification of ggml, and llama.cpp's convert_hf_to_gguf.py, whose changes are undone here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES

from jeagle.errors import UserError
from jeagle.targets.gguf_config import read_config

# GGUF name -> Hugging Face name; {i} is the layer. One table an architecture of `gguf_config.ARCHITECTURES`.
NAMES = {
    "llama": {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "blk.{i}.attn_q.bias": "model.layers.{i}.self_attn.q_proj.bias",
        "blk.{i}.attn_k.bias": "model.layers.{i}.self_attn.k_proj.bias",
        "blk.{i}.attn_v.bias": "model.layers.{i}.self_attn.v_proj.bias",
        "blk.{i}.attn_output.bias": "model.layers.{i}.self_attn.o_proj.bias",
        "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
        "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    }
}
# Read into the configuration, not as weights.
CONFIGURING = {"rope_freqs.weight"}


class GgufWeights:
    """The WeightSource of one GGUF file. Arrays are float32, whatever their type in the file."""

    def __init__(self, path: Path):
        self._path = path
        reader = open_gguf(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = read_config(path, metadata(reader), tensors)
        names = NAMES[metadata(reader)["general.architecture"]]
        layers = range(self.config["num_hidden_layers"])
        known = {old.format(i=i): new.format(i=i) for old, new in names.items() for i in layers}
        if strange := sorted(set(tensors) - set(known) - CONFIGURING):
            raise UserError(
                f"The target {path} has a tensor {strange[0]} that jeagle does not know for this architecture: it "
                "would be left out of the model, so the file is refused."
            )
        self._tensors = {known[name]: tensor for name, tensor in tensors.items() if name in known}
        self._check_shapes()

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        tensor, shape = self._tensor(name), self.shape(name)
        index = index or (slice(None),) * len(shape)
        rows = self._rows(name, shape[0])
        stored = tensor.data if rows is None else tensor.data[rows[index[0]]]
        if len(shape) == 1:
            return self._dequantised(name, stored if rows is not None else stored[index[0]])
        stored = stored if rows is not None else stored[index[0]]
        return self._columns(name, stored, range(shape[1])[index[1]])

    def _columns(self, name: str, stored: np.ndarray, columns: range) -> np.ndarray:
        """The columns of stored rows: only the blocks of quantised values that they touch are decoded."""
        block, size = GGML_QUANT_SIZES[self._tensor(name).tensor_type]
        if stored.dtype != np.uint8:
            block, size = 1, 1  # plain numbers are indexed by element, blocks by byte
        first, last = columns.start // block, -(-columns.stop // block)
        decoded = self._dequantised(name, stored[:, first * size : last * size])
        return decoded[:, columns.start - first * block : columns.stop - first * block]

    def _dequantised(self, name: str, stored: np.ndarray) -> np.ndarray:
        kind = self._tensor(name).tensor_type
        try:
            return np.asarray(gguf.quants.dequantize(np.ascontiguousarray(stored), kind), np.float32)
        except NotImplementedError as error:
            raise UserError(
                f"The target's tensor {name} in {self._path} is of type {kind.name}, which the gguf package cannot "
                "decode: give another quantisation of the model."
            ) from error

    def _rows(self, name: str, out: int) -> np.ndarray | None:
        """Row of the file for each row in Hugging Face's order, for q and k; None where the orders agree.

        llama.cpp rotates neighbouring pairs (0,1), (2,3), ..., Hugging Face the halves (0,d/2), (1,d/2+1), ...: the
        converter interleaves the two halves of each head's rows.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None:
            return None
        return np.arange(out).reshape(self.config[heads], -1, 2).swapaxes(1, 2).reshape(-1)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise UserError(f"The target {self._path} has no tensor {name}: is its download complete?")
        return self._tensors[name]

    def _check_shapes(self) -> None:
        for name, expected in expected_shapes(self.config).items():
            if (found := self.shape(name)) != expected:
                raise UserError(
                    f"The target's tensor {name} in {self._path} is {found}, but its metadata makes it {expected}."
                )


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a Llama of this configuration cannot do without."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (q, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, q),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
    }
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    layers = range(config["num_hidden_layers"])
    return shapes | {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}


def open_gguf(path: Path) -> GGUFReader:
    """A file's header, read once a process: weights and tokenizer both ask for it.

    Raises:
      UserError: for a file that is not GGUF or is cut short, naming the tensor where it ends.
    """
    status = path.stat()
    return _open_gguf(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open_gguf(path: Path, _size: int, _mtime: int) -> GGUFReader:
    try:
        return _Reader(path)
    except UserError:
        raise
    except Exception as error:  # the package raises whatever numpy does where the header is broken
        raise UserError(f"The target {path} is not a whole GGUF file ({error}): download it again.") from error


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """Every key of the header with its value: numbers, text, or lists of them."""
    return {name: field.contents() for name, field in reader.fields.items()}


class _Reader(GGUFReader):
    """GGUFReader that takes arrays whole (its own loop spends seconds on a vocabulary) and names what is cut off."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        types, start, count = [GGUFValueType.ARRAY, GGUFValueType(kind[0])], orig_offs + 12, int(length[0])
        if types[1] == GGUFValueType.STRING:
            texts, end = self._strings(start, count)
            return end - orig_offs, [kind, length, *texts], list(range(2, 2 + count)), types
        if types[1] not in self.gguf_scalar_to_np:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(start, self.gguf_scalar_to_np[types[1]], count)
        if len(values) < count:
            raise ValueError("its header is cut short")
        return 12 + int(values.nbytes), [kind, length, values], [2], types

    def _strings(self, offset: int, count: int) -> tuple[list[memoryview], int]:
        data, texts = self.data.data, []
        for _ in range(count):
            start = offset + 8
            offset = start + int.from_bytes(data[offset:start], "little")
            if offset > len(data):
                raise ValueError("its header is cut short")
            texts.append(data[start:offset])
        return texts, offset

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
            end = start_offs + int(offset[0]) + int(np.prod(dims)) // block * block_bytes
            if end > (size := len(self.data)):
                raise UserError(
                    f"The target {self.data.filename} is cut short at its tensor {bytes(name).decode()} ({size} bytes "
                    f"of at least {end}): download it again."
                )
        super()._build_tensors(start_offs, fields)
