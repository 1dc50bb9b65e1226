"""The prepare stage: conversations -> packed rows and a draft vocabulary, found again where nothing has changed."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import jeagle
from jeagle import data as room
from jeagle import targets
from jeagle.config import RunConfig
from jeagle.errors import UserError
from jeagle.interfaces import Batch
from jeagle.run.claim import check_folder, claimed, new_rows
from jeagle.runtime.manifest import differences, fingerprint, finished_manifest, read_manifest, write_manifest
from jeagle.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where a run's data lies, and what is known of it.

    Attributes:
      data, tables: folders. statistics: counts, as the manifest holds them.
      reused: the rows were there already, made from the same inputs.
    """

    data: Path
    tables: Path
    statistics: dict[str, Any]
    reused: bool = False


def load_tokenizer(config: RunConfig, files: targets.TargetFiles) -> Any:
    """The target's tokenizer, with the chat template that the run's data is rendered by."""
    return room.use_template(
        targets.load_tokenizer(files),
        config.data.template,
        user_header=config.data.user_header,
        assistant_header=config.data.assistant_header,
        end_of_turn=config.data.end_of_turn,
    )


def prepare(config: RunConfig) -> Prepared:
    """Makes the run's data and tables, or finds them made from the same inputs."""
    check_folder(config)
    files = targets.resolve(config.target.ref)
    tokenizer, parts = load_tokenizer(config, files), room.parse_source(config.data.source, config.data.columns)
    made = made_from(config, tokenizer, targets.open_weights(files).config, parts)
    data = config.folder / "data"
    _given_vocabulary(config, made)  # refused before the rows are made, where it does not fit
    reused = found(data, made)
    if not reused:
        for part in parts:
            print(f"prepare: reading {part}", flush=True)
        total = config.data.max_conversations
        with Progress(total, "conversations", "prepare") as progress, new_rows(config) as aside:
            statistics = room.prepare_rows(
                parts,
                tokenizer,
                config.data,
                aside,
                end_token_ids=made["end_token_ids"],
                vocab=made["target_vocab"],
                target=config.target.ref,
                on_done=progress.update,
            )
            tokenizer.backend_tokenizer.save(str(aside / "tokenizer.json"))  # so that the rows can be read alone
            statistics["template_reads_date"] = room.reads_date(tokenizer.chat_template)
            write_rows_manifest(aside, config, made, statistics)
    return finish(config, made, reused=reused)


def finish(config: RunConfig, made: dict[str, Any], *, reused: bool) -> Prepared:
    """The run's vocabulary tables, its rows being there; and what is known of both."""
    data = config.folder / "data"
    tables, manifest = _make_tables(config, made, data), finished_manifest(data)
    ids = room.load_tables(tables)
    counts = {name: np.load(data / name / "counts.npy") for name in ("train", "held_out")}
    vocabulary = {
        "draft_vocab": len(ids),
        "tokens_seen": int((counts["train"] > 0).sum()),
        "ends_left_out": [end for end in manifest["made_from"]["end_token_ids"] if end not in ids],
        **{f"coverage_{name}": round(room.coverage(c, ids), 4) for name, c in counts.items()},
    }
    if manifest.get("vocabulary") != (named := {"ids": room.vocabulary_hash(ids)} | vocabulary):
        write_manifest(data, manifest | {"vocabulary": named})
    return Prepared(data, tables, manifest["statistics"] | vocabulary, reused)


def made_from(config: RunConfig, tokenizer: Any, target_config: dict[str, Any], parts: list) -> dict[str, Any]:
    """Everything that rows depend on.

    Args:
      target_config: the target's config.json. parts: of `room.parse_source`.
    """
    family = targets.own_family(config.target.family) if config.target.family else None
    return {
        "version": jeagle.__version__,
        "source": room.source_fingerprint(parts),
        "tokenizer": room.tokenizer_hash(tokenizer),
        "target_vocab": targets.read_spec(target_config, family).vocab,
        "template": room.template_hash(tokenizer),
        "end_token_ids": list(targets.end_token_ids(tokenizer, target_config)),
        **shaping(config),
    }


def shaping(config: RunConfig) -> dict[str, Any]:
    """The settings that change rows."""
    named = {"columns": config.data.columns} if config.data.columns else {}  # rows of older versions have no such entry
    return {name: getattr(config.data, name) for name in _SHAPING} | named


_SHAPING = (  # settings that change rows; --data.streaming reads the same ones otherwise
    *("max_conversations", "row_length", "long", "held_out", "bad_share", "near_duplicates"),
    *("system_prompt", "reasoning", "thinking", "rewritten", "template_arguments"),
)


