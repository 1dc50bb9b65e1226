"""How fast chips are, so that a step's FLOPs can be given as a share of what its devices could do."""

from __future__ import annotations

import jax

# Dense bfloat16 products, TFLOP/s a device, by how JAX names the device; the first name that is part of it counts.
# Source: the makers' data sheets; without sparsity.
PEAKS: dict[str, float] = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "TPU7x": 2307.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device of this kind in bfloat16; None where it is not known, as for a CPU."""
    return next((1e12 * peak for name, peak in PEAKS.items() if name.lower() in device_kind.lower()), None)


def all_devices_flops() -> float | None:
    """FLOP/s of all devices of the run together; None where theirs is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
