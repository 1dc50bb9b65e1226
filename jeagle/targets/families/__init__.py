"""Target families: how each reads its config.json, and where it stores its weights.

To add a family, add an entry to `FAMILIES` of one of the files, and a golden test. A user's own family is given as
`--target.family package.module:NAME`.
"""

import importlib
from typing import Any

from jeagle.errors import UserError
from jeagle.targets.families import deepseek, gemma, llama, qwen
from jeagle.targets.families.common import Family, Switches
from jeagle.targets.families.kinds import check_kinds
from jeagle.targets.model.spec import TargetSpec

_FILES = (llama, qwen, gemma, deepseek)
FAMILIES: dict[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}

# What "model." and "lm_head." become in models of which the text part is only a part.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.", "lm_head."),
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("language_model.", "lm_head."),
)


def read_spec(config: dict[str, Any], family: Family | None = None) -> TargetSpec:
    """Returns the TargetSpec of a config.json. Raises UserError for an unknown architecture or an unsupported key."""
    import transformers  # takes two seconds

    check_kinds(config)
    name, values = _text_part(config)
    chosen = family or family_of(config)
    if (kind := chosen.model_type) in transformers.CONFIG_MAPPING:
        # The defaults of the model type complete the keys, in the newest spelling, as transformers reads them.
        given = {k: v for k, v in values.items() if k not in ("quantization_config", "model_type")}
        for section in {"rope_scaling", "rope_parameters"} & given.keys():
            given[section] = _without_nulls(given[section])
        if (scaling := given.get("rope_scaling") or {}).get("type") == "su":  # the first name of LongRoPE
            given["rope_scaling"] = scaling | {"type": "longrope"}
        try:
            values = transformers.CONFIG_MAPPING[kind](**given).to_dict()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"The target's config.json is not a valid {kind} configuration: {reason}") from error
    return chosen.read(Switches(name, values))


def _without_nulls(tree: Any) -> Any:
    """An object without its null fields, which transformers takes for numbers."""
    if not isinstance(tree, dict):
        return tree
    return {name: _without_nulls(value) for name, value in tree.items() if value is not None}


def family_of(config: dict[str, Any]) -> Family:
    """Returns the family of a config.json. Raises UserError for an unknown architecture."""
    if (name := architecture_of(config)) not in FAMILIES:
        raise UserError(
            f"The target's architecture {name} is not supported; supported are: {', '.join(sorted(FAMILIES))}. "
            "docs/adding_a_target.md shows how to add one."
        )
    return FAMILIES[name]


def architecture_of(config: dict[str, Any]) -> str:
    """Returns the architecture's name, which is that of the text part in a multimodal model."""
    return _text_part(config)[0]


def own_family(path: str) -> Family | None:
    """Returns a user's family from `package.module:NAME`; None for an empty path. Raises UserError if there is none."""
    if not path:
        return None
    module, _, name = path.partition(":")
    try:
        family = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--target.family {path} cannot be imported ({error}): give package.module:NAME.") from error
    if not isinstance(family, Family):
        raise UserError(f"--target.family {path} is a {type(family).__name__}; it must be a jeagle.targets.Family.")
    return family


def _text_part(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture's name and the keys of its text part, which has its own model_type."""
    name = (config.get("architectures") or ["(none given)"])[0]
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return name, config
    outer = {k: config[k] for k in ("eos_token_id", "tie_word_embeddings") if config.get(k) is not None}
    parts = (text for text, family in FAMILIES.items() if family.model_type == inner.get("model_type"))
    return next(parts, name), inner | outer
