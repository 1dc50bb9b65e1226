"""The trainable part: Batch + Features + Tables -> Predictions; and the same draft as it decodes."""

from jeagle.drafts.decode import advance, choose, empty_cache
from jeagle.drafts.eagle3 import Eagle3
from jeagle.drafts.lora import add_adapters, merge_adapters, with_adapters
from jeagle.drafts.sharding import by_path, constrain_draft, draft_sharding
from jeagle.drafts.ttt import unroll
from jeagle.drafts.ttt_attention import Backend, attention_backend, disproof, trusted_backend

__all__ = [
    "Backend",
    "Eagle3",
    "add_adapters",
    "advance",
    "attention_backend",
    "by_path",
    "choose",
    "constrain_draft",
    "disproof",
    "draft_sharding",
    "empty_cache",
    "merge_adapters",
    "trusted_backend",
    "unroll",
    "with_adapters",
]
