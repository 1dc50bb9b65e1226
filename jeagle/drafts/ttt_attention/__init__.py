"""Attention of the TTT steps: step-0 keys of the past, and the slot's own keys of later steps, in one softmax."""

from jeagle.drafts.ttt_attention.chunked import chunked
from jeagle.drafts.ttt_attention.reference import reference

__all__ = ["chunked", "reference"]
