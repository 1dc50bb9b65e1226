"""`python -m benchmarks.beside --work W1 --specforge PYTHON`: a draft's step of jeagle beside one of SpecForge.

PYTHON is that of an environment with torch and SpecForge (`pip install torch; pip install --no-deps specforge==0.2.0`).
Both start from the same arrays and take steps in turn in processes of their own, so that a machine that does other work
too favours neither. Prints JSON: each one's least CPU- and wall-seconds, first loss and gradient norm, and the median
of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.step import bench_of, start
from benchmarks.timing import cpu_s
from benchmarks.works import WORKS, Arrays, Work, make
from jeagle.runtime.host import prepare_host

Round = dict[str, float]


def ours(work: Work, arrays: Arrays, dtype: str) -> Callable[[], Round]:
    bench = bench_of(work, arrays.batch, dtype, remat=False)
    state, given = start(arrays, bench.abstract, dtype)
    program = bench.lower(state, given).compile()

    def step() -> Round:
        nonlocal state
        cpu, begun = cpu_s(), time.perf_counter()
        state, report = program(state, given)
        jax.block_until_ready(state)
        told = jax.device_get(report)
        spent = {"wall_s": time.perf_counter() - begun, "cpu_s": cpu_s() - cpu}
        return {"loss": float(told.loss), "gradient_norm": float(told.gradient_norm)} | spent

    return step


def specforge(python: str, work: Work, arrays: Arrays, folder: Path) -> Callable[[], Round]:
    """A step in a process of its own."""
    path = folder / "arrays.npz"
    np.savez(path, **for_specforge(work, arrays))
    script = Path(__file__).with_name("specforge_step.py")
    command = [python, "-P", script, path]  # -P: modules beside the script are jeagle's
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step() -> Round:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            sys.exit(f"{python} {script.name} ended with status {child.wait()}.")
        return json.loads(line)

    return step


def for_specforge(work: Work, arrays: Arrays) -> dict[str, np.ndarray]:
    """The same arrays by the names that specforge_step.py reads; masks as numbers."""
    spec = work.spec()
    config = {
        "vocab_size": spec.target_vocab,
        "draft_vocab_size": spec.draft_vocab,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "num_hidden_layers": 1,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": work.length + work.steps,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "steps": work.steps,
    }
    known = np.zeros(spec.target_vocab, bool)
    known[arrays.draft_to_target_D] = True
    offsets = arrays.draft_to_target_D.astype(np.int64) - np.arange(spec.draft_vocab)
    draft = arrays.params | {"embed_tokens.weight": arrays.embed_VW, "t2d": known, "d2t": offsets}
    return {f"draft/{name}": array for name, array in draft.items()} | {
        "tokens": arrays.batch.tokens_BT,
        "mask": arrays.batch.supervised_BT.astype(np.int64),
        "taps": arrays.aux_BTAH.reshape(*arrays.aux_BTAH.shape[:2], -1),
        "last": arrays.last_BTH,
        "head": arrays.head_VH,
        "config": np.array(json.dumps(config)),
    }


def summary(first: Round, rounds: list[Round]) -> dict[str, float]:
    least = {f"{kind}_per_step": min(one[kind] for one in rounds) for kind in ("cpu_s", "wall_s")}
    return {"first_loss": first["loss"], "first_gradient_norm": first["gradient_norm"]} | least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=[name for name in WORKS if WORKS[name].objective == "peers"], default="W1")
    parser.add_argument("--specforge", metavar="PYTHON", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of jeagle's products")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    prepare_host()
    work = WORKS[args.work]
    arrays = make(work)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "jeagle": ours(work, arrays, args.dtype),
            "specforge": specforge(args.specforge, work, arrays, Path(folder)),
        }
        first = {name: step() for name, step in ways.items()}
        rounds = [{name: step() for name, step in ways.items()} for _ in range(args.rounds)]
    report: dict[str, Any] = {
        "work": args.work,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "checksum": arrays.checksum,
    }
    report |= {name: summary(first[name], [one[name] for one in rounds]) for name in ways}
    for kind in ("cpu_s", "wall_s"):
        ratios = [one["jeagle"][kind] / one["specforge"][kind] for one in rounds]
        report[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
