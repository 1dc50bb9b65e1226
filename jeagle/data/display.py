"""Shows prepared data to people: summary lines, rows in a terminal, and an HTML page."""

import html
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle.interfaces import Batch
from jeagle.runtime.outputs import signed_file

_ENOUGH_COVERAGE = 0.95  # of the supervised tokens by the draft vocabulary
_LISTED = 40  # columns that a note lists
_MANY_CUT_SHORT = 0.05  # share of answers that may be cut short without a warning
_MANY_LEAKED = 0.05  # share of held-out conversations that may be near-duplicates of training ones without a warning
_ENOUGH_ON_POLICY = 0.9  # share of answers that should be the target's own

_SUPERVISED, _SPECIAL, _PLAIN = "\x1b[32m", "\x1b[2;36m", "\x1b[0m"
_STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em}
body{padding:0 1em;color:#222;background:#fff}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.6 ui-monospace,monospace;border:1px solid #ccc;padding:1em}
.y{background:#d5f0d8}.s{color:#0a6a7a;opacity:.75}hr{border:0;border-top:2px dashed #999}
td{padding:.1em 1.5em .1em 0;vertical-align:top}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#181818}.y{background:#1d4a26}.s{color:#7fd3e0}}"""

_SIGN = '<meta name="generator" content="jeagle preview">'
# Pages of older versions of jeagle have no such tag, but this sentence.
PAGE = signed_file("page of jeagle.preview's", _SIGN.encode(), b'<p><span class="y">What is learnt</span>')

TokenTexts = Callable[[np.ndarray], list[tuple[str, bool]]]


def rejected_rows(statistics: dict[str, Any], folder: Path) -> tuple[dict[str, int], Path]:
    """Returns how many rows were rejected for each reason, and the file that lists them.

    Older versions of jeagle call both set_aside.
    """
    name = "set_aside" if "set_aside" in statistics else "rejected"
    return statistics.get(name, {}), folder / f"{name}.jsonl"


def describe_statistics(statistics: dict[str, Any], folder: Path) -> list[str]:
    """Describes prepared data in a few lines: what there is, what to note, and what to change.

    Args:
      statistics: as `prepare_rows` returns them, with those of the draft vocabulary.
      folder: the folder of the prepared data.
    """
    s = statistics
    train, held_out = s["train"], s["held_out"]
    share = train["supervised_tokens"] / max(train["tokens"], 1)
    lines = [
        *(f"read {columns}" for columns in s["columns"]),
        f"data: {train['documents']} conversations in {train['rows']} rows ({train['fill']:.0%} full), "
        f"{train['tokens']:,} tokens, of which {share:.0%} are supervised; {held_out['documents']} held out",
        f"draft vocabulary: {s['draft_vocab']} tokens cover {s['coverage_train']:.1%} of the supervised tokens"
        + (f" and {s['coverage_held_out']:.1%} of the held-out ones" if held_out["documents"] else ""),
        *(f"note: {text}" for text in _notes(s)),
    ]
    rejected, path = rejected_rows(s, folder)
    if rejected:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in rejected.items())
        lines.append(f"rejected: {reasons}; {path} lists every one of them with its place")
    return lines + [f"warning: {text}" for text in _warnings(s)]


def _notes(s: dict[str, Any]) -> list[str]:
    near, dropped = s.get("near_duplicates", 0), s.get("near_dropped", 0)
    long = {name: s["train"][name] + s["held_out"][name] for name in ("truncated", "split", "dropped", "unsupervised")}
    counts = {
        f"{s['duplicates']} duplicates are dropped": s["duplicates"],
        f"{near} conversations are near-duplicates of an earlier one and are "
        + ("dropped" if dropped else "kept: --data.near-duplicates drop drops them"): near,
        f"{long['truncated']} conversations were cut to the row length: --data.row-length sets it, and --data.long "
        "split keeps their ends": long["truncated"],
        f"{long['split']} conversations were longer than a row and continue in further documents": long["split"],
        f"{long['dropped']} conversations were longer than a row and are dropped": long["dropped"],
        f"{long['unsupervised']} conversations have no answer within the row length and are dropped": long[
            "unsupervised"
        ],
        f"{s['answers_cut_short']} answers are cut short: their end token is not supervised": s["answers_cut_short"],
        f"the template rewrites earlier turns: {s['taken_apart']} conversations became one document per answer, as a "
        "server sees them": s["taken_apart"],
        "the template writes today's date: set it with --data.template-arguments to make the same rows again": s[
            "template_reads_date"
        ],
    }
    unused = [
        f"of {label} these columns are not used: {', '.join([*names][:_LISTED])}" + ", ..." * (len(names) > _LISTED)
        for label, names in s.get("unused", {}).items()
    ]
    return (
        unused
        + [text for text, count in counts.items() if count]
        + [f"{text} ({n} x)" for text, n in s["notes"].items()]
    )


def _warnings(s: dict[str, Any]) -> list[str]:
    used, cut, leaked = s["conversations"], s["answers_cut_short"], s.get("near_held_out", 0)
    missing, held_out = 1 - s["coverage_train"], s["held_out"]["documents"]
    are_cut = cut > _MANY_CUT_SHORT * used and s["known_model"] and s["on_policy"] < used
    warnings = {
        f"the draft vocabulary lacks {missing:.1%} of the supervised tokens "
        f"({round(missing * s['train']['supervised_tokens']):,} tokens): raise --draft.vocab from {s['draft_vocab']}; "
        f"the answers use {s['tokens_seen']:,} different tokens": s["coverage_train"] < _ENOUGH_COVERAGE,
        f"the given vocabulary lacks the end tokens {', '.join(map(str, s['ends_left_out']))}: the draft cannot "
        "predict them": s["ends_left_out"],
        f"{cut / max(used, 1):.0%} of the answers are cut short: generate them with a higher token limit": are_cut,
        f"{leaked} of {held_out} held-out conversations are near-duplicates of training conversations: measurements "
        "on them are too optimistic": leaked > _MANY_LEAKED * max(held_out, 1),
        f"{s['on_policy'] / max(used, 1):.0%} of the answers are known to be this target's own: a draft learns best "
        "from on-policy data, which python -m jeagle.regenerate generates": s["on_policy"] < _ENOUGH_ON_POLICY * used,
    }
    return [text for text, applies in warnings.items() if applies]


def statistics_table(
    manifest: dict[str, Any], folder: Path, tables: dict[str, Any] | None, coverage: float | None
) -> list[tuple[str, str]]:
    """Returns (name, value) lines about prepared data.

    Args:
      manifest: the manifest of the prepared data in `folder`.
      tables: the manifest of the vocabulary tables, if there are any.
      coverage: share of the supervised tokens that the draft vocabulary contains, 0 to 1.
    """
    s = manifest["statistics"]
    lines = []
    for part in ("train", "held_out"):
        split = s[part]
        lengths, answers = split["lengths"], split["answers"]
        share = split["supervised_tokens"] / max(split["tokens"], 1)
        documents = f"{split['documents']:,} documents in {split['rows']:,} rows, {split['fill']:.0%} full"
        lines += [
            (part.replace("_", " "), documents),
            ("  tokens", f"{split['tokens']:,}, of which {share:.1%} are supervised"),
            ("  document lengths", f"median {lengths['p50']}, 95th percentile {lengths['p95']}, most {lengths['max']}"),
            ("  answers", f"mean {answers['mean']} per conversation, most {answers['max']}"),
            ("  longer than a row", f"{split['truncated']} cut, {split['split']} split, {split['dropped']} dropped"),
        ]
    used = max(s["conversations"], 1)
    rejected = sum(rejected_rows(s, folder)[0].values())
    near, dropped, leaked = (s.get(f"near_{name}", 0) for name in ("duplicates", "dropped", "held_out"))
    lines += [
        ("read", f"{s['read']:,} rows: {s['duplicates']:,} duplicates, {rejected:,} rejected"),
        ("near-duplicates", f"{near:,}, {dropped:,} dropped, {leaked:,} held out and like a training conversation"),
        ("answers cut short", f"{s['answers_cut_short']:,} ({s['answers_cut_short'] / used:.1%})"),
        ("on-policy share", f"{s['on_policy'] / used:.1%} are known to be answers of {manifest['target']}"),
    ]
    if coverage is not None and tables is not None:
        covered = f"{tables['draft_vocab']:,} tokens cover {coverage:.2%} of the supervised tokens"
        lines.append(("draft vocabulary", covered))
    return lines


class DisplayToken(NamedTuple):
    """One token of a row.

    Attributes:
      text: its text.
      segment: the number of its document.
      supervised: whether the loss mask includes it.
      special: whether it is a special token.
    """

    text: str
    segment: int
    supervised: bool
    special: bool


def token_texts(path: Path) -> TokenTexts:
    """Returns a function from token ids to (text, whether it is a special token) for each of them.

    The text of a character that is spread over several tokens is given with the last of these tokens.

    Args:
      path: a tokenizer.json.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def texts(ids: np.ndarray) -> list[tuple[str, bool]]:
        result, begin, shown = [], 0, ""
        for end, token in enumerate(ids.tolist(), 1):
            if token in special:
                result.append((str(tokenizer.id_to_token(token)), True))
                begin, shown = end, ""
                continue
            text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
            complete = text.rstrip("\ufffd")
            result.append((complete[len(shown) :], False))
            shown = complete if len(complete) > len(shown) else shown
            if end - begin > 64 and complete == text:  # decode short stretches, so that the time stays linear
                begin, shown = end, ""
        return result

    return texts


def display_tokens(rows: Batch, number: int, texts: TokenTexts) -> list[DisplayToken]:
    """Returns the tokens of one of the rows [R, T], without padding."""
    tokens, segments, _, supervised = (np.asarray(array[number]) for array in rows)
    result = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        here = segments == segment
        for (text, special), learnt in zip(texts(tokens[here]), supervised[here].tolist(), strict=True):
            result.append(DisplayToken(text, segment, learnt, special))
    return result


def terminal_row(title: str, row: Sequence[DisplayToken], coloured: bool, width: int = 0) -> str:
    """Formats a row for a terminal.

    Supervised tokens are green, or between ⟦ and ⟧ without colours.

    Args:
      width: characters per line; 0 takes the width of the terminal.
    """
    width = width or shutil.get_terminal_size().columns
    lines, supervised, segment = [f"{title}  ({len(row)} tokens)".ljust(width)], False, 0
    text = ""
    for token in row:
        if token.segment != segment:
            text += ("⟧" if supervised and not coloured else "") + (_PLAIN if coloured else "")
            supervised, segment = False, token.segment
            text += ("\n" if text else "") + f"── document {segment} ".ljust(width, "─") + "\n"
        if coloured:
            text += _SUPERVISED if token.supervised else _SPECIAL if token.special else _PLAIN
        elif token.supervised != supervised:
            text += "⟦" if token.supervised else "⟧"
        # A control character could move the cursor of the terminal, or worse.
        text += "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in token.text)
        supervised = token.supervised
    text += (_PLAIN if coloured else "⟧" if supervised else "") + "\n" + "─" * width
    return "\n".join([*lines, text])


def html_page(
    name: str,
    part: str,
    numbers: Sequence[int],
    rows: Sequence[Sequence[DisplayToken]],
    statistics: Sequence[tuple[str, str]],
) -> str:
    """Formats rows and statistics as one HTML page that needs no other file.

    Args:
      part: train or held_out.
      numbers: the number of each of the rows.
    """
    table = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in statistics)
    shown = "".join(
        f"<h2>{part} row {number}</h2><pre>{_html_row(row)}</pre>" for number, row in zip(numbers, rows, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{_SIGN}'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style><h1>{html.escape(name)}</h1>"
        f'<p><span class="y">Supervised tokens</span>, <span class="s">special tokens</span>.</p>'
        f"<table>{table}</table>{shown}</html>\n"
    )


def _html_row(row: Sequence[DisplayToken]) -> str:
    parts, segment = [], 1
    for token in row:
        if token.segment != segment:
            parts.append("<hr>")
            segment = token.segment
        kind = " ".join(name for name, on in (("y", token.supervised), ("s", token.special)) if on)
        text = html.escape(token.text)
        parts.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return "".join(parts)
