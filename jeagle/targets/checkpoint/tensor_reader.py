"""Reads slices of parameters from a checkpoint's tensors, and rows by vocabulary without loading the model."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jeagle.errors import UserError
from jeagle.targets.checkpoint.layout import ParameterLayout
from jeagle.targets.families import PREFIXES, family_of, read_spec
from jeagle.targets.families.common import Family, Piece
from jeagle.targets.model.spec import BlockSpec
from jeagle.targets.quantised.views import WeightSource


class ParameterReader:
    """Reads slices of parameters from a checkpoint's tensors.

    Args:
      names: where each parameter is stored, by its key; see `families.Family`.
    """

    def __init__(self, source: WeightSource, names: dict[str, Any]):
        self.source, self.names = source, names
        self.present, self.checked = set(source.names()), set[str]()
        self.prefix = next((p for p in PREFIXES if f"{p[0]}embed_tokens.weight" in self.present), PREFIXES[0])

    def read(self, layout: ParameterLayout, layer: int | None, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a layer's parameter, in any type; `layer` is None outside the layers."""
        piece = self.piece(layout.key, layer)
        if not piece.by_expert:
            return self._cut(piece, self._name(piece, layer, 0), layout.shape, index, layout.block)
        out = np.empty([part.stop - part.start for part in index], layout.dtype)
        for i, expert in enumerate(range(layout.shape[0])[index[0]]):
            name = self._name(piece, layer, expert)
            out[i] = self._cut(piece, name, layout.shape[1:], index[1:], layout.block)
        return out

    def piece(self, key: str, layer: int | None) -> Piece:
        """Where a layer's parameter is stored; of several places the first that exists."""
        if key not in self.names:
            raise UserError(
                f"The target's family does not say where its parameter {key} is stored: add it to its names."
            )
        pieces = self.names[key]
        options = pieces if isinstance(pieces, tuple) else (pieces,)
        return next((p for p in options if self._name(p, layer, 0) in self.present), options[0])

    def _name(self, piece: Piece, layer: int | None, expert: int) -> str:
        name = piece.name.format(i=layer, e=expert)
        for plain, own in zip(PREFIXES[0], self.prefix, strict=True):
            if name.startswith(plain):
                return own + name.removeprefix(plain)
        return name

    def check(self, layout: ParameterLayout, layer: int | None) -> None:
        """Raises UserError unless every tensor of the parameter exists with the expected shape; reads none of them."""
        piece, own, block = self.piece(layout.key, layer), layout.shape, layout.block
        expected = own[1:] if piece.by_expert else own
        if len(expected) > 1 and piece.transposed:
            expected = (*expected[:-2], expected[-1], expected[-2])
        for expert in range(own[0] if piece.by_expert else 1):
            name = self._name(piece, layer, expert)
            self.checked.add(name)
            if name not in self.present:
                raise UserError(f"The target's weights lack the tensor {name}: the download may be incomplete.")
            shape = tuple(self.source.shape(name))
            shape = tuple(n for n in shape if n != 1) if piece.squeeze else shape
            actual = list(shape)
            if piece.rows is not None and block is not None and len(shape) == len(expected):
                axis = piece.row_axis(len(shape))
                if piece.rows(block).max() < shape[axis]:  # the tensor may have rows of other parameters too
                    actual[axis] = expected[axis]
            squeezed = tuple(n for n in expected if n != 1) if piece.squeeze else expected
            if tuple(actual) != squeezed:
                raise UserError(
                    f"The target's tensor {name} is {shape}; config.json makes it {expected}: they belong to different "
                    "models, or a switch was edited."
                )

    def check_all_read(self, layers: int) -> str:
        """A warning that names tensors of the text model that no parameter was checked for; empty where there are none.

        Parts of other modalities, heads that predict further tokens and stored rotary frequencies are not meant.

        Args:
          layers: L, as config.json says.

        Raises:
          UserError: for layers beyond L, since the model that config.json describes is not the one that is stored.
        """
        stem = f"{self.prefix[0]}layers."
        unread = sorted(self.present - self.checked)
        numbers = {name: name.removeprefix(stem).split(".")[0] for name in unread if name.startswith(stem)}
        further = {number for name, number in numbers.items() if ".eh_proj." in name}  # DeepSeek and GLM
        beyond = {int(number) for number in {*numbers.values()} - further if number.isdigit() and int(number) >= layers}
        if beyond:
            raise UserError(
                f"The target's weights have {max(beyond) + 1} layers, and its config.json says {layers}: they belong "
                "to different models, or num_hidden_layers was edited. Download them again."
            )
        text = [name for name in unread if self.prefix == PREFIXES[0] or name.startswith(self.prefix)]
        odd = [
            name
            for name in text
            if numbers.get(name) not in further and not re.search(r"(^|\.)(mtp|lm_head)|rotary_emb\.inv_freq$", name)
        ]
        if not odd:
            return ""
        return (
            f"warning: {len(odd)} tensors of the target are not read, such as {', '.join(odd[:3])}: a switch in its "
            "config.json may be wrong, or they belong to a part that jeagle does not know. Compare its numbers with "
            "python -m jeagle.doctor --against transformers."
        )

    def _cut(
        self, piece: Piece, name: str, own: tuple[int, ...], index: tuple[slice, ...], block: BlockSpec | None
    ) -> np.ndarray:
        """Reads the part at `index` of a parameter of shape `own` from the tensor `name`."""
        transposed = piece.transposed and len(own) > 1
        where = list(index)
        if transposed:
            where[-2], where[-1] = where[-1], where[-2]
        taken: np.ndarray | None = None  # rows of the part that is read
        axis = piece.row_axis(len(own))
        if piece.rows is not None and block is not None:
            rows = piece.rows(block)[where[axis]]
            low = int(rows.min()) if len(rows) else 0
            where[axis], taken = slice(low, int(rows.max()) + 1 if len(rows) else 0), rows - low
        if piece.squeeze:
            part = self.source.read(name).squeeze().reshape(own)[tuple(where)]
        else:
            part = self.source.read(name, tuple(where))
        if taken is not None and not np.array_equal(taken, np.arange(part.shape[axis])):
            part = np.take(part, taken, axis=axis)
        part = np.swapaxes(part, -1, -2) if transposed else part
        return part.astype(np.float32) + piece.plus if piece.plus else part


