"""Imports and exports drafts: the folders that SGLang, vLLM, SpecForge and speculators read and write.

In jeagle a draft is a `DraftSpec` and a flat dict of float32 arrays with the names of `expected_shapes(spec)`.
"""

from jeagle.exchange.card import EXPORT_FOLDER, Export, ExportCard, model_card
from jeagle.exchange.config_file import read_draft_config
from jeagle.exchange.config_read import Hints
from jeagle.exchange.draft_reader import OpenDraft, open_draft_folder, read_draft
from jeagle.exchange.draft_tensors import check_params, expected_shapes, same_embedding
from jeagle.exchange.export_writer import write_export
from jeagle.exchange.interpretation import Interpretation, interpretations
from jeagle.exchange.limits import check_spec, sglang_jax_limits, sglang_limits, vllm_limits
from jeagle.exchange.peer_features import PeerFeatures, open_peer_features
