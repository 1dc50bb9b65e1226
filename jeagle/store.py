"""`python -m jeagle.store info|verify|sample|prune STORE`: describes, checks, shows or cleans a store of features."""

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
from jeagle.extraction.agreement import compare_with_target, evenly_spaced
from jeagle.places import Place
from jeagle.run import assemble
from jeagle.runtime.cli import parse, run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.manifest import fingerprint
from jeagle.runtime.progress import bytes_progress

_SHOWN = 400  # characters of a sampled row


@dataclasses.dataclass(frozen=True)
class StoreArguments:
    """Describes a store (info), reads every byte of it (verify), shows some of its rows (sample), or removes what no
    reader needs (prune)."""

    action: Annotated[Literal["info", "verify", "sample", "prune"], tyro.conf.Positional]
    """What to do."""
    store: Annotated[Place, tyro.conf.Positional]
    """A local folder, gs://BUCKET/PATH or s3://BUCKET/PATH."""
    target: Place = ""
    """verify: a target with which some rows are computed again and compared."""
    rows: int = 4
    """The number of rows that are shown, or compared with the target."""
    split: Literal["train", "held_out"] = "train"
    """The split from which these rows are taken."""
    damaged: bool = False
    """prune: also remove segments whose bytes are not those that were written, so that extract makes them again."""


def main(arguments: list[str]) -> int:
    args = parse(StoreArguments, arguments, program="python -m jeagle.store", description=__doc__)
    {"info": _info, "verify": _verify, "sample": _sample, "prune": _prune}[args.action](args)
    return 0


def _info(args: StoreArguments) -> None:
    store = features.Store(args.store)
    about, made, form = store.about, store.about["made_from"], store.format
    size = sum(segment.bytes for segment in store.segments if segment.split)
    tables = sum(segment.bytes for segment in store.segments if not segment.split)
    tokens = sum(sum(segment.lengths) for segment in store.segments)
    teachers = sum(sum(segment.kept) for segment in store.segments)
    missing = store.missing()
    rows = ", ".join(f"{split} {counts['rows']:,}" for split, counts in about["splits"].items())
    teacher = f"the {form.top_k} likeliest tokens" if form.top_k else f"last hidden states, stored as {form.last}"
    facts = {
        "target": f"{made['target']['reference']} ({made['target']['fingerprint']}), {made['target']['dtype']}",
        "aux hidden states": f"after {', '.join(map(str, made['taps']))} layers, stored as {form.aux}",
        "teacher": f"{teacher}, at {teachers / max(tokens, 1):.1%} of positions",
        "rows": f"{rows}; {f'{missing:,}' if missing else 'none'} missing",
        "tokens": f"{tokens:,} of {about['tokens']:,}",
        "bytes": f"{size:,} in {len(store.segments)} segments, {size / max(tokens, 1):,.0f} a token; tables {tables:,}",
        "data": f"source {made['data']['source']}, template {made['data']['template']}, rows of {store.row_length}",
        "versions": " ".join(f"{name} {number}" for name, number in about["versions"].items()),
        "made": f"{about['created']} by {about['command']}",
        "fingerprint": fingerprint(made),
    }
    for name, value in facts.items():
        print(f"{name:<22}{value}")


def _verify(args: StoreArguments) -> None:
    store = features.Store(args.store)
    total = sum(segment.bytes for segment in store.segments)
    with bytes_progress("verify") as progress:
        damaged = list(features.verify_store(store, lambda done: progress(done, total)))
    for segment, reason in damaged:
        print(f"{segment}: {reason}")
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(store.segments)} segments of {store} are damaged. "
            f"{store.storage.prune_command} removes them, and the extract command makes them again."
        )
    store.check_complete()
    print(f"{store}: {len(store.segments)} segments, {total:,} bytes: every checksum is right and no row is missing")
    if not args.target:
        return
    prepare_host()
    made = store.about["made_from"]
    settings = {name: made["target"][name] for name in ("dtype", "weights", "family")}
    config = RunConfig(name="verify", target=TargetConfig(ref=args.target, aux_layers=tuple(made["taps"]), **settings))
    mesh = assemble.mesh_of(config)
    loaded = assemble.load_target(config, mesh)
    wanted = {"target": {"fingerprint": loaded.files.fingerprint}}
    features.check_fit(store.storage, wanted, made, "Give the target that the store was made with.")
    agreement = compare_with_target(store, args.split, args.rows, loaded.target, mesh)
    moved = f", and {agreement.moved:.2%} of the likeliest tokens' mass lies elsewhere" if agreement.moved else ""
    print(
        f"against {args.target}: the argmax agrees at {agreement.argmax:.2%} of {agreement.positions} positions, aux "
        f"hidden states are off by {agreement.aux_error:.2%} in the median{moved}"
    )


def _sample(args: StoreArguments) -> None:
    prepare_host()
    store = features.Store(args.store)
    if not (total := store.rows(args.split)):
        raise UserError(f"The store {store} has no {args.split} rows.")
    decode, present = _decoder(store), set(store.present(args.split))
    for row in sorted({*evenly_spaced(list(range(total)), args.rows)}):
        if row not in present:
            print(f"{args.split} row {row}: missing")
            continue
        batch = store.batch(args.split, [row])
        stored = jax.jit(features.decode_features)(store.stored(args.split, [row], batch))
        near_BT, real_T = align.near_supervised(batch, xp=np), batch.segments_BT[0] > 0
        next_BT = near_BT & align.same_document(batch.segments_BT, 1, xp=np)
        greedy_is_next = np.asarray(stored.greedy_BT) == align.shift_left(batch.tokens_BT, 1, xp=np)
        norms_A = np.median(np.linalg.norm(np.asarray(stored.aux_BTAH)[0, real_T], axis=-1), axis=0)
        print(
            f"{args.split} row {row}: {int(real_T.sum())} tokens in {batch.segments_BT.max()} documents, "
            f"{int(near_BT.sum())} with a teacher; the target's greedy choice is the next token at "
            f"{greedy_is_next[next_BT].mean():.1%} of these; norms of the aux hidden states "
            f"{' '.join(f'{x:.3g}' for x in norms_A)}"
        )
        print("   ", decode(batch.tokens_BT[0][real_T])[:_SHOWN].replace("\n", "\\n"))


def _decoder(store: features.Store) -> Any:
    """A function from token ids to text; to the ids themselves where the store has no tokenizer."""
    content = store.data_file("tokenizer.json")
    if content is None:
        return lambda ids: " ".join(map(str, ids))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(content)
        texts = data.token_texts(path)
    return lambda ids: "".join(text for text, _ in texts(ids))


def _prune(args: StoreArguments) -> None:
    storage = features.Storage(args.store)
    if features.read_store(storage) is None:
        raise UserError(f"There is no store at {storage}.")
    removed = features.prune_store(storage, [])  # damaged manifests first: they cannot be opened
    if args.damaged:
        damaged = [segment for segment, _ in features.verify_store(features.Store(args.store))]
        removed += features.prune_store(storage, damaged)
    print(f"{storage}: {f'removed {len(removed)} keys and folders' if removed else 'there is nothing to remove'}")
    for key in removed:
        print("   ", key)


if __name__ == "__main__":
    run(main)
