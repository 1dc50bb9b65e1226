"""What each trainer means by "the EAGLE-3 loss": every switch, by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jeagle.align import SlotRule
from jeagle.objective.losses import parse_loss

Normaliser = Literal["all_slots", "counting", "document"]


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """The switches of an objective.

    Attributes:
      loss: weighted names, as `losses.parse_loss` reads them.
      decay: weight of TTT step k is decay**k.
      slots: which slots count (`align.counting_slots`).
      normaliser: what step k's sum is divided by, over the global batch: every slot, padding too (all_slots); the
        slots that count (counting); or each document's own count, documents weighing alike (document).
      mask_out_of_vocab: slots whose target argmax the draft cannot say carry no loss.
      cross_documents: steps k >= 1 run on into the next packed document.
      renormalised: acceptance (tv, nla, lk) is taken against the teacher renormalised over the draft vocabulary.
    """

    loss: str
    decay: float
    slots: SlotRule
    normaliser: Normaliser
    mask_out_of_vocab: bool
    cross_documents: bool
    renormalised: bool

    def terms(self) -> tuple[tuple[float, str], ...]:
        return parse_loss(self.loss)


# Sources: SpecForge 0.2.0 and speculators 0.9.0, as their own classes compute (tests/goldens).
DIALECTS: dict[str, ObjectiveSpec] = {
    "jeagle": ObjectiveSpec("soft_ce", 0.8, "served", "counting", False, False, False),
    "specforge": ObjectiveSpec("soft_ce", 0.8, "specforge", "all_slots", True, False, False),
    "speculators": ObjectiveSpec("kl", 1.0, "speculators", "counting", False, True, True),
}


def resolve(dialect: str, **switches: Any) -> ObjectiveSpec:
    """The dialect's switches, those given (not None) replaced. UserError for an unknown loss."""
    spec = dataclasses.replace(DIALECTS[dialect], **{k: v for k, v in switches.items() if v is not None})
    spec.terms()
    return spec
