"""How each parameter of a target is sharded and stored on the mesh, and whether the devices have room for it."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jeagle.errors import UserError
from jeagle.runtime.host import free_bytes
from jeagle.runtime.mesh import logical_sharding
from jeagle.targets.model.decoder import Decoder
from jeagle.targets.model.spec import BlockSpec

Path = tuple[Any, ...]

# Types that kernels may be stored in to take half the bytes of bfloat16, by the values of --target.weights.
NARROW: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

# Logical axes of every kernel (its bias and scale have the last of them) and of every other large parameter, without
# the leading axis of a stack. Other parameters are replicated. runtime.mesh.RULES maps logical axes to the mesh's.
_NAMES_BY_AXES: dict[tuple[str | None, ...], str] = {
    ("width", "heads"): "mixer.q_proj mixer.k_proj mixer.v_proj mixer.z_proj mixer.gate_proj",
    ("heads", "width"): "mixer.o_proj",
    ("width", None): "mixer.q_a_proj mixer.kv_a_proj per_layer.proj",
    (None, "heads"): "mixer.q_b_proj mixer.k_b_proj mixer.v_b_proj",
    ("width", "mlp"): "mlp.gate_proj mlp.up_proj shared.gate_proj shared.up_proj",
    ("mlp", "width"): "mlp.down_proj shared.down_proj",
    ("vocab", "width"): "embed_tokens lm_head per_layer.embed",
    ("experts", "expert_width", "mlp"): "experts.gate_proj experts.up_proj",
    ("experts", "mlp", "expert_width"): "experts.down_proj",
    ("experts", "mlp"): "experts.gate_scale experts.up_scale experts.gate_bias experts.up_bias",
    ("experts", None): "experts.down_scale experts.down_bias",
}
AXES = {name: axes for axes, names in _NAMES_BY_AXES.items() for name in names.split()}


@functools.partial(jax.jit, static_argnames=("kind", "sharding"), donate_argnames=("kernel",))
def narrowed(kernel: jax.Array, kind: Any, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """kernel [..., I, O] -> (narrow [..., I, O], scale [..., O] float32) with kernel = narrow * scale up to rounding.

    The largest number of each output becomes the largest number that `kind` represents.
    """
    numbers = kernel.astype(jnp.float32)
    integer = jnp.issubdtype(kind, jnp.integer)
    largest = float(jnp.iinfo(kind).max if integer else jnp.finfo(kind).max)
    scale = jnp.maximum(jnp.abs(numbers).max(axis=-2), 1e-30) / largest
    scaled = numbers / scale[..., None, :]
    narrow = (jnp.round(scaled) if integer else scaled).astype(kind)
    return jax.lax.with_sharding_constraint((narrow, scale), (sharding, scale_sharding(sharding, kernel.ndim)))


def scale_sharding(sharding: NamedSharding, rank: int) -> NamedSharding:
    """The sharding of the scale [..., O] of a kernel [..., I, O] with `rank` axes."""
    axes = tuple(sharding.spec) + (None,) * (rank - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes[:-2], axes[-1]))


class ParameterLayout(NamedTuple):
    """How a parameter is read and stored.

    Attributes:
      key: its name without layer numbers.
      block: the layers' specification; None outside the layers.
      layers: the numbers of its layers, in order; (None,) outside the layers.
      stacked: whether there is a leading axis of layers.
      shape, dtype, sharding: of one layer, before it is narrowed.
      narrow: the type that it is stored in, with a scale for each output; None = `dtype`.
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
        """Bytes of one copy, before it is narrowed."""
        return len(self.layers) * math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        """Bytes on each device."""
        each = jnp.dtype(self.narrow or self.dtype).itemsize * math.prod(self.sharding.shard_shape(self.shape))
        if self.narrow is not None:
            scale = scale_sharding(self.sharding, len(self.shape))
            each += 4 * math.prod(scale.shard_shape((*self.shape[:-2], self.shape[-1])))
        return len(self.layers) * each


def layouts(model: Decoder, state: Any, mesh: Mesh, dtype: Any, stored: str) -> dict[Path, ParameterLayout]:
    """The layouts of an abstract decoder's parameters by path; the scale of a kernel has no layout of its own.

    Args:
      state: the decoder's parameters, as shapes.
      dtype: of kernels and embeddings; everything else is float32.
      stored: one of `NARROW` or "".
    """
    leaves = dict(nnx.to_flat_state(state))
    groups, scales = model.groups, {scale_path(path) for path in leaves} & set(leaves)
    by_path = {}
    for path, leaf in leaves.items():
        if path in scales:
            continue
        # ("blocks", 3, "mlp", "up_proj", "kernel") is "blocks.mlp.up_proj.kernel" of group 3.
        group = next((part for part in path if isinstance(part, int)), None)
        key = ".".join(str(part) for part in path if not isinstance(part, int))
        block, layers = (None, (None,)) if group is None else groups[group]
        stacked = model.stacked and group is not None
        shape = leaf.get_value().shape[1:] if stacked else leaf.get_value().shape
        wide = len(shape) > 1 and not key.endswith((".conv", "_bias"))
        narrow = NARROW[stored] if scale_path(path) in scales else None
        parts = key.split(".")
        linear = parts[-1] in ("kernel", "bias", "scale")
        axes = AXES.get(".".join(parts[-3:-1] if linear else parts[-2:]), ())
        axes = axes[-1:] if linear and parts[-1] != "kernel" else axes
        sharding = NamedSharding(mesh, logical_sharding((None,) * (len(shape) - len(axes)) + axes, shape, mesh))
        kind = jnp.dtype(dtype if wide else jnp.float32)
        by_path[path] = ParameterLayout(key, block, layers, stacked, shape, kind, sharding, narrow)
    return by_path


def check_room(parameters: Iterable[ParameterLayout], mesh: Mesh) -> None:
    """Raises UserError where a device has less free memory than its part of the weights takes."""
    parameters = list(parameters)
    needed, free = sum(layout.bytes_per_device for layout in parameters), free_bytes(mesh)
    if free is None or needed <= free:
        return
    total, each, room = (f"{n / 2**30:.3g} GiB" for n in (sum(layout.size for layout in parameters), needed, free))
    raise UserError(
        f"The target's weights, {total} in all, take {each} on each of {mesh.size} {mesh.devices.flat[0].platform} "
        f"device{'s' * (mesh.size > 1)}, and only {room} are free there: use more devices "
        "(--mesh.fsdp splits the weights over them), keep the weights in half the bytes (--target.weights int8), or "
        "take a smaller model."
    )


def scale_path(path: Path) -> Path | None:
    """The path of a kernel's scale; None for a parameter that is not a kernel."""
    last = str(path[-1])
    if last == "kernel":
        return (*path[:-1], "scale")
    return (*path[:-1], last.replace("_proj", "_scale")) if last.endswith("_proj") else None
