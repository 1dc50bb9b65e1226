"""Prepared rows for people: in a terminal, and as a page."""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle.interfaces import Batch
from jeagle.runtime.outputs import signed_file

_LEARNT, _SPECIAL, _PLAIN = "\x1b[32m", "\x1b[2;36m", "\x1b[0m"
_STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em}
body{padding:0 1em;color:#222;background:#fff}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.6 ui-monospace,monospace;border:1px solid #ccc;padding:1em}
.y{background:#d5f0d8}.s{color:#0a6a7a;opacity:.75}hr{border:0;border-top:2px dashed #999}
td{padding:.1em 1.5em .1em 0;vertical-align:top}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#181818}.y{background:#1d4a26}.s{color:#7fd3e0}}"""


class Piece(NamedTuple):
    """One token of a row: its text, its document's number, whether it is learnt, whether it is a special token."""

    text: str
    segment: int
    learnt: bool
    special: bool


def token_texts(path: Path) -> Callable[[np.ndarray], list[tuple[str, bool]]]:
    """From a tokenizer.json: a function from ids to (text, special) of each.

    Characters that are spread over several tokens come with the last of them.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def texts(ids: np.ndarray) -> list[tuple[str, bool]]:
        found, begin, shown = [], 0, ""
        for end, token in enumerate(ids.tolist(), 1):
            if token in special:
                found.append((str(tokenizer.id_to_token(token)), True))
                begin, shown = end, ""
                continue
            whole = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
            known = whole.rstrip("\ufffd")
            found.append((known[len(shown) :], False))
            shown = known if len(known) > len(shown) else shown
            if end - begin > 64 and known == whole:  # short pieces, so that long texts take no square of time
                begin, shown = end, ""
        return found

    return texts


def pieces(rows: Batch, number: int, texts: Callable[[np.ndarray], list[tuple[str, bool]]]) -> list[Piece]:
    """The tokens of one row, padding left out."""
    tokens, segments, _, learnt = (np.asarray(array[number]) for array in rows)
    found = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        here = segments == segment
        for (text, special), taught in zip(texts(tokens[here]), learnt[here].tolist(), strict=True):
            found.append(Piece(text, segment, taught, special))
    return found


def terminal_row(title: str, row: Sequence[Piece], coloured: bool, width: int = 0) -> str:
    """A row's text between rules; what is learnt is green, or between ⟦ and ⟧ where there is no colour."""
    width = width or shutil.get_terminal_size().columns
    lines, learnt, segment = [f"{title}  ({len(row)} tokens)".ljust(width)], False, 0
    text = ""
    for piece in row:
        if piece.segment != segment:
            text += ("⟧" if learnt and not coloured else "") + (_PLAIN if coloured else "")
            learnt, segment = False, piece.segment
            text += ("\n" if text else "") + f"── document {segment} ".ljust(width, "─") + "\n"
        if coloured:
            colour = _LEARNT if piece.learnt else _SPECIAL if piece.special else _PLAIN
            text += colour + _visible(piece.text)
        else:
            text += "⟦" if piece.learnt and not learnt else "⟧" if learnt and not piece.learnt else ""
            text += _visible(piece.text)
        learnt = piece.learnt
    text += (_PLAIN if coloured else "⟧" if learnt else "") + "\n" + "─" * width
    return "\n".join([*lines, text])


_SIGN = '<meta name="generator" content="jeagle preview">'
PAGE = signed_file("page of jeagle.preview's", _SIGN.encode(), b'<p><span class="y">What is learnt</span>')


def html_page(
    name: str, part: str, numbers: Sequence[int], rows: Sequence[Sequence[Piece]], metrics: Sequence[tuple[str, str]]
) -> str:
    """One page that needs nothing else: the rows and the figures."""
    table = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in metrics)
    shown = "".join(
        f"<h2>{part} row {number}</h2><pre>{_html_row(row)}</pre>" for number, row in zip(numbers, rows, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{_SIGN}'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style><h1>{html.escape(name)}</h1>"
        f'<p><span class="y">What is learnt</span>, <span class="s">special tokens</span>.</p>'
        f"<table>{table}</table>{shown}</html>\n"
    )


def metrics(manifest: dict[str, Any], tables: dict[str, Any] | None, coverage: float | None) -> list[tuple[str, str]]:
    """(name, value) of what is known of prepared data."""
    s = manifest["statistics"]
    found = []
    for part in ("train", "held_out"):
        side = s[part]
        lengths, answers = side["lengths"], side["answers"]
        share = side["supervised_tokens"] / max(side["tokens"], 1)
        found += [
            (
                part.replace("_", " "),
                f"{side['documents']:,} documents in {side['rows']:,} rows, {side['fill']:.0%} full",
            ),
            ("  tokens", f"{side['tokens']:,}, {share:.1%} of them learnt"),
            (
                "  document lengths",
                f"half at most {lengths['p50']}, 95 % at most {lengths['p95']}, longest {lengths['max']}",
            ),
            ("  answers", f"{answers['mean']} in a conversation, at most {answers['max']}"),
            ("  longer than a row", f"{side['truncated']} cut, {side['split']} split, {side['dropped']} left out"),
        ]
    used = max(s["conversations"], 1)
    aside = sum(s["set_aside"].values())
    found += [
        ("read", f"{s['read']:,} rows: {s['duplicates']:,} duplicates, {aside:,} set aside"),
        (
            "nearly duplicates",
            f"{s.get('near_duplicates', 0):,}, {s.get('near_dropped', 0):,} left out, {s.get('near_held_out', 0):,} "
            "held out and like one to train on",
        ),
        ("answers cut short", f"{s['answers_cut_short']:,} ({s['answers_cut_short'] / used:.1%})"),
        ("on-policy share", f"{s['on_policy'] / used:.1%} known to be {manifest['target']}'s own"),
    ]
    if coverage is not None and tables is not None:
        found.append(("draft vocabulary", f"{tables['draft_vocab']:,} tokens cover {coverage:.2%} of the answers"))
    return found


def _html_row(row: Sequence[Piece]) -> str:
    parts, segment = [], 1
    for piece in row:
        if piece.segment != segment:
            parts.append("<hr>")
            segment = piece.segment
        kind = " ".join(name for name, on in (("y", piece.learnt), ("s", piece.special)) if on)
        text = html.escape(piece.text)
        parts.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return "".join(parts)


def _visible(text: str) -> str:
    """Control characters would move a terminal's cursor, or worse."""
    return "".join(c if c == "\n" or c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in text)
