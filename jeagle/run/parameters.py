"""Which of a draft's parameters are trained, and which of a checkpoint's arrays are measured and exported."""

import dataclasses
import itertools
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax

SCHEDULE_FREE_B1 = 0.9
"""Weight of the average of iterates in the parameters that schedule_free trains."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """Whether a parameter is trained, by its path of names: adapters alone, or all but a lm_head that is held."""

    adapters: bool = False
    head: bool = True

    def __call__(self, path: tuple[str, ...]) -> bool:
        return "lora" in path if self.adapters else self.head or path[-1] != "lm_head"


ALL_TRAINED = Trained()


def served_draft(draft: Any, moments: Any, average: Any = None) -> Any:
    """As `served_params`, of a state on the device: its draft, what the optimiser keeps of it, and the average."""
    free = optax.tree.get(moments, "ScheduleFreeState")
    if average is not None or free is None:
        return draft if average is None else average

    def iterate(z: Any, y: Any) -> Any:
        return y if isinstance(z, optax.MaskedNode) else _iterate(y, z)

    return jax.tree.map(iterate, free.z, draft, is_leaf=lambda z: isinstance(z, optax.MaskedNode))


def _iterate(y: Any, z: Any) -> Any:
    """The average of iterates that schedule_free serves, of the one that is trained and of its base."""
    return (y - (1 - SCHEDULE_FREE_B1) * z) / SCHEDULE_FREE_B1


_DRAFT, _ITERATE, _AVERAGE = r"\.draft", r"\.optimiser.*\.z", r"\.average"


def served_params(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """From a checkpoint's arrays by tree path, the draft's parameters by dotted name that are measured and exported.

    The moving average where one is kept; of schedule_free the averaged iterate x = (y - (1 - b1) z) / b1, whose y is
    trained; else the trained ones.
    """
    served = {}
    for name, paths in served_from(tree).items():
        trained, *base = (np.asarray(tree[path]) for path in paths)
        served[name] = _iterate(trained, *base).astype(np.float32) if base else trained
    return served


def served_from(paths: Iterable[str]) -> dict[str, list[str]]:
    """The same, unread: by parameter, the paths of the arrays of which `served_params` makes it.

    A path `.draft['layers'][0]['norm'].value` is of the parameter layers.0.norm.
    """
    found: dict[str, list[str]] = {}
    for prefix, path in itertools.product((_DRAFT, _ITERATE, _AVERAGE), paths):
        if below := re.fullmatch(rf"{prefix}((?:\['?\w+'?\])+)(?:\.value)?", path):
            name = ".".join(path_names(below[1]))
            found[name] = [path] if prefix == _AVERAGE else [*found.get(name, ()), path]
    return found


def path_names(path: str) -> tuple[str, ...]:
    """['layers'][0]['norm'].value -> ("layers", "0", "norm")."""
    return tuple(re.findall(r"\['?(\w+)'?\]", path))
