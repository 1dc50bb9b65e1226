"""The rotary embedding in a draft's config.json, in the schemas of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jeagle.errors import UserError
from jeagle.interfaces import Rope

_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
"""What each kind of scaling computes its angles from."""
_KINDS = ("default", *_NEEDS)
_FACTORS = ("short_factor", "long_factor")


def rope_of(decoder: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding of a draft's layers, complete: what the file leaves out has transformers' defaults.

    From transformers 5's rope_parameters, or rope_theta and rope_scaling of 4; both must then say the same.

    Raises:
      UserError: where they do not, for one that jeagle's draft has not, or that lacks a number.
    """
    return _completed(_stated(decoder), decoder, head_dim)


def _stated(decoder: Mapping[str, Any]) -> Rope:
    new, old = decoder.get("rope_parameters"), decoder.get("rope_scaling")
    from_old = _one_rope(old or {}, decoder.get("rope_theta"))
    if not new:
        return from_old
    rope = _one_rope(new, decoder.get("rope_theta"))
    if "rope_theta" in decoder and rope.theta != from_old.theta:
        raise UserError(f"config.json has two RoPE bases: rope_theta {from_old.theta}, rope_parameters {rope.theta}.")
    if old and rope.scaling != from_old.scaling:
        raise UserError("config.json has two RoPE scalings: rope_scaling and rope_parameters differ; keep one.")
    return rope


def _one_rope(parameters: Mapping[str, Any], theta: float | None) -> Rope:
    if nested := [name for name, value in parameters.items() if isinstance(value, Mapping)]:
        raise UserError(
            f"config.json has a RoPE for each kind of layer ({', '.join(nested)}); jeagle's draft has one: put that of "
            "its own layers into rope_parameters."
        )
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise UserError("config.json has a partial_rotary_factor; jeagle's draft rotates whole heads.")
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items() if k not in ("rope_theta", "type")}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    rest["rope_type"] = "longrope" if kind == "su" else kind  # what it was called at first
    if rest["rope_type"] not in _KINDS:
        raise UserError(f"config.json has the RoPE scaling {kind!r}; jeagle's draft has {', '.join(_KINDS)}.")
    if rest == {"rope_type": "default"}:
        rest = {}
    return Rope(float(parameters.get("rope_theta") or theta or Rope.theta), tuple(sorted(rest.items())))


def _completed(rope: Rope, decoder: Mapping[str, Any], head_dim: int) -> Rope:
    """With the lengths that a scaling goes by, where other fields tell them."""
    scaling = {name: value for name, value in rope.scaling if value is not None}
    kind, longest = scaling.get("rope_type"), decoder.get("max_position_embeddings")
    needed = _NEEDS.get(str(kind), ())
    if "original_max_position_embeddings" in needed and longest:
        original = longest if kind == "dynamic" else decoder.get("original_max_position_embeddings") or longest
        original = scaling.setdefault("original_max_position_embeddings", original)
        if kind in ("yarn", "longrope"):
            scaling.setdefault("factor", longest / original)
    missing = [name for name in needed if name not in scaling]
    if missing:
        raise UserError(f"config.json has the RoPE scaling {kind} without {missing[0]}, which it is computed from.")
    for name in set(needed) & set(_FACTORS):
        found = scaling[name]
        if not isinstance(found, tuple) or len(found) != head_dim // 2:
            raise UserError(
                f"config.json has {name} {list(found) if isinstance(found, tuple) else found!r}; heads of {head_dim} "
                f"dimensions need {head_dim // 2} numbers, one for each pair."
            )
    if extra := sorted({"short_mscale", "long_mscale"} & set(scaling)):
        raise UserError(f"config.json has {extra[0]} in its RoPE scaling; jeagle's draft has no such thing.")
    return Rope(rope.theta, tuple(sorted(scaling.items())))
