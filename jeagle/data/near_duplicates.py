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
_DOCUMENT_HASHES = 64  # of documents, whose entries have 16 bits: pairs at 0.7 are found with a chance of 0.988
_TOGETHER = 64  # documents whose signatures are made together
_REMEMBERED = 1 << 21  # documents that later ones are compared with
_WAYS = 4  # documents that a bucket holds: the last ones that fell into it
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


def document_signatures(documents: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash uint16 [N, 64] of documents, given by their token ids."""
    parts = [documents[i : i + _TOGETHER] for i in range(0, len(documents), _TOGETHER)]
    found = [signatures(part, _DOCUMENT_HASHES).astype(np.uint16) for part in parts]
    return np.concatenate(found) if found else np.zeros((0, _DOCUMENT_HASHES), np.uint16)


class NearDocuments:
    """Tells of each document whether it is nearly the same as one before it, over all of a source.

    The last two million documents are remembered, with 128 bytes of each and 256 to 512 to find it by: at most 0.8 GB,
    whatever the source. For each band of the signatures there is a table of buckets, each with the last four documents
    that fell into it.

    Attributes:
      near: how many are like an earlier one. drop: they are left out, so that no later one is compared with them.
    """

    def __init__(self, *, drop: bool = False) -> None:
        self.near, self.drop, self._count = 0, drop, 0
        # Of zeros, so that memory is only taken where something is written.
        self._signatures = np.zeros((_REMEMBERED, _DOCUMENT_HASHES), np.uint16)
        self._held_out, self._leaked = np.zeros(_REMEMBERED, bool), np.zeros(_REMEMBERED, bool)
        self._forgotten = 0  # leaked ones that are remembered no more
        self._bands = np.arange(_DOCUMENT_HASHES // _BAND)
        self._buckets = self._filled(1 << 10)

    def add(self, signature: np.ndarray, held_out: bool) -> bool:
        """Takes a document by its row of `document_signatures`: whether it is like an earlier one."""
        places = self._bands, self._places(signature, self._buckets.shape[1])
        buckets = self._buckets[places]
        met = buckets[buckets > 0] - 1
        met = met[(self._signatures[met] == signature).sum(axis=1) > NEARLY * _DOCUMENT_HASHES]
        self.near += bool(met.size)
        if met.size and self.drop:
            return True
        here, self._count = self._count % _REMEMBERED, self._count + 1
        across = met[self._held_out[met] != held_out]
        self._forgotten += int(self._leaked[here])
        self._signatures[here], self._held_out[here], self._leaked[here] = signature, held_out, False
        if across.size:
            self._leaked[here if held_out else across] = True
        buckets[:, 1:] = buckets[:, :-1]
        buckets[:, 0] = here + 1
        self._buckets[places] = buckets
        if 2 * self._buckets.shape[1] < self._count <= _REMEMBERED:
            self._buckets = self._filled(2 * self._buckets.shape[1])
        return bool(met.size)

    def count(self) -> dict[str, int]:
        """near_duplicates: documents like an earlier one; near_dropped: as many of them as are left out; near_held_out:
        held-out documents like one to train on.

        Estimates, as MinHash gives them.
        """
        leaked = self._forgotten + int(self._leaked.sum())
        dropped = self.near if self.drop else 0
        return {"near_duplicates": self.near, "near_dropped": dropped, "near_held_out": leaked}

    def _places(self, signatures: np.ndarray, size: int) -> np.ndarray:
        """The bucket [.., bands] of each band of signatures [.., 64]."""
        return (_mixed(signatures.view(np.uint64)) % np.uint64(size)).astype(np.int64)

    def _filled(self, size: int) -> np.ndarray:
        """int32 [bands, size, 4]: numbers of the documents so far, from 1, the last one first; 0: none."""
        buckets = np.zeros((len(self._bands), size, _WAYS), np.int32)
        places = self._places(self._signatures[: self._count], size)
        for band in self._bands:
            order = np.argsort(places[:, band], kind="stable")
            place = places[order, band]
            way = np.searchsorted(place, place, side="right") - 1 - np.arange(len(place))
            last = way < _WAYS
            buckets[band, place[last], way[last]] = order[last] + 1
        return buckets
