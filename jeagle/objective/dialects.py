"""The switches of the EAGLE-3 loss, and how each trainer (dialect) sets them."""

import dataclasses
from typing import Any, Literal

from jeagle.align import SlotRule
from jeagle.errors import UserError
from jeagle.objective.losses import ACCEPTANCE_LOSSES, KLShare, Terms, parse_loss

Normaliser = Literal["all_slots", "counting", "document"]


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """The switches of an objective.

    Attributes:
      loss: weighted names of losses, as `losses.parse_loss` reads them.
      decay: weight of TTT step k is decay**k.
      slots: which slots count (`align.counting_slots`).
      normaliser: what step k's sum is divided by, over the global batch: the number of all slots, padding included
        (all_slots); of the slots that count (counting); or, for each document, of its own slots that count, and then
        of the documents, so that documents weigh alike (document).
      mask_out_of_vocab: slots whose target argmax is outside the draft vocabulary carry no loss.
      cross_documents: steps k >= 1 continue into the next packed document.
      fixed_window: where the draft has a sliding window, step k attends to the same step-0 keys as step 0, instead of
        moving the window on by k, as a server does.
      renormalised: acceptance is computed against the teacher renormalised over the draft vocabulary.
      temperature: the teacher's logits are divided by it. Acceptance that is not renormalised has temperature 1, since
        the target's normaliser over the whole vocabulary is known for that one only.
      lk_scale, lk_decay: the share of KL in an LK loss at acceptance a is lk_scale * exp(-lk_decay * a).
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
    def kl_share(self) -> KLShare:
        return KLShare(self.lk_scale, self.lk_decay)

    @property
    def needs_whole_batch(self) -> str:
        """Why the loss cannot be computed from parts of a batch, one after the other; "" where it can."""
        if any(name == "lk_step" for _, name in self.terms()):
            return "the loss lk_step depends on the mean acceptance of the step"
        if self.mask_out_of_vocab and self.normaliser != "all_slots":
            return (
                f"mask_out_of_vocab with the normaliser {self.normaliser} depends on all teacher positions of the step"
            )
        return ""

    @property
    def needs_full_teacher(self) -> str:
        """Why the most likely tokens of each distribution are not enough as a teacher; "" where they are."""
        if any(name == "reverse_kl" for _, name in self.terms()):
            return "the loss reverse_kl is infinite where a token's probability is not known"
        return ""


DIALECTS: dict[str, ObjectiveSpec] = {
    "jeagle": ObjectiveSpec("soft_ce", 0.8, "served", "counting", False, False, False, False),
    "specforge": ObjectiveSpec("soft_ce", 0.8, "specforge", "all_slots", True, False, False, False),
    "speculators": ObjectiveSpec("kl", 1.0, "speculators", "counting", False, True, True, True),
}
"""Sources: SpecForge 0.2.0 and speculators 0.9.0, as their own classes compute the loss (tests/goldens)."""


def resolve_objective(dialect: str, **switches: Any) -> ObjectiveSpec:
    """The dialect's switches, replaced by those given that are not None.

    Raises:
      UserError: for an unknown loss, or a temperature that is not positive or does not go with the loss.
    """
    spec = dataclasses.replace(DIALECTS[dialect], **{k: v for k, v in switches.items() if v is not None})
    accepting = [name for _, name in spec.terms() if name in ACCEPTANCE_LOSSES]
    if spec.temperature <= 0:
        raise UserError(f"--objective.temperature is {spec.temperature}; it must be above 0.")
    if spec.temperature != 1 and accepting and not spec.renormalised:
        raise UserError(
            f"--objective.temperature {spec.temperature} with the loss {accepting[0]} needs --objective.renormalised "
            "True, because the target's probabilities over its whole vocabulary are known for temperature 1 only."
        )
    return spec
