"""Speculative and greedy decoding with two models as step functions, and how many drafted tokens were accepted."""

from jeagle.decoding.baselines import (
    GreedyAnswer,
    NGramTable,
    NotFiniteError,
    compare_answers,
    decode_greedy,
    decode_ngram,
)
from jeagle.decoding.chain import Models, SpeculativeAnswer, acceptance_counters, decode_speculative, padded_width
