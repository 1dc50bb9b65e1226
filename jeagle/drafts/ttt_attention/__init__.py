"""Attention of the TTT steps: step-0 keys of the past, and the slot's own keys of later steps, in one softmax."""

from jeagle.drafts.ttt_attention.mirror import Mirror, reflect
from jeagle.drafts.ttt_attention.op import BY_PLATFORM, Backend, attend
from jeagle.drafts.ttt_attention.reference import reference
from jeagle.drafts.ttt_attention.self_check import disproof

__all__ = ["BY_PLATFORM", "Backend", "Mirror", "attend", "disproof", "reference", "reflect"]