class Table:
    """Rows [V, H] of a target's files; `table[start:stop]` reads some of them, in the type that they are stored in."""

    def __init__(self, reader: ParameterReader, key: str, shape: tuple[int, ...]):
        self._reader, self.shape = reader, shape
        no_sharding: Any = None  # rows are read into the host's memory
        self._layout = ParameterLayout(key, None, (None,), False, shape, jnp.dtype("float32"), no_sharding, None)
        reader.check(self._layout, None)

    def __getitem__(self, rows: Any) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self._reader.read(self._layout, None, (slice(start, stop), slice(0, self.shape[1])))


def embedding_table(source: WeightSource, family: Family | None = None) -> Table:
    """Returns the embedding's rows as servers read them, without a family's multiplier.

    Raises:
      UserError: where the files lack it, or its shape is not what config.json says.
    """
    return _table(source, family, "embed_tokens")


def head_table(source: WeightSource, family: Family | None = None) -> Table:
    """Returns the rows of lm_head, which are the embedding's where the two are tied; raises as `embedding_table`."""
    return _table(source, family, "embed_tokens" if read_spec(source.config, family).tied else "lm_head")


def _table(source: WeightSource, family: Family | None, key: str) -> Table:
    spec = read_spec(source.config, family)
    reader = ParameterReader(source, (family or family_of(source.config)).names)
    return Table(reader, key, (spec.vocab, spec.width))


def is_target_embedding(embed_VW: Any, target_embed_VW: Float[Array, "V W"]) -> bool:
    """Whether an embedding is the target's, up to the rounding of a stored type.

    The first 4,096 rows must agree to 2 % of their largest number.

    Args:
      embed_VW: an array of the target's shape, on the host, on a device, or mapped from a file.
    """
    ours = jnp.asarray(np.asarray(embed_VW[:4096], np.float32))
    theirs = target_embed_VW[: len(ours)].astype(jnp.float32)
    return float(jnp.abs(ours - theirs).max()) <= 0.02 * float(jnp.abs(ours).max())
