"""What a published draft's files leave open, and every way to read them: measuring settles what config.json does not.

question               when                                         readings
taps                   no layer ids                                 after 2, n//2, n-3 layers; each one deeper
                       two lists that contradict each other         vLLM's (at the top); SGLang's (nested, plus one)
                       only nested ids, and a target to ask         plus one (SpecForge, SGLang); as they are (vLLM)
                       only ids at the top, and a target to ask     as they are; plus one (speculators before 0.5)
norm_output            a plain config.json of an unknown trainer    the carried state is normed; lm_head's is
norm_before_residual   speculators' form without it                 false (speculators); true (vLLM)
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

from jeagle.errors import UserError
from jeagle.exchange.config_read import NORM_OUTPUT_MEANS, Hints, layout_of
from jeagle.exchange.config_write import LAYER_IDS, WRITTEN_BY
from jeagle.exchange.open_draft import OpenDraft
from jeagle.interfaces import DraftSpec

AuxLayers = tuple[int, ...]


class Reading(NamedTuple):
    """One way to read a draft's configuration.

    Attributes:
      answers: to the open questions, by name; empty where nothing is open.
    """

    answers: dict[str, Any]
    spec: DraftSpec


def readings(draft: OpenDraft, hints: Hints, target_layers: int | None) -> list[Reading]:
    """Every reading that makes sense and differs from the others, the likeliest first.

    Args:
      hints: what the user says; a question that they answer is not open.
      target_layers: n, where the readings can be measured with the target; None where they cannot. Then only what no
        trainer's own convention answers is open.

    Raises:
      UserError: where config.json cannot be read however the questions are answered, or leaves the taps open without a
        target to count layers of.
    """
    options = {"aux_layers": _aux_layers(draft, hints, target_layers), **_norms(draft, hints)}
    open_questions = [name for name, values in options.items() if len(values) > 1]
    found: dict[DraftSpec, Reading] = {}
    for values in itertools.product(*options.values()):
        answers = dict(zip(options, values, strict=True))
        stated = dataclasses.replace(draft, config=_without_taps(draft.config))
        spec = stated.spec(Hints(**answers))
        found.setdefault(spec, Reading({name: answers[name] for name in open_questions}, spec))
    return list(found.values())


def _norms(draft: OpenDraft, hints: Hints) -> dict[str, list[Any]]:
    config, plain = draft.config, layout_of(draft.config) == "plain"
    told = WRITTEN_BY in config or NORM_OUTPUT_MEANS in config
    carried = plain and not told and "norm_output" in config and hints.norm_output is None
    silent = not plain and config.get("norm_before_residual") is None and hints.norm_before_residual is None
    return {
        "norm_output": ["head", "carry"] if carried else [hints.norm_output],
        "norm_before_residual": [False, True] if silent else [hints.norm_before_residual],
    }


def _aux_layers(draft: OpenDraft, hints: Hints, target_layers: int | None) -> list[AuxLayers]:
    if hints.aux_layers:
        return [hints.aux_layers]
    config, plain = draft.config, layout_of(draft.config) == "plain"
    top = tuple(config.get(LAYER_IDS) or ())
    nested = tuple((config.get("eagle_config") or {}).get(LAYER_IDS) or ()) if plain else ()
    measured = target_layers is not None
    if top and nested:
        found = [top, _deeper(nested)]
    elif nested:
        found = [_deeper(nested), nested] if measured else [_deeper(nested)]
    elif top:
        found = [top, _deeper(top)] if measured and WRITTEN_BY not in config else [top]
    elif target_layers is None:
        raise UserError(
            f"{draft.where}/config.json has no {LAYER_IDS}: say with --aux-layers after which layers the target is "
            "tapped, such as --aux-layers 2 16 29, or give --target to have the usual ones measured."
        )
    else:
        usual = (2, target_layers // 2, target_layers - 3)
        found = [usual, _deeper(usual)]
    sensible = [aux_layers for aux_layers in dict.fromkeys(found) if _makes_sense(aux_layers, target_layers)]
    return sensible or found[:1]  # check_spec says what is wrong with it


def _makes_sense(aux_layers: AuxLayers, target_layers: int | None) -> bool:
    return (
        list(aux_layers) == sorted(set(aux_layers))
        and aux_layers[0] >= 0
        and (target_layers is None or aux_layers[-1] <= target_layers)
    )


def _deeper(ids: AuxLayers) -> AuxLayers:
    return tuple(i + 1 for i in ids)


def _without_taps(config: dict[str, Any]) -> dict[str, Any]:
    """So that the taps are those that are told, whatever else the file says."""
    nested = {name: value for name, value in (config.get("eagle_config") or {}).items() if name != LAYER_IDS}
    return {name: value for name, value in config.items() if name != LAYER_IDS} | {"eagle_config": nested}