def found(data: Path, made_from: dict[str, Any]) -> bool:
    """Whether rows made from the same inputs lie there, all files as long as they were made."""
    old = read_manifest(data)
    if old is None:
        return False
    fields, sizes = differences(old["made_from"], made_from), _sizes(data)
    wrong = [name for name, size in old.get("files", {}).items() if sizes.get(name) != size]
    if fields:
        print(f"prepare: {', '.join(fields)} changed since {data} was made; making it anew")
    elif wrong:
        print(f"prepare: {', '.join(wrong)} in {data} has gone or has another length; making it anew", flush=True)
    return not (fields or wrong)


def write_split(folder: Path, batches: Iterable[Batch], row_length: int, vocab: int) -> dict[str, int]:
    """Writes the rows of a split, [B, row_length] at a time, and how often each token is supervised; counts them."""
    counts, tokens = np.zeros(vocab, np.int64), 0
    with room.RowWriter(folder, row_length) as writer:
        for batch in batches:
            counts += room.count_supervised(batch, vocab)
            tokens += int((batch.segments_BT > 0).sum())
            writer.write(batch)
    np.save(folder / "counts.npy", counts)
    return {"rows": writer.rows, "tokens": tokens, "supervised_tokens": int(counts.sum())}


def write_rows_manifest(folder: Path, config: RunConfig, made_from: dict[str, Any], statistics: dict[str, Any]) -> None:
    """The manifest of a folder of rows, all of whose files are there; it names them with their lengths in bytes."""
    tree = {"made_from": made_from, "target": config.target.ref, "statistics": statistics, "files": _sizes(folder)}
    write_manifest(folder, tree)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _make_tables(config: RunConfig, made_from: dict[str, Any], data: Path) -> Path:
    """A stage of its own: another --draft.vocab needs no new rendering.

    UserError where a trained draft would find its head's rows meaning other tokens.
    """
    tables, size, ends = config.folder / "tables", config.draft.vocab, made_from["end_token_ids"]
    given = _given_vocabulary(config, made_from)
    wanted: dict[str, Any] = {"data": fingerprint(made_from), "draft_vocab": size, "end_token_ids": list(ends)}
    if given is not None:
        wanted["given"] = fingerprint(given.tolist())
    old = read_manifest(tables)
    fields = [] if old is None else differences({n: v for n, v in old.items() if n != "ids"}, wanted)
    counts = np.load(data / "train" / "counts.npy")
    if old is not None and not fields:
        if _whole(tables, counts):
            return tables
        print(f"prepare: {tables} lacks a file or has a damaged one; making it anew", flush=True)
    ids = room.choose_vocabulary(counts, size, ends) if given is None else given
    trained = any(path.name.isdigit() for path in (config.folder / "checkpoints").glob("*"))
    if fields and trained and not np.array_equal(ids, room.load_tables(tables)):
        raise UserError(
            f"{tables} belongs to a draft that is trained already, and would change ({', '.join(fields)} differ): its "
            "head's rows would mean other tokens. Give another --name, or the settings that the run was begun with."
        )
    if fields:
        print(f"prepare: {', '.join(fields)} changed since {tables} was made; making it anew", flush=True)
    with claimed(config, shared=True):
        room.save_tables(tables, counts, ids, wanted)
    return tables


def _given_vocabulary(config: RunConfig, made_from: dict[str, Any]) -> np.ndarray | None:
    """The draft vocabulary that --data.vocabulary or --draft.start brings, [D] token ids; None where rows choose it.

    UserError where it does not fit the target, or the two contradict each other.
    """
    size, ends = config.draft.vocab, made_from["end_token_ids"]
    source = config.data.vocabulary or config.draft.start  # a draft to start from brings its head's rows' meaning
    if not source or (size <= 0 and config.draft.start):  # the whole vocabulary needs no map
        return None
    given = room.load_given_vocabulary(Path(source), size, made_from["target_vocab"], ends)
    if config.data.vocabulary and config.draft.start:
        begun = room.load_given_vocabulary(Path(config.draft.start), size, made_from["target_vocab"], ends)
        if not np.array_equal(given, begun):
            raise UserError(
                f"--data.vocabulary {source} is not the vocabulary of the draft to start from, {config.draft.start}: "
                "its head's rows would mean other tokens. Leave --data.vocabulary out."
            )
    return given


def _whole(tables: Path, counts_V: np.ndarray) -> bool:
    """Whether a folder of vocabulary tables has its three files, which agree with one another and with the counts."""
    try:
        room.load_tables(tables)
        return (tables / "t2d.npy").is_file() and np.array_equal(np.load(tables / "counts.npy"), counts_V)
    except (UserError, OSError, ValueError, EOFError):
        return False


def describe(prepared: Prepared) -> list[str]:
    """What was prepared, in a few lines."""
    lines = [f"{prepared.data} is made from the same inputs: reused"] if prepared.reused else []
    return lines + room.describe_statistics(prepared.statistics, prepared.data)
