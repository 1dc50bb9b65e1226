"""`python -m jeagle.store info|verify|sample|prune STORE`: what a store of hidden states holds, and if it is whole."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from jeagle import align, data, features
from jeagle.config import RunConfig, TargetConfig
from jeagle.errors import UserError
from jeagle.extraction.agreement import check_agreement, compare, fresh_capture
from jeagle.run import assemble
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import fingerprint
from jeagle.runtime.progress import bytes_progress

_SHOWN = 400  # characters of a sampled row


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tells what a store holds (info), reads every byte of it (verify), shows some rows (sample), or removes what no
    reader needs (prune)."""

    action: Annotated[Literal["info", "verify", "sample", "prune"], tyro.conf.Positional]
    """What to do."""
    store: Annotated[str, tyro.conf.Positional]
    """A local folder, gs://BUCKET/PATH or s3://BUCKET/PATH."""
    target: str = ""
    """verify: recompute some rows with this target; sample: its name is not needed."""
    rows: int = 4
    """Rows that are sampled, or recomputed."""
    split: Literal["train", "held_out"] = "train"
    """Of which side."""
    damaged: bool = False
    """prune: also remove segments whose bytes are not those written, so that extract makes them again."""


def main(arguments: list[str]) -> int:
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.store", description=__doc__)
    if args.action == "prune":
        return _prune(args)
    store = features.Store(args.store)
    return {"info": _info, "verify": _verify, "sample": _sample}[args.action](args, store)


def _info(args: Arguments, store: features.Store) -> int:
    for name, value in facts(store):
        print(f"{name:<22}{value}")
    return 0


def facts(store: features.Store) -> list[tuple[str, str]]:
    """What a store holds, by name."""
    about, made = store.about, store.about["made_from"]
    size = sum(segment.bytes for segment in store.segments if segment.split)
    tables = sum(segment.bytes for segment in store.segments if not segment.split)
    there = sum(sum(segment.lengths) for segment in store.segments)
    kept = sum(sum(segment.kept) for segment in store.segments)
    seen = sum(sum(segment.aux) for segment in store.segments)
    missing = store.missing()

    def share(count: int) -> str:
        return f"{count / max(there, 1):.1%} of positions"

    rows = ", ".join(f"{split} {counts['rows']:,}" for split, counts in about["splits"].items())
    return [
        ("target", f"{made['target']['reference']} ({made['target']['fingerprint']}), {made['target']['dtype']}"),
        ("taps", f"after {', '.join(map(str, made['taps']))} layers, kept as {store.form.aux} at {share(seen)}"),
        ("teacher", f"{_teacher(store.form)} at {share(kept)}"),
        ("rows", f"{rows}; {missing:,} missing" if missing else f"{rows}; all there"),
        ("tokens", f"{there:,} of {about['tokens']:,}"),
        (
            "bytes",
            f"{size:,} in {len(store.segments)} segments, {size / max(there, 1):,.0f} a token; tables {tables:,}",
        ),
        ("data", f"source {made['data']['source']}, template {made['data']['template']}, rows of {store.row_length}"),
        ("versions", " ".join(f"{name} {number}" for name, number in about["versions"].items())),
        ("made", f"{about['created']} by {about['command']}"),
        ("fingerprint", fingerprint(made)),
    ]


def _teacher(form: features.Form) -> str:
    return f"the {form.top_k} likeliest tokens" if form.top_k else f"last, kept as {form.last}"


def _verify(args: Arguments, store: features.Store) -> int:
    total = sum(segment.bytes for segment in store.segments)
    with bytes_progress("verify") as progress:
        found = list(features.verify(store, lambda done: progress(done, total)))
    for damage in found:
        print(f"{damage.segment}: {damage.reason}")
    if found:
        raise UserError(
            f"{len(found)} of {len(store.segments)} segments of {store} are damaged. python -m jeagle.store prune "
            f"{store} --damaged removes them, and the extract command makes them again."
        )
    store.check_complete()
    print(f"{store}: {len(store.segments)} segments, {total:,} bytes, every checksum right, every row there once")
    if args.target:
        _against_target(args, store)
    return 0


