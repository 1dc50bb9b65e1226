"""Layers that both targets and drafts are made of."""

from jeagle.layers.attention import LANES, AttentionMask, masked_attention
from jeagle.layers.linear import GATES, Dense, GatedMLP, Linear, matmul, rms_norm
from jeagle.layers.rope import depends_on_length, rotate_by, yarn_mscale
from jeagle.layers.splash import packed_attention
