"""The trainable part: Batch + Features + Tables -> Predictions."""

from jeagle.drafts.eagle3 import Eagle3
from jeagle.drafts.ttt import unroll

__all__ = ["Eagle3", "unroll"]
