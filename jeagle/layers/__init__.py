"""Parts that both targets and drafts are made of."""

from jeagle.layers.attention import attend
from jeagle.layers.linear import matmul
from jeagle.layers.mlp import GatedMLP
from jeagle.layers.norms import rms_norm
from jeagle.layers.rope import inverse_frequencies, rotate

__all__ = [
    "GatedMLP",
    "attend",
    "inverse_frequencies",
    "matmul",
    "rms_norm",
    "rotate",
]
