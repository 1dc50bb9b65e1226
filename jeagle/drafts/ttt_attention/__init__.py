"""Attention of the TTT steps as an op: a plain reference, faster backends, and a check of a backend on its device."""

from jeagle.drafts.ttt_attention.op import ATTENTION, Backend, BackwardCarry, attend_ttt, deliver_to_backward
from jeagle.drafts.ttt_attention.reference import reference
from jeagle.drafts.ttt_attention.self_check import attention_backend, kernel_fault, trusted_backend