def _against_target(args: Arguments, store: features.Store) -> None:
    prepare_host()
    made = store.about["made_from"]
    settings = {name: made["target"][name] for name in ("dtype", "weights", "family")}
    config = RunConfig(name="verify", target=TargetConfig(ref=args.target, aux_layers=tuple(made["taps"]), **settings))
    mesh = assemble.mesh_of(config)
    loaded = assemble.load_target(config, mesh)
    wanted = {"target": {"fingerprint": loaded.files.fingerprint}}
    features.check_fit(store.place, wanted, made, "Give the target that the store was made with.")
    rows = _spread(store, args.split, args.rows)
    found = compare(store, args.split, rows, fresh_capture(store, loaded.target, mesh))
    check_agreement(store, found)
    print(
        f"against {args.target}: argmax alike at {found.argmax:.2%} of {found.positions} positions, taps {_off(found)}"
    )


def _off(found: Any) -> str:
    moved = f", {found.moved:.2%} of the likeliest tokens' mass elsewhere" if found.moved else ""
    return f"off by {found.aux_error:.2%} in the median{moved}"


def _spread(store: features.Store, split: str, count: int) -> list[int]:
    """Row numbers spread evenly, as many as devices share evenly."""
    total = store.rows(split)
    if total == 0:
        raise UserError(f"The store {store} has no {split} rows.")
    count = -(-count // jax.device_count()) * jax.device_count()
    return [int(x) for x in np.linspace(0, total - 1, count)]


def _sample(args: Arguments, store: features.Store) -> int:
    total = store.rows(args.split)
    if total == 0:
        raise UserError(f"The store {store} has no {args.split} rows.")
    decode = _texts(store)
    for row in sorted({int(x) for x in np.linspace(0, total - 1, args.rows)}):
        if not store.has(args.split, row):
            print(f"{args.split} row {row}: missing")
            continue
        batch = store.batch(args.split, [row])
        kept = jax.jit(features.decode)(store.stored(args.split, [row], batch))
        near_BT, real, seen = align.near_supervised(batch, xp=np), batch.segments_BT[0] > 0, store.places(batch).seen_BT
        follows_BT = near_BT & align.same_document(batch.segments_BT, 1, xp=np)
        says_next = np.asarray(kept.greedy_BT) == align.shift_left(batch.tokens_BT, 1, xp=np)
        aux_norms = np.linalg.norm(np.asarray(kept.aux_BTAH)[seen], axis=-1)
        head = f"{args.split} row {row}: {int(real.sum())} tokens in {batch.segments_BT.max()} documents"
        says = f"the target's greedy choice is the next token at {says_next[follows_BT].mean():.1%} of these"
        norms = " ".join(f"{x:.3g}" for x in np.median(aux_norms, axis=0))
        print(f"{head}, {int(near_BT.sum())} with a teacher; {says}; |taps| {norms}")
        print("   ", decode(batch.tokens_BT[0][real])[:_SHOWN].replace("\n", "\\n"))
    return 0


def _texts(store: features.Store) -> Any:
    """A function from token ids to their text; to the ids themselves where the store has no tokenizer."""
    content = store.data_file("tokenizer.json")
    if content is None:
        return lambda ids: " ".join(map(str, ids))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(content)
        texts = data.token_texts(path)
    return lambda ids: "".join(text for text, _ in texts(ids))


def _prune(args: Arguments) -> int:
    place = features.Place(args.store)
    if features.read_store(place) is None:
        raise UserError(f"There is no store at {place}.")
    gone = features.prune(place, [])  # damaged manifests first: they cannot be opened
    if args.damaged:
        damaged = [damage.segment for damage in features.verify(features.Store(args.store))]
        gone += features.prune(place, damaged)
    print(f"{place}: removed {len(gone)} leftovers and damaged segments" if gone else f"{place}: nothing to remove")
    for key in gone:
        print("   ", key)
    return 0


if __name__ == "__main__":
    run(main)
