"""Host memory of loading: a random Llama of 2 GB in safetensors onto 8 host devices, each case in a fresh process.

    python benchmarks/loading.py [--gigabytes 2] [--devices 8] [--mesh fsdp=8] [--weights dtype|int8|fp8]

Prints JSON: for stacked layers (as accelerators have them) and separate ones the seconds, the bytes of the shards, and
how much the process's memory rose beyond them at its peak while loading. "anonymous" is RssAnon: what the process
itself allocated; "resident" is VmRSS, which also counts mapped files. On host devices the shards lie in the same
process. Compares with nothing: the law is that `beyond_shards` stays under 0.5 GB, and that the sums of the parameters
are those of one device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, HEADS, KV_HEADS, VOCAB = 2048, 8192, 32, 8, 32000
GB = 10**9


def main() -> None:
    options = _options()
    if options.folder:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_llama(Path(folder), options.gigabytes * GB)
        found = {
            "file_bytes": size,
            "devices": options.devices,
            "mesh": options.mesh,
            "weights": options.weights,
            "stacked": _in_process(folder, options, "--stacked"),
            "separate": _in_process(folder, options),
            "one_device": _in_process(folder, options, "--devices", "1", "--mesh", "fsdp=1"),
        }
    sums = [found[name].pop("sums") for name in ("stacked", "separate", "one_device")]
    found["same_numbers_as_one_device"] = sums[0] == sums[1] == sums[2]
    print(json.dumps(found, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--mesh", default="fsdp=8", help="axes as fsdp=4,tensor=2")
    parser.add_argument("--weights", default="dtype", choices=["dtype", "int8", "fp8"])
    parser.add_argument("--stacked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(folder: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    own = [f"--devices={options.devices}", f"--mesh={options.mesh}", f"--weights={options.weights}"]
    command = [sys.executable, __file__, f"--folder={folder}", *own, *more]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def write_llama(folder: Path, size: float) -> int:
    """config.json and model.safetensors of about `size` bytes in bfloat16 -> its bytes."""
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "self_attn.v_proj": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    layer = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    layers = max(1, round((size - 4 * VOCAB * WIDTH) / layer))
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH)}
    tensors |= {"model.norm.weight": (WIDTH,)}
    tensors |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    filled = {name: _random(rng, shape) for name, shape in tensors.items()}
    save_file(filled, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bits of numbers in (-2, -1] and [1, 2): random enough, and quickly made."""
    bits = rng.integers(0, 2**16, shape, np.uint16, endpoint=False)
    return ((bits & 0x807F) | 0x3F80).view(ml_dtypes.bfloat16)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the folder and reports; the process is fresh."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from jeagle import targets
    from jeagle.runtime.host import prepare_host
    from jeagle.runtime.mesh import make_mesh

    prepare_host()
    mesh = make_mesh(**{name: int(size) for name, size in (part.split("=") for part in options.mesh.split(","))})
    source = targets.open_weights(targets.resolve(options.folder))
    targets.read_spec(source.config)  # imports transformers, which is no part of what is measured
    jax.block_until_ready(jax.device_put(jnp.zeros(8)))
    stored = "" if options.weights == "dtype" else options.weights
    with Watch() as watch:
        started = time.monotonic()
        target = targets.load_target(source, mesh, "bfloat16", stacked=options.stacked, stored=stored)
        arrays = jax.block_until_ready(jax.tree.leaves(target.state))
        seconds = time.monotonic() - started
    shards = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    # Sums of bits, which no order of summation rounds; of all layers together, however they are arranged.
    sums = sum(int(np.asarray(array).view(np.uint8).astype(np.uint64).sum()) for array in arrays)
    return {
        "seconds": round(seconds, 1),
        "shard_bytes": shards,
        "beyond_shards": {kind: watch.peak[kind] - watch.before[kind] - shards for kind in watch.peak},
        "sums": sums,
    }


class Watch:
    """The process's memory before and at its peak, looked at every few milliseconds."""

    def __enter__(self) -> Watch:
        self.before = self.peak = _memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            now = _memory()
            self.peak = {kind: max(now[kind], self.peak[kind]) for kind in now}


def _memory() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("anonymous", "RssAnon"), ("resident", "VmRSS"))}


if __name__ == "__main__":
    main()
