"""What each trainer means by "the EAGLE-3 loss": every switch, by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jeagle.align import SlotRule
from jeagle.errors import UserError
from jeagle.objective.losses import ACCEPTANCE, Mixture, Terms, parse_loss

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
      fixed_window: where the draft has a sliding window, step k sees the same step-0 keys as step 0 does, instead of
        the window k further on, as a server moves it.
      renormalised: acceptance is taken against the teacher renormalised over the draft vocabulary.
      temperature: the teacher's logits are divided by it. Acceptance that is not renormalised stays at 1: the target's
        normaliser over the whole vocabulary is known for 1 alone.
      lk_scale, lk_decay: share of KL in an LK loss at acceptance a: lk_scale * exp(-lk_decay * a).
    """

    loss: str
    decay: float
    slots: SlotRule
    normaliser: Normaliser
    mask_out_of_vocab: bool
    cross_documents: bool
    fixed_window: bool
    renormalised: bool
    temperature: float = 1.0
    lk_scale: float = 1.0
    lk_decay: float = 3.0

    def terms(self) -> Terms:
        return parse_loss(self.loss)

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.lk_scale, self.lk_decay)

    @property
    def whole_batch(self) -> str:
        """Why a step's slots must all be at hand at once; empty where each part of a batch can be taken by itself."""
        if any(name == "lk_step" for _, name in self.terms()):
            return "the loss lk_step depends on the mean acceptance of the step"
        if self.mask_out_of_vocab and self.normaliser != "all_slots":
            return f"mask_out_of_vocab with the normaliser {self.normaliser} depends on every teacher of the step"
        return ""

    @property
    def whole_teacher(self) -> str:
        """Why the likeliest tokens of each distribution are not enough of a teacher; empty where they are."""
        if any(name == "reverse_kl" for _, name in self.terms()):
            return "the loss reverse_kl is infinite wherever a token's probability is not known"
        return ""


# Sources: SpecForge 0.2.0 and speculators 0.9.0, as their own classes compute (tests/goldens).
DIALECTS: dict[str, ObjectiveSpec] = {
    "jeagle": ObjectiveSpec("soft_ce", 0.8, "served", "counting", False, False, False, False),
    "specforge": ObjectiveSpec("soft_ce", 0.8, "specforge", "all_slots", True, False, False, False),
    "speculators": ObjectiveSpec("kl", 1.0, "speculators", "counting", False, True, True, True),
}


def resolve(dialect: str, **switches: Any) -> ObjectiveSpec:
    """The dialect's switches, those given (not None) replaced. UserError for a loss or temperature that cannot be."""
    spec = dataclasses.replace(DIALECTS[dialect], **{k: v for k, v in switches.items() if v is not None})
    accepting = [name for _, name in spec.terms() if name in ACCEPTANCE]
    if spec.temperature <= 0:
        raise UserError(f"--objective.temperature is {spec.temperature}; it must be above 0.")
    if spec.temperature != 1 and accepting and not spec.renormalised:
        raise UserError(
            f"--objective.temperature {spec.temperature} with the loss {accepting[0]} needs --objective.renormalised "
            "True: how likely the target's tokens are over its whole vocabulary is known at temperature 1 alone."
        )
    return spec
