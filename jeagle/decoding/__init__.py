"""Speculative and plain decoding over two step functions, and what drafts got accepted."""

from jeagle.decoding.chain import Measured, Models, counters, decode, padded_width
from jeagle.decoding.ngram import NGramTable
from jeagle.decoding.ngram import measure as measure_ngram
from jeagle.decoding.plain import Plain, compare, decode_plain

__all__ = [
    "Measured",
    "Models",
    "NGramTable",
    "Plain",
    "compare",
    "counters",
    "decode",
    "decode_plain",
    "measure_ngram",
    "padded_width",
]
