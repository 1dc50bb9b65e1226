"""Attention of the TTT steps: step-0 keys of the past, and the slot's own keys of later steps, in one softmax."""

from jeagle.drafts.ttt_attention.mirror import Mirror, reflect
from jeagle.drafts.ttt_attention.op import Backend, attend
from jeagle.drafts.ttt_attention.reference import reference
from jeagle.drafts.ttt_attention.self_check import attention_backend, disproof, trusted_backend

__all__ = [
    "Backend",
    "Mirror",
    "attend",
    "attention_backend",
    "disproof",
    "reference",
    "reflect",
    "trusted_backend",
]
