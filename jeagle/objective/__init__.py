"""Predictions and a teacher -> loss and metrics, as pure functions."""

from jeagle.objective.dialects import DIALECTS, ObjectiveSpec, resolve_objective
from jeagle.objective.losses import LOSSES
from jeagle.objective.objective import ACCELERATOR_CHUNK, CPU_CHUNK, Metrics, divisors, objective
