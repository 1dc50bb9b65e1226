"""Texts that are nearly the same, and how varied a collection of them is.

MinHash (Broder 1997): the share of equal entries of two signatures estimates how much of their windows two sequences
share (Jaccard). Signatures are cut into bands (Leskovec et al., Mining of Massive Datasets, 3.4): only sequences that
agree in a whole band are compared, so that a million of them take no million times a million comparisons.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

NEARLY = 0.7  # texts that share more of their windows count as the same
_WINDOW = 5  # characters, or tokens
_HASHES, _BAND = 128, 4  # of texts: pairs at 0.7 are found with a chance of 0.9998
_DOCUMENT_HASHES = 32  # of documents, which are only counted
_TOGETHER = 64  # documents whose signatures are made together
_FILL = np.uint64(1 << 40)  # no token, no character
_COMPARED = 500  # texts whose nearest neighbour is looked for


def _mixed(values: np.ndarray) -> np.ndarray:
    """Bijection of uint64 after which every bit depends on every other (MurmurHash3's finaliser)."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(multiplier)
    return values ^ (values >> np.uint64(33))


_MULTIPLIERS = _mixed(np.arange(1, _HASHES + 1, dtype=np.uint64)) | np.uint64(1)


def signatures(sequences: Sequence[np.ndarray], hashes: int = _HASHES) -> np.ndarray:
    """MinHash uint32 [N, hashes] of sequences of numbers, by their windows of five; shorter ones are filled up."""
    lengths = np.maximum([len(sequence) for sequence in sequences], _WINDOW)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values = np.full(starts[-1] + _WINDOW, _FILL, np.uint64)  # the last windows are of no sequence
    for start, sequence in zip(starts, sequences, strict=False):
        values[start : start + len(sequence)] = sequence
    windows = np.zeros(starts[-1] + 1, np.uint64)
    for offset in range(_WINDOW):
        windows = windows * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + len(windows)]
    windows = _mixed(windows)
    # Of each sequence its own windows, then those that run into the next one, which are thrown away.
    edges = np.stack([starts[:-1], starts[1:] - _WINDOW + 1], axis=1).reshape(-1)
    found = [np.minimum.reduceat(windows * multiplier, edges)[::2] for multiplier in _MULTIPLIERS[:hashes]]
    return (np.stack(found, axis=1) >> np.uint64(32)).astype(np.uint32)


def text_signature(text: str) -> np.ndarray:
    """MinHash uint32 [128] of a text's characters, letters' case and kinds of space left out."""
    return signatures([np.frombuffer(_plain(text).encode("utf-32-le", "replace"), "<u4")])[0]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def likeness(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity float [N] of a signature [H] to each of others [N, H]."""
    return (others == one).mean(axis=-1)


class Distinct:
    """Lets texts through one after another, but none that repeats an earlier one, to the letter or nearly.

    Attributes:
      repeated, near: how many were held back for either.
      signatures: of those that came through.
    """

    def __init__(self) -> None:
        self.repeated = self.near = 0
        self.signatures: list[np.ndarray] = []
        self._texts: set[str] = set()
        self._bands: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)

    def add(self, text: str) -> bool:
        """Whether the text is none of those that came through before; it then is one of them."""
        plain = _plain(text)
        if plain in self._texts:
            self.repeated += 1
            return False
        mine = text_signature(text)
        bands = [(i, mine[i : i + _BAND].tobytes()) for i in range(0, _HASHES, _BAND)]
        met = sorted({other for band in bands for other in self._bands.get(band, ())})
        if met and likeness(mine, np.stack([self.signatures[i] for i in met])).max() > NEARLY:
            self.near += 1
            return False
        self._texts.add(plain)
        for band in bands:
            self._bands[band].append(len(self.signatures))
        self.signatures.append(mine)
        return True


def variety(texts: Sequence[str], known: Sequence[np.ndarray] = ()) -> dict[str, float]:
    """How varied texts are: distinct-n (Li et al. 2016), and how like each is to its nearest neighbour.

    Args:
      known: signatures of the texts, where there are any.

    Returns:
      distinct_1, distinct_2, distinct_3: different n-grams of words / n-grams of words, over all texts.
      nearest_mean: mean estimated Jaccard similarity to the nearest other text, of at most 500 texts spread evenly.
    """
    found: dict[str, float] = {}
    words = [_plain(text).split() for text in texts]
    for n in (1, 2, 3):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        found[f"distinct_{n}"] = round(len(set(grams)) / max(len(grams), 1), 4)
    table = np.stack(list(known) or [text_signature(t) for t in texts]) if texts else np.zeros((0, _HASHES))
    nearest = []
    for i in range(0, len(texts), -(-len(texts) // _COMPARED)) if len(texts) > 1 else ():
        nearest.append(float(np.delete(likeness(table[i], table), i).max()))
    return found | {"nearest_mean": round(sum(nearest) / max(len(nearest), 1), 4)}


class NearDocuments:
    """Counts documents nearly the same as an earlier one, over all of a source: 64 bytes are kept of each."""

    def __init__(self) -> None:
        self._signatures = bytearray()
        self._held_out = bytearray()
        self._waiting: list[np.ndarray] = []

    def add(self, ids: np.ndarray, held_out: bool) -> None:
        """Takes the token ids of a document."""
        self._waiting.append(ids)
        self._held_out.append(held_out)
        if len(self._waiting) == _TOGETHER:
            self._sign()

    def _sign(self) -> None:
        if self._waiting:
            self._signatures += signatures(self._waiting, _DOCUMENT_HASHES).astype(np.uint16).tobytes()
            self._waiting = []

    def count(self) -> dict[str, int]:
        """near_duplicates: documents like an earlier one; near_held_out: held-out documents like one to train on.

        Estimates: of documents that agree in a band, each is compared with the one before it.
        """
        self._sign()
        table = np.frombuffer(self._signatures, np.uint16).reshape(-1, _DOCUMENT_HASHES)
        held_out = np.frombuffer(self._held_out, bool)
        near, leaked = np.zeros(len(table), bool), np.zeros(len(table), bool)
        for start in range(0, _DOCUMENT_HASHES, _BAND):
            keys = np.ascontiguousarray(table[:, start : start + _BAND]).view(np.uint64)[:, 0]
            order = np.argsort(keys, kind="stable")
            met = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            for part in np.array_split(met, max(len(met) // 65536, 1)):
                first, second = order[part], order[part + 1]
                alike = (table[first] == table[second]).mean(axis=1) > NEARLY
                first, second = first[alike], second[alike]
                near[second] = True
                across = held_out[first] != held_out[second]
                leaked[np.where(held_out[first], first, second)[across]] = True
        return {"near_duplicates": int(near.sum()), "near_held_out": int(leaked.sum())}
