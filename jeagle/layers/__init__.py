"""Parts that both targets and drafts are made of."""

from jeagle.layers.attention import attend
from jeagle.layers.delta import DeltaInputs, delta_chunks, delta_steps
from jeagle.layers.experts import Experts
from jeagle.layers.linear import Linear, matmul
from jeagle.layers.mask import Sight
from jeagle.layers.mlp import GATES, Dense, GatedMLP
from jeagle.layers.norms import rms_norm, unit_norm
from jeagle.layers.rope import depends_on_length, inverse_frequencies, rotate_by, yarn_mscale
from jeagle.layers.splash_attention import LANES, splash

__all__ = [
    "GATES",
    "LANES",
    "DeltaInputs",
    "Dense",
    "Experts",
    "GatedMLP",
    "Linear",
    "Sight",
    "attend",
    "delta_chunks",
    "delta_steps",
    "depends_on_length",
    "inverse_frequencies",
    "matmul",
    "rms_norm",
    "rotate_by",
    "splash",
    "unit_norm",
    "yarn_mscale",
]
