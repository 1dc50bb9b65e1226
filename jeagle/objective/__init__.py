"""Predictions and a teacher -> loss and metrics, as pure functions."""

from jeagle.objective.dialects import DIALECTS, ObjectiveSpec, resolve_objective
from jeagle.objective.losses import ALIASES, LOSSES, parse_loss
from jeagle.objective.objective import ACCELERATOR_CHUNK, CPU_CHUNK, Metrics, divisors, objective

__all__ = [
    "ACCELERATOR_CHUNK",
    "ALIASES",
    "CPU_CHUNK",
    "DIALECTS",
    "LOSSES",
    "Metrics",
    "ObjectiveSpec",
    "divisors",
    "objective",
    "parse_loss",
    "resolve_objective",
]
