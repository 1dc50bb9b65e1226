"""Speculative and plain decoding with two models as step functions, and how many drafted tokens were accepted."""

from jeagle.decoding.baselines import (
    Drafter,
    FirstThatDrafts,
    NGramTable,
    NotFiniteError,
    PlainAnswer,
    PromptLookup,
    compare_answers,
    decode_plain,
    decode_without_draft_model,
)
from jeagle.decoding.speculative import (
    Decoding,
    Models,
    SpeculativeAnswer,
    acceptance_counters,
    decode_speculative,
    padded_width,
)
from jeagle.decoding.tree import TreeShape
