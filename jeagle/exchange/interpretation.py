"""Lists the possible interpretations of a published draft whose files do not say everything.

Where config.json leaves a question open, each of its answers gives another draft. Decoding with the target measures
which of them is right.

question               it is open                                    its answers
aux_layers             without layer ids                             after 2, n//2, n-3 layers; each one plus one
                       with two lists that contradict each other     vLLM's (top level); SGLang's (nested, plus one)
                       with nested ids only, and a target            plus one (SpecForge, SGLang); as they are (vLLM)
                       with ids at the top level only, and a target  as they are; plus one (speculators before 0.5)
norm_output            in a plain config.json of an unknown trainer  the carried state is normed; lm_head's input is
norm_before_residual   in speculators' layout without the field      false (speculators); true (vLLM)
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

from jeagle.errors import UserError
from jeagle.exchange.config_read import NORM_OUTPUT_MEANS, Hints, layout_of, plus_one, stored_aux_layers
from jeagle.exchange.config_write import LAYER_IDS, WRITTEN_BY
from jeagle.exchange.draft_reader import OpenDraft
from jeagle.interfaces import DraftSpec


class Interpretation(NamedTuple):
    """One way to understand a draft's configuration.

    Attributes:
      answers: to the open questions, by the name of the field in `Hints`; empty where no question is open.
      spec: the draft with these answers.
    """

    answers: dict[str, Any]
    spec: DraftSpec

    def describe(self) -> str:
        """Returns the answers in words."""
        words = {name: " ".join(map(str, a)) if isinstance(a, tuple) else str(a) for name, a in self.answers.items()}
        return ", ".join(f"{name} {value.lower()}" for name, value in words.items()) or "as its files say"

    def flags(self) -> str:
        """Returns the flags of `jeagle import_draft` that answer the open questions."""
        return " and ".join(f"--{name.replace('_', '-')}" for name in self.answers)


def interpretations(draft: OpenDraft, hints: Hints, target_layers: int | None) -> list[Interpretation]:
    """Returns every possible interpretation, without duplicates, the most likely one first.

    Args:
      hints: what the user says; a question that they answer is not open.
      target_layers: number n of the target's decoder layers, where the interpretations can be measured with a target.
        None where they cannot; a question that a trainer's own convention answers is not open then.

    Raises:
      UserError: where config.json cannot be read with any answer, or has no layer ids and there is no target.
    """
    config, plain = draft.config, layout_of(draft.config) == "plain"
    known_meaning = WRITTEN_BY in config or NORM_OUTPUT_MEANS in config
    options: dict[str, list[Any]] = {
        "aux_layers": _aux_layers(draft, hints, target_layers),
        "norm_output": [hints.norm_output],
        "norm_before_residual": [hints.norm_before_residual],
    }
    if plain and "norm_output" in config and not known_meaning and hints.norm_output is None:
        options["norm_output"] = ["head", "carry"]
    if not plain and config.get("norm_before_residual") is None and hints.norm_before_residual is None:
        options["norm_before_residual"] = [False, True]
    nested = {name: value for name, value in (config.get("eagle_config") or {}).items() if name != LAYER_IDS}
    without_ids = {name: value for name, value in config.items() if name != LAYER_IDS} | {"eagle_config": nested}
    by_spec: dict[DraftSpec, Interpretation] = {}
    for values in itertools.product(*options.values()):
        answers = dict(zip(options, values, strict=True))
        spec = dataclasses.replace(draft, config=without_ids).spec(Hints(**answers))
        open_answers = {name: answer for name, answer in answers.items() if len(options[name]) > 1}
        by_spec.setdefault(spec, Interpretation(open_answers, spec))
    return list(by_spec.values())


def _aux_layers(draft: OpenDraft, hints: Hints, target_layers: int | None) -> list[tuple[int, ...]]:
    """Returns the possible aux layers, the most likely ones first."""
    if hints.aux_layers:
        return [hints.aux_layers]
    (top, nested), measured = stored_aux_layers(draft.config), target_layers is not None
    if top and nested:
        candidates = [top, plus_one(nested)]
    elif nested:
        candidates = [plus_one(nested), nested] if measured else [plus_one(nested)]
    elif top:
        candidates = [top, plus_one(top)] if measured and WRITTEN_BY not in draft.config else [top]
    elif target_layers is None:
        raise UserError(
            f"{draft.where}/config.json has no {LAYER_IDS}: give the aux layers of the target with --aux-layers, such "
            "as --aux-layers 2 16 29, or give --target to have the default ones measured."
        )
    else:
        default = (2, target_layers // 2, target_layers - 3)
        candidates = [default, plus_one(default)]
    possible = [
        ids
        for ids in dict.fromkeys(candidates)
        if list(ids) == sorted(set(ids)) and ids[0] >= 0 and (target_layers is None or ids[-1] <= target_layers)
    ]
    return possible or candidates[:1]  # check_spec reports what is wrong with it
