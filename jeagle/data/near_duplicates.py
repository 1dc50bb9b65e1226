"""Finds near-duplicates among texts and documents, and measures how varied a collection of texts is.

MinHash (Broder 1997): the share of equal entries of two signatures estimates the Jaccard similarity of the windows of
two sequences. Signatures are cut into bands (Leskovec et al., Mining of Massive Datasets, section 3.4): only sequences
that agree in a whole band are compared, so that the number of comparisons does not grow with the square of the number
of sequences.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32, Int64, Shaped, UInt16, UInt32, UInt64

SIMILARITY = 0.7  # sequences with a larger Jaccard similarity are near-duplicates
_WINDOW = 5  # characters or tokens
_HASHES, _BAND = 128, 4  # for texts: a pair with similarity 0.7 is found with probability 0.9998
_DOCUMENT_HASHES = 64  # for documents, with 16-bit entries: a pair with similarity 0.7 is found with probability 0.988
_TOGETHER = 64  # documents whose signatures are computed together
_REMEMBERED = 1 << 21  # documents that later ones are compared with
_WAYS = 4  # documents per bucket: the last ones that fell into it
_FILL = np.uint64(1 << 40)  # not a token and not a character
_COMPARED = 500  # texts whose nearest neighbour is searched for


def _mix_bits(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Maps uint64 one-to-one so that every bit depends on every other bit (the finaliser of MurmurHash3)."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(multiplier)
    return values ^ (values >> np.uint64(33))


_MULTIPLIERS = _mix_bits(np.arange(1, _HASHES + 1, dtype=np.uint64)) | np.uint64(1)


def minhash(sequences: Sequence[np.ndarray], hashes: int = _HASHES) -> UInt32[np.ndarray, "N M"]:
    """Computes MinHash signatures of N sequences of integers, from their windows of five.

    Sequences shorter than a window are padded to its length.

    Args:
      hashes: M, number of hash functions, at most 128.
    """
    lengths = np.maximum([len(sequence) for sequence in sequences], _WINDOW)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values = np.full(starts[-1] + _WINDOW, _FILL, np.uint64)  # the last windows belong to no sequence
    for start, sequence in zip(starts, sequences, strict=False):
        values[start : start + len(sequence)] = sequence
    windows = np.zeros(starts[-1] + 1, np.uint64)
    for offset in range(_WINDOW):
        windows = windows * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + len(windows)]
    windows = _mix_bits(windows)
    # For each sequence, its own windows, and then those that run into the next sequence, which are discarded.
    edges = np.stack([starts[:-1], starts[1:] - _WINDOW + 1], axis=1).reshape(-1)
    smallest = [np.minimum.reduceat(windows * multiplier, edges)[::2] for multiplier in _MULTIPLIERS[:hashes]]
    return (np.stack(smallest, axis=1) >> np.uint64(32)).astype(np.uint32)


def text_signature(text: str) -> UInt32[np.ndarray, " M"]:
    """Computes the MinHash signature (M = 128) of a text's characters, regardless of case and kind of white space."""
    return minhash([np.frombuffer(_normalised(text).encode("utf-32-le", "replace"), "<u4")])[0]


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def estimated_jaccard(one: Shaped[np.ndarray, " M"], others: Shaped[np.ndarray, "N M"]) -> Float[np.ndarray, " N"]:
    """Estimates the Jaccard similarity, 0 to 1, of one signature to each of N others."""
    return (others == one).mean(axis=-1)


class NearDuplicateFilter:
    """Accepts texts one after another, except those that repeat an earlier accepted text exactly or nearly.

    Attributes:
      repeated, near: number of texts that were refused as exact repetitions and as near-duplicates.
      signatures: MinHash signatures of the accepted texts.
    """

    def __init__(self) -> None:
        self.repeated = self.near = 0
        self.signatures: list[np.ndarray] = []
        self._texts: set[str] = set()
        self._bands: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)

    def add(self, text: str) -> bool:
        """Accepts the text and returns True, unless it repeats an earlier accepted text."""
        normalised = _normalised(text)
        if normalised in self._texts:
            self.repeated += 1
            return False
        signature = text_signature(text)
        bands = [(i, signature[i : i + _BAND].tobytes()) for i in range(0, _HASHES, _BAND)]
        candidates = sorted({other for band in bands for other in self._bands.get(band, ())})
        if candidates and estimated_jaccard(signature, np.stack([self.signatures[i] for i in candidates])).max() > (
            SIMILARITY
        ):
            self.near += 1
            return False
        self._texts.add(normalised)
        for band in bands:
            self._bands[band].append(len(self.signatures))
        self.signatures.append(signature)
        return True


