"""The draft model: Batch + Features + Tables -> Predictions in training, and the same draft as it decodes."""

from jeagle.drafts.eagle3 import Eagle3, advance, empty_cache
from jeagle.drafts.lora import add_adapters, merge_adapters, with_adapters
from jeagle.drafts.sharding import by_path, constrain_draft, draft_sharding
from jeagle.drafts.ttt import unroll
from jeagle.drafts.ttt_attention import Backend, attention_backend, trusted_backend
