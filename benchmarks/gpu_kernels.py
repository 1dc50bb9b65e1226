"""`python -m benchmarks.gpu_kernels`: the TTT attention's GPU kernels through the GPU compiler (Triton, XLA, ptxas).

As `benchmarks.kernels` says; needs jax[cuda12] and neither GPU nor driver. Speed takes a GPU: `python -m benchmarks.ops
--work W3` for the kernels beside plain XLA, `python -m benchmarks.step --work W3` for a whole step. Exit status 1 if
any does not compile.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies

from benchmarks.kernels import compile_all

# Of each chip: compute capability, multiprocessors, shared memory of one and of one block, L2, HBM, bytes/s, GHz.
# Source: NVIDIA's CUDA programming guide (compute capabilities) and data sheets.
CHIPS: dict[str, tuple[int, int, int, int, int, int, int, float]] = {
    "A100": (8, 108, 167936, 166912, 40 << 20, 80 << 30, 2_039_000_000_000, 1.41),
    "H100": (9, 132, 233472, 232448, 50 << 20, 80 << 30, 3_352_000_000_000, 1.98),
}


def device_of(chip: str) -> Any:
    """A device to compile for, in place of one that is there."""
    major, cores, core_memory, block_memory, cache, memory, bandwidth, clock = CHIPS[chip]
    description = f"""
        platform_name: "CUDA" device_description_str: "{chip}"
        runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 minor: 7 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} }} core_count: {cores} clock_rate_ghz: {clock}
          shared_memory_per_core: {core_memory} shared_memory_per_block_optin: {block_memory}
          shared_memory_per_block: 49152 l2_cache_size: {cache}
          device_memory_size: {memory} memory_bandwidth: {bandwidth}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 fpus_per_core: 128
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
    return topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1").devices[0]


def main() -> int:
    try:
        devices = {chip: device_of(chip) for chip in CHIPS}
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        sys.exit(f"error: jax has no GPU compiler here (pip install 'jax[cuda12]'): {error}")
    fine = [compile_all(device, chip, "gpu") for chip, device in devices.items()]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
