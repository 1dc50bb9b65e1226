"""What the goldens of targets are made of: for each architecture, small configurations that turn its switches.

Literal tables, read by make_goldens.py. A value that depends on the shape asked for is a function of `Shape`. Windows,
chunks and original context lengths are far shorter than the rows, so that every switch on length is thrown.
"""

from tests.targets.golden_cases.case import BASE, Case, Shape
from tests.targets.golden_cases.dense import DENSE
from tests.targets.golden_cases.experts import EXPERTS
from tests.targets.golden_cases.gemma import GEMMA
from tests.targets.golden_cases.hybrids import HYBRIDS

CASES: dict[str, Case] = DENSE | GEMMA | EXPERTS | HYBRIDS

__all__ = ["BASE", "CASES", "Case", "Shape"]
