"""Predictions and a teacher -> loss and figures: pure functions."""

from jeagle.objective.dialects import DIALECTS, ObjectiveSpec, resolve
from jeagle.objective.losses import LOSSES, parse_loss
from jeagle.objective.objective import ACCELERATOR_CHUNK, CPU_CHUNK, Metrics, divisors, objective

__all__ = [
    "ACCELERATOR_CHUNK",
    "CPU_CHUNK",
    "DIALECTS",
    "LOSSES",
    "Metrics",
    "ObjectiveSpec",
    "divisors",
    "objective",
    "parse_loss",
    "resolve",
]
