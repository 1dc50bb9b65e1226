"""The device mesh and the rules that lay logical axes on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jeagle.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axis. Rows of a batch lie over every axis that holds copies of the computation.
RULES: dict[str, str | tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "width": ("fsdp", "expert"),
    "experts": "expert",
    "expert_width": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, *, expert: int = 1
) -> Mesh:
    """A mesh of all devices, axes data x fsdp x expert x tensor; one axis may be -1 and takes what is left.

    Raises:
      UserError: when the axes do not multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"--mesh {sizes}: each axis is a positive number, and at most one is -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"The mesh data={data} fsdp={fsdp} expert={expert} tensor={tensor} does not fit {len(devices)} devices: "
            "set --mesh.data, --mesh.fsdp, --mesh.expert and --mesh.tensor so that their product is that number."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def logical_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; an axis that does not divide evenly stays whole."""
    spec = []
    for axis, size in zip(axes, shape, strict=False):
        mesh_axes = RULES[axis] if axis else ()
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        spec.append(None if parts == 1 or size % parts else mesh_axes if len(mesh_axes) > 1 else mesh_axes[0])
    return PartitionSpec(*spec)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's [B, ...] arrays."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))


def platform(mesh: Mesh | None) -> str:
    """What the mesh's devices are, "cpu", "gpu" or "tpu"; without a mesh, what arrays lie on by default."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """The axes over which a frozen model's activations of so many rows are split.

    Those of the batch, and the experts' axis too: tokens meet the experts of other devices only within the mixtures.
    Without it, where rows do not divide evenly; none, where they do not even then.
    """
    own = tuple(RULES["rows"])
    options: tuple[tuple[str, ...], ...] = ((*own, "expert"), own, ())
    return next(axes for axes in options if rows % math.prod(mesh.shape[axis] for axis in axes) == 0)


def by_rows(array_BX: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The array, told to the compiler to be split by `row_axes` and by nothing else."""
    if mesh is None or mesh.size == 1:
        return array_BX
    axes = row_axes(mesh, array_BX.shape[0])
    return jax.lax.with_sharding_constraint(array_BX, NamedSharding(mesh, PartitionSpec(axes or None)))


def summed_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """Sums over the devices along these axes, inside a `shard_map`; without axes, what is given."""
    return jax.lax.psum(tree, axes) if axes else tree


def row_parts(mesh: Mesh) -> int:
    """How many parts a batch's rows are split into."""
    return math.prod(mesh.shape[a] for a in RULES["rows"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