def variety(texts: Sequence[str]) -> dict[str, float]:
    """Measures how varied texts are: distinct-n (Li et al. 2016), and the similarity to the nearest neighbour.

    Returns:
      distinct_1, distinct_2, distinct_3: the share of different n-grams of words among all n-grams of all texts.
      nearest_mean: mean estimated Jaccard similarity to the nearest other text, over at most 500 texts that are spread
        evenly over all texts.
    """
    result: dict[str, float] = {}
    words = [_normalised(text).split() for text in texts]
    for n in (1, 2, 3):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        result[f"distinct_{n}"] = round(len(set(grams)) / max(len(grams), 1), 4)
    table = np.stack([text_signature(text) for text in texts]) if texts else np.zeros((0, _HASHES))
    compared = range(0, len(texts), -(-len(texts) // _COMPARED)) if len(texts) > 1 else ()
    nearest = [float(np.delete(estimated_jaccard(table[i], table), i).max()) for i in compared]
    return result | {"nearest_mean": round(sum(nearest) / max(len(nearest), 1), 4)}


def document_signatures(documents: Sequence[np.ndarray]) -> UInt16[np.ndarray, "N M"]:
    """Computes MinHash signatures (M = 64, 16 bits each) of N documents that are given by their token ids."""
    parts = [documents[i : i + _TOGETHER] for i in range(0, len(documents), _TOGETHER)]
    signatures = [minhash(part, _DOCUMENT_HASHES).astype(np.uint16) for part in parts]
    return np.concatenate(signatures) if signatures else np.zeros((0, _DOCUMENT_HASHES), np.uint16)


class NearDuplicateIndex:
    """Says of each document whether it is a near-duplicate of an earlier one, over a whole source.

    The last two million documents are remembered, with 128 bytes each for the signature and 256 to 512 bytes each for
    the index: at most 0.8 GB for a source of any size. For each band of the signatures there is a table of buckets,
    and each bucket holds the last four documents that fell into it.

    Args:
      drop: whether near-duplicates are dropped, so that later documents are not compared with them.

    Attributes:
      near: number of near-duplicates of an earlier document.
      drop: as given.
    """

    def __init__(self, *, drop: bool = False) -> None:
        self.near, self.drop, self._count = 0, drop, 0
        # np.zeros takes memory only where something is written.
        self._signatures = np.zeros((_REMEMBERED, _DOCUMENT_HASHES), np.uint16)
        self._held_out, self._leaked = np.zeros(_REMEMBERED, bool), np.zeros(_REMEMBERED, bool)
        self._forgotten = 0  # leaked documents that are no longer remembered
        self._bands = np.arange(_DOCUMENT_HASHES // _BAND)
        self._buckets = self._build_buckets(1 << 10)

    def add(self, signature: UInt16[np.ndarray, " M"], held_out: bool) -> bool:
        """Adds a document by its row of `document_signatures`; returns whether it is a near-duplicate."""
        index = self._bands, self._bucket_numbers(signature, self._buckets.shape[1])
        buckets = self._buckets[index]
        similar = buckets[buckets > 0] - 1
        similar = similar[(self._signatures[similar] == signature).sum(axis=1) > SIMILARITY * _DOCUMENT_HASHES]
        self.near += bool(similar.size)
        if similar.size and self.drop:
            return True
        here, self._count = self._count % _REMEMBERED, self._count + 1
        across = similar[self._held_out[similar] != held_out]
        self._forgotten += int(self._leaked[here])
        self._signatures[here], self._held_out[here], self._leaked[here] = signature, held_out, False
        if across.size:
            self._leaked[here if held_out else across] = True
        buckets[:, 1:] = buckets[:, :-1]
        buckets[:, 0] = here + 1
        self._buckets[index] = buckets
        if 2 * self._buckets.shape[1] < self._count <= _REMEMBERED:
            self._buckets = self._build_buckets(2 * self._buckets.shape[1])
        return bool(similar.size)

    def count(self) -> dict[str, int]:
        """Returns estimated numbers of documents, as MinHash gives them.

        Returns:
          near_duplicates: near-duplicates of an earlier document.
          near_dropped: near-duplicates that were dropped.
          near_held_out: held-out documents that are near-duplicates of a training document.
        """
        leaked = self._forgotten + int(self._leaked.sum())
        dropped = self.near if self.drop else 0
        return {"near_duplicates": self.near, "near_dropped": dropped, "near_held_out": leaked}

    def _bucket_numbers(self, signatures: UInt16[np.ndarray, "*N M"], size: int) -> Int64[np.ndarray, "*N bands"]:
        """Returns the bucket of each band of the signatures."""
        return (_mix_bits(signatures.view(np.uint64)) % np.uint64(size)).astype(np.int64)

    def _build_buckets(self, size: int) -> Int32[np.ndarray, "bands size ways"]:
        """Builds buckets of the documents so far: document numbers from 1, the latest first; 0 where there is none."""
        buckets = np.zeros((len(self._bands), size, _WAYS), np.int32)
        numbers = self._bucket_numbers(self._signatures[: self._count], size)
        for band in self._bands:
            order = np.argsort(numbers[:, band], kind="stable")
            number = numbers[order, band]
            way = np.searchsorted(number, number, side="right") - 1 - np.arange(len(number))
            latest = way < _WAYS
            buckets[band, number[latest], way[latest]] = order[latest] + 1
        return buckets
