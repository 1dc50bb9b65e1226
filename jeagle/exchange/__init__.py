"""Drafts in and out of torch's world: the folders that SGLang, vLLM, SpecForge and speculators read and write.

jeagle's side is a `DraftSpec` and a flat dict of float32 arrays, `expected_shapes(spec)`.
"""

from jeagle.exchange.ambiguities import Reading, readings
from jeagle.exchange.card import EXPORT, ExportCard
from jeagle.exchange.config_file import read_draft_config
from jeagle.exchange.config_read import Hints
from jeagle.exchange.limits import check_spec, sglang_jax_limits, sglang_limits, vllm_limits
from jeagle.exchange.names import check_params, expected_shapes
from jeagle.exchange.open_draft import ImportedDraft, Lazy, OpenDraft, open_draft, read_export
from jeagle.exchange.peer_features import PeerFeatures, Sample, open_peer_features
from jeagle.exchange.write_export import export_sglang, export_vllm

__all__ = [
    "EXPORT",
    "ExportCard",
    "Hints",
    "ImportedDraft",
    "Lazy",
    "OpenDraft",
    "PeerFeatures",
    "Reading",
    "Sample",
    "check_params",
    "check_spec",
    "expected_shapes",
    "export_sglang",
    "export_vllm",
    "open_draft",
    "open_peer_features",
    "read_draft_config",
    "read_export",
    "readings",
    "sglang_jax_limits",
    "sglang_limits",
    "vllm_limits",
]
