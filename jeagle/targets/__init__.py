"""Frozen targets: their files and weights, features of packed rows, and generation with a KV cache."""

import os

# transformers, whose configurations and tokenizers are used, would warn in every command that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jeagle.runtime.sampling import Sampling
from jeagle.targets.checkpoint.load import Target, abstract_target, load_target
from jeagle.targets.checkpoint.reference import TargetFiles, resolve
from jeagle.targets.checkpoint.tensor_reader import Table, embedding_table, head_table, is_target_embedding
from jeagle.targets.checkpoint.weights import open_weights
from jeagle.targets.families import own_family, read_spec
from jeagle.targets.families.common import Family, Piece, Switches
from jeagle.targets.model.features import distributions, features
from jeagle.targets.model.finite import broken_target, check_finite, check_text_finite
from jeagle.targets.model.generate import GeneratedAnswer, generate
from jeagle.targets.model.spec import TargetSpec, check_aux_layers
from jeagle.targets.tokenizers.load import end_token_ids, load_tokenizer
