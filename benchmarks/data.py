"""Tokenising and masking: jeagle beside SpecForge's and speculators' functions, on the same conversations and cores.

    python -m benchmarks.data --conversations 20000 --specforge CHECKOUT --speculators CHECKOUT

Prints JSON. Conversations are made up from a word list with a fixed seed, of one to four turns. The peers' functions
are loaded from checkouts (SpecForge 0.2.0's specforge.data.preprocessing.preprocess_conversations; speculators 0.4's
_preprocess_batch) and need torch; modules of theirs that masking does not use are stubbed. Without checkouts jeagle is
timed alone. They take turns, slice by slice, and processor time is measured beside the clock, so that a machine
that does other work too favours none of them.

    python -m benchmarks.data --whole 1000000 --short

times jeagle's whole way from a file to rows on disk instead, and its memory. `--short` makes conversations of one turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.maskers import Masks, jeagle_masks, specforge_masks, speculators_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=20000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="for each of the peers")
    parser.add_argument("--tokenizer", type=Path, help="a folder; by default one is trained on the conversations")
    parser.add_argument("--specforge", type=Path)
    parser.add_argument("--speculators", type=Path)
    parser.add_argument(
        "--slices", type=int, default=20, help="of the conversations: all are timed on one, then on the next"
    )
    parser.add_argument("--whole", type=int, default=0, metavar="CONVERSATIONS")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--scratch", type=Path, help="a folder for files; by default the system's")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer, args.conversations)
    if args.whole:
        print(json.dumps(whole(tokenizer, args.whole, args.scratch, short=args.short), indent=2))
        return
    chats = list(conversations(args.conversations, short=args.short))
    ways = {"jeagle": (jeagle_masks(tokenizer), 1)}
    if args.specforge is not None:
        ways["specforge"] = (specforge_masks(args.specforge, tokenizer), args.processes)
    if args.speculators is not None:
        ways["speculators"] = (speculators_masks(args.speculators, tokenizer), args.processes)
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for number in range(args.slices):
        for name, (masks, processes) in ways.items():
            rounds[name].append(timed(masks, chats[number :: args.slices], processes=processes))
            print(name, rounds[name][-1], file=sys.stderr, flush=True)
    report: dict[str, Any] = {"conversations": len(chats), "processes": args.processes, "slices": args.slices}
    report |= {name: summary(found, len(chats)) for name, found in rounds.items()}
    for name in list(ways)[1:]:
        report[name]["jeagle_times_faster"] = {
            kind: round(float(np.median(column(rounds[name], kind) / column(rounds["jeagle"], kind))), 2)
            for kind in ("seconds", "cpu_seconds")
        }
    print(json.dumps(report, indent=2))


def conversations(count: int, *, short: bool = False) -> Iterator[list[dict[str, str]]]:
    """Chats of words whose frequencies fall as those of a language do."""
    random_ = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "ai", "ou", "er", "in")]
    words = ["".join(random_.choices(syllables, k=random_.randint(1, 4))) for _ in range(20000)]
    weights = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))

    def text(low: int, high: int) -> str:
        found = random_.choices(words, cum_weights=weights, k=random_.randint(low, high))
        marks = random_.choices((" ", " ", " ", " ", " ", " ", ", ", ". ", "\n"), k=len(found))
        return "".join(word + mark for word, mark in zip(found, marks, strict=True)).strip()

    if short:  # of sentences that are there, since a million new ones take longer to make up than to read
        known = [text(5, 15) for _ in range(20000)]
        for _ in range(count):
            question, *answer = random_.choices(known, k=random_.randint(2, 4))
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": ". ".join(answer)}]
        return
    for _ in range(count):
        turns = [(("user", text(5, 60)), ("assistant", text(40, 300))) for _ in range(random_.randint(1, 4))]
        yield [{"role": role, "content": said} for pair in turns for role, said in pair]


def load_tokenizer(folder: Path | None, count: int) -> Any:
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|im_end|>", "<|im_start|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((m["content"] for chat in conversations(min(count, 1000)) for m in chat), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")
    from jeagle.data import use_template

    return use_template(tokenizer, "chatml")


_MASKS: list[Masks] = []


class Round(NamedTuple):
    """One run over all conversations: by the clock, by the processors, and what came out."""

    seconds: float
    cpu_seconds: float
    tokens: int
    supervised_tokens: int


def timed(masks: Masks, chats: list, *, processes: int) -> Round:
    """One run; with processes, each forked one takes an equal share, as `datasets.map` shares it."""
    _MASKS[:] = [masks]
    masks(chats[:50])
    if processes == 1:
        begun = time.perf_counter()
        found = _share(chats)
        return Round(time.perf_counter() - begun, *found)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        begun = time.perf_counter()
        parts = pool.map(_share, [chats[i::processes] for i in range(processes)], chunksize=1)
        seconds = time.perf_counter() - begun
    del os.environ["TOKENIZERS_PARALLELISM"]
    return Round(seconds, *(sum(column) for column in zip(*parts, strict=True)))


def column(rounds: list[Round], name: str) -> np.ndarray:
    return np.array([getattr(r, name) for r in rounds])


def summary(rounds: list[Round], count: int) -> dict[str, Any]:
    """Rates over all slices, and counts."""
    seconds, cpu, tokens, supervised = (float(column(rounds, name).sum()) for name in Round._fields)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "conversations_per_s": round(count / seconds),
        "conversations_per_cpu_s": round(count / cpu),
        "tokens_per_s": round(tokens / seconds),
        "tokens_per_cpu_s": round(tokens / cpu),
        "tokens": int(tokens),
        "supervised_tokens": int(supervised),
    }


def _share(chats: list) -> tuple[float, int, int]:
    used = time.process_time()
    found = _MASKS[0](chats)
    return time.process_time() - used, *found


def whole(tokenizer: Any, count: int, scratch: Path | None, *, short: bool) -> dict[str, Any]:
    """A jsonl file to rows on disk."""
    from jeagle.config import DataConfig
    from jeagle.data import parse_source, prepare_rows

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source, out = Path(folder) / "chats.jsonl", Path(folder) / "data"
        out.mkdir()
        with source.open("w") as file:
            for chat in conversations(count, short=short):
                file.write(json.dumps({"messages": chat}) + "\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun, used = time.perf_counter(), time.process_time()
        ends, vocab = (tokenizer.eos_token_id,), len(tokenizer)
        config = DataConfig(row_length=2048, held_out=0.02)
        made = prepare_rows(parse_source(str(source)), tokenizer, config, out, end_token_ids=ends, vocab=vocab)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens, rows = (sum(made[side][what] for side in ("train", "held_out")) for what in ("tokens", "rows"))
    return {
        "conversations": count,
        "tokens": tokens,
        "rows": rows,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "conversations_per_s": round(count / seconds),
        "rows_per_s": round(rows / seconds, 1),
        "tokens_per_s": round(tokens / seconds),
        "tokens_per_cpu_s": round(tokens / cpu),
        "peak_rss_mib": round(after / 1024),
        "peak_rss_mib_before": round(before / 1024),
        "near_duplicates": made["near_duplicates"],
    }


if __name__ == "__main__":
    main()
