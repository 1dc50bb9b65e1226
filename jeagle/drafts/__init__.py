"""The draft model: Batch + Features + Tables -> Predictions in training, and the same draft as it decodes."""

from jeagle.drafts.eagle3 import Eagle3, advance, empty_cache, greedy_token
from jeagle.drafts.parameters import (
    add_adapters,
    by_path,
    constrain_draft,
    draft_sharding,
    merge_adapters,
    with_adapters,
)
from jeagle.drafts.ttt import unroll
from jeagle.drafts.ttt_attention import Backend, attention_backend, trusted_backend
