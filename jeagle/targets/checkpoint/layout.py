"""How each parameter of a target lies on the mesh, and whether there is room for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jeagle.errors import UserError
from jeagle.runtime.memory import free_bytes
from jeagle.runtime.mesh import logical_sharding
from jeagle.targets.checkpoint.narrow import NARROW, scale_sharding
from jeagle.targets.model.decoder import Decoder
from jeagle.targets.model.spec import BlockSpec

Path = tuple[Any, ...]

# Logical axes of every kernel (of its bias and scale: the last of them) and of every other large parameter, layers'
# leading stack axis left out. What is not here is whole on every device. The mesh axes behind them: runtime.mesh.RULES.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocab", "width"),
    "lm_head": ("vocab", "width"),
    "mixer.q_proj": ("width", "heads"),
    "mixer.k_proj": ("width", "heads"),
    "mixer.v_proj": ("width", "heads"),
    "mixer.z_proj": ("width", "heads"),
    "mixer.gate_proj": ("width", "heads"),
    "mixer.o_proj": ("heads", "width"),
    "mixer.q_a_proj": ("width", None),
    "mixer.q_b_proj": (None, "heads"),
    "mixer.kv_a_proj": ("width", None),
    "mixer.k_b_proj": (None, "heads"),
    "mixer.v_b_proj": (None, "heads"),
    "mlp.gate_proj": ("width", "mlp"),
    "mlp.up_proj": ("width", "mlp"),
    "mlp.down_proj": ("mlp", "width"),
    "shared.gate_proj": ("width", "mlp"),
    "shared.up_proj": ("width", "mlp"),
    "shared.down_proj": ("mlp", "width"),
    "experts.gate_proj": ("experts", "expert_width", "mlp"),
    "experts.up_proj": ("experts", "expert_width", "mlp"),
    "experts.down_proj": ("experts", "mlp", "expert_width"),
    "experts.gate_scale": ("experts", "mlp"),
    "experts.up_scale": ("experts", "mlp"),
    "experts.down_scale": ("experts", None),
    "experts.gate_bias": ("experts", "mlp"),
    "experts.up_bias": ("experts", "mlp"),
    "experts.down_bias": ("experts", None),
    "per_layer.embed": ("vocab", "width"),
    "per_layer.proj": ("width", None),
}


def sharding_of(key: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How the parameter `key` of this shape lies on the mesh."""
    parts = key.split(".")
    linear = parts[-1] in ("kernel", "bias", "scale")
    axes = AXES.get(".".join(parts[-3:-1] if linear else parts[-2:]))
    if linear and axes is not None and parts[-1] != "kernel":
        axes = axes[-1:]
    axes = (None,) * len(shape) if axes is None else (None,) * (len(shape) - len(axes)) + axes
    return NamedSharding(mesh, logical_sharding(axes, shape, mesh))


class Layout(NamedTuple):
    """A parameter as it is read and kept.

    Attributes:
      key: its name without layer numbers. layers: the numbers of the layers that it holds, one after the other; (None,)
        outside the layers.
      shape, dtype, sharding: of one layer, before it is narrowed. stacked: whether layers lie along a leading axis.
      narrow: the type that it is kept in, beside a scale for each output; None = dtype.
    """

    key: str
    block: BlockSpec | None
    layers: tuple[int | None, ...]
    stacked: bool
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding
    narrow: Any

    @property
    def size(self) -> int:
        """Bytes over all devices, before it is narrowed."""
        return len(self.layers) * math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        kept = jnp.dtype(self.narrow or self.dtype).itemsize * math.prod(self.sharding.shard_shape(self.shape))
        if self.narrow is not None:
            scale = scale_sharding(self.sharding, len(self.shape))
            kept += 4 * math.prod(scale.shard_shape((*self.shape[:-2], self.shape[-1])))
        return len(self.layers) * kept


def layouts(model: Decoder, state: Any, mesh: Mesh, dtype: Any, stored: str) -> dict[Path, Layout]:
    """The parameters of an abstract decoder by path; scales belong to their kernels."""
    leaves = dict(nnx.to_flat_state(state))
    groups, scales = model.groups, {scale_path(path) for path in leaves} & set(leaves)
    found = {}
    for path, leaf in leaves.items():
        if path in scales:
            continue
        key, group = parameter_key(path)
        block, layers = (None, (None,)) if group is None else groups[group]
        stacked = model.stacked and group is not None
        shape = leaf.get_value().shape[1:] if stacked else leaf.get_value().shape
        wide = len(shape) > 1 and not key.endswith((".conv", "_bias"))
        narrow = NARROW[stored] if scale_path(path) in scales else None
        sharding = sharding_of(key, shape, mesh)
        kind = jnp.dtype(dtype if wide else jnp.float32)
        found[path] = Layout(key, block, layers, stacked, shape, kind, sharding, narrow)
    return found


def check_room(found: Iterable[Layout], mesh: Mesh) -> None:
    """UserError where a device has less memory free than its part of the weights takes."""
    found = list(found)
    needed, free = sum(layout.bytes_per_device for layout in found), free_bytes(mesh)
    if free is None or needed <= free:
        return
    whole = sum(layout.size for layout in found)
    device = mesh.devices.flat[0]
    raise UserError(
        f"The target's weights, {_gib(whole)} in all, take {_gib(needed)} on each of {mesh.size} {device.platform} "
        f"device{'s' * (mesh.size > 1)}, and only {_gib(free)} are free there: use more devices "
        "(--mesh.fsdp splits the weights over them), keep the weights in half the bytes (--target.weights int8), or "
        "take a smaller model."
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def parameter_key(path: Path) -> tuple[str, int | None]:
    """("blocks", 3, "mlp", "up_proj", "kernel") -> ("blocks.mlp.up_proj.kernel", 3); no number outside the layers."""
    group = next((part for part in path if isinstance(part, int)), None)
    return ".".join(str(part) for part in path if not isinstance(part, int)), group


def scale_path(path: Path) -> Path | None:
    """Where the scale of a kernel would lie; None for what is no kernel."""
    last = str(path[-1])
    if last == "kernel":
        return (*path[:-1], "scale")
    return (*path[:-1], last.replace("_proj", "_scale")) if last.endswith("_proj") else None
