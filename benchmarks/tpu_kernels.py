"""`python -m benchmarks.tpu_kernels`: the TTT attention's TPU kernels through the real TPU compiler, for every chip.

As `benchmarks.kernels` says; needs jax[tpu] and no TPU. Exit status 1 if any does not compile.
"""

from __future__ import annotations

import sys

from benchmarks.tpu_targets import slice_mesh  # first: it sets up the compiler

# isort: split
from benchmarks.kernels import compile_all

TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1")


def main() -> int:
    devices = {topology: slice_mesh(topology, "fsdp=-1").devices.flat[0] for topology in TOPOLOGIES}
    fine = [compile_all(device, name.split(":")[0], "tpu") for name, device in devices.items()]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
