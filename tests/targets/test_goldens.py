"""Every architecture gives transformers' numbers, also with packed rows, a cache, stacked layers, and on a mesh.

make_goldens.py makes the goldens. JEAGLE_TARGET_GOLDENS names another folder of them, as `make parity` makes it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import targets
from jeagle.runtime import mesh as meshes
from jeagle.targets.families import FAMILIES, architecture_of

FOLDER = Path(os.environ.get("JEAGLE_TARGET_GOLDENS") or Path(__file__).parent / "goldens")
CONFIGS = {path.parent.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/config.json"))}
ARCHITECTURES = {name: architecture_of(config) for name, config in CONFIGS.items()}
CASES = [name for name, architecture in ARCHITECTURES.items() if architecture in FAMILIES]


def _like(case: str, other: str) -> bool:
    return ARCHITECTURES[case] == ARCHITECTURES[other]


# Where a model can also differ from itself: each architecture's first case here, every case in `make parity`.
EVERY = "JEAGLE_TARGET_GOLDENS" in os.environ
THOROUGH = CASES if EVERY else [case for case in CASES if case == next(c for c in CASES if _like(c, case))]
TO_TRANSFORMERS, TO_ITSELF = 1e-4, 2e-5  # of the largest value
# Their frequencies depend on the length of the text, beyond so many tokens.
SWITCHES_AT = {"llama_rope_dynamic": 12, "phi3_longrope_long": 12, "phi4_partial_long": 12}
# These programs run for a millisecond: compiling them is all that takes time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class States(NamedTuple):
    """hidden [L + 1, B, T, H], last [B, T, H], logits [B, T, V]."""

    hidden: np.ndarray
    last: np.ndarray
    logits: np.ndarray

    def at(self, row: int, positions: slice) -> States:
        return States(self.hidden[:, row, positions], self.last[row, positions], self.logits[row, positions])


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Iterator[str]:
    """The fixture has the module's scope, so that the tests of a case run one after the other and share its model."""
    yield request.param
    jax.clear_caches()  # eighty models' programs are gigabytes


def test_there_are_goldens_and_every_architecture_of_theirs_has_a_family():
    assert ARCHITECTURES
    missing = sorted(set(ARCHITECTURES.values()) - set(FAMILIES))
    assert not missing, f"no entry in FAMILIES: {', '.join(missing)}"


def test_equals_transformers(case):
    tokens, theirs = golden(case)
    assert_close(forward(case, tokens, *alone(tokens)), theirs, TO_TRANSFORMERS)


def test_packed_documents_equal_documents_alone(case):
    tokens, theirs = golden(case)
    length = tokens.shape[1]
    one, other = length // 2 - 1, length // 2 - 2  # shorter than what switches the frequencies
    packed = np.zeros_like(tokens)
    packed[0, :one], packed[0, one : one + other] = tokens[0, :one], tokens[1, :other]
    packed[1, :other], packed[1, other : one + other] = tokens[1, :other], tokens[0, :one]
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, (first, second) in enumerate([(one, other), (other, one)]):
        positions[row, : first + second] = [*range(first), *range(second)]
        segments[row, : first + second] = [1] * first + [2] * second
    if case in SWITCHES_AT:
        theirs = forward(case, *cut(tokens, max(one, other)))
    ours = forward(case, packed, positions, segments)
    assert_close(ours.at(0, slice(0, one)), theirs.at(0, slice(0, one)), TO_TRANSFORMERS)
    assert_close(ours.at(0, slice(one, one + other)), theirs.at(1, slice(0, other)), TO_TRANSFORMERS)
    assert_close(ours.at(1, slice(0, other)), theirs.at(1, slice(0, other)), TO_TRANSFORMERS)
    assert_close(ours.at(1, slice(other, one + other)), theirs.at(0, slice(0, one)), TO_TRANSFORMERS)


@pytest.mark.parametrize("case", THOROUGH, indirect=True, scope="module")
def test_cached_decoding_equals_the_full_forward(case):
    """Cases take turns with a token at a time, as generation reads, and three, as verification does."""
    block = (1, 3)[CASES.index(case) % 2]
    tokens, theirs = golden(case)
    if case in SWITCHES_AT:
        tokens = tokens[:, : SWITCHES_AT[case] // 2]
        theirs = forward(case, tokens, *alone(tokens))
    assert_close(decode(case, tokens, block), theirs, TO_TRANSFORMERS)


@pytest.mark.parametrize("case", THOROUGH, indirect=True, scope="module")
def test_stacked_layers_on_eight_devices_equal_separate_ones_on_one(case):
    """Both are checked at once, since each is a program to compile; an error in either of them is visible."""
    tokens, _ = golden(case)
    one = forward(case, tokens, *alone(tokens))
    split = jax.device_count() >= 8
    assert_close(forward(case, tokens, *alone(tokens), stacked=True, split=split), one, TO_ITSELF)


@functools.lru_cache
def golden(case: str) -> tuple[np.ndarray, States]:
    """Tokens [B, T] and transformers' states and logits of them."""
    arrays = np.load(FOLDER / case / "golden.npz")
    return arrays["tokens"], States(arrays["hidden"], arrays["last"], arrays["logits"])


@functools.lru_cache(maxsize=4)
def loaded(case: str, stacked: bool, split: bool) -> targets.Target:
    source = targets.open_weights(targets.resolve(str(FOLDER / case)))
    return targets.load_target(source, mesh_of(source) if split else single(), "float32", stacked=stacked)


def single() -> jax.sharding.Mesh:
    return meshes.make_mesh(devices=jax.devices()[:1])


def mesh_of(source: Any) -> jax.sharding.Mesh:
    """Eight devices, split over fsdp and tensor, and over experts where there are any."""
    experts = "expert" in meshes.AXES and any("experts" in name for name in source.names())
    return meshes.make_mesh(fsdp=2, tensor=2, expert=2) if experts else meshes.make_mesh(fsdp=4, tensor=2)


@functools.lru_cache(maxsize=4)
def compiled(case: str, stacked: bool, split: bool) -> Any:
    target = loaded(case, stacked, split)
    aux_layers = tuple(range(target.spec.layers + 1))

    @jit
    def run(state: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array):
        model = target._replace(state=state).model()
        aux, last = model.forward(tokens, positions, segments, aux_layers)
        return aux, last, model.logits(last)

    return functools.partial(run, target.state)


def forward(
    case: str, tokens: Any, positions: Any, segments: Any, *, stacked: bool = False, split: bool = False
) -> States:
    arrays = (jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments))
    return states(*compiled(case, stacked, split)(*arrays))


@functools.lru_cache(maxsize=4)
def extending(case: str) -> Any:
    target = loaded(case, False, False)
    aux_layers = tuple(range(target.spec.layers + 1))

    @jit
    def extend(state: Any, tokens: jax.Array, positions: jax.Array, cache: Any):
        model = target._replace(state=state).model()
        aux, last, cache = model.extend(tokens, positions, cache, aux_layers)
        return (aux, last, model.logits(last)), cache

    return functools.partial(extend, target.state)


def decode(case: str, tokens: np.ndarray, block: int) -> States:
    """The same states, computed in blocks of tokens with a cache; the remaining tokens one by one."""
    rows, length = tokens.shape
    cache = loaded(case, False, False).model().empty_cache(rows, length, jnp.float32)
    pieces, start = [], 0
    while start < length:
        here = slice(start, start + (block if start + block <= length else 1))
        positions = jnp.broadcast_to(jnp.arange(length)[here], (rows, here.stop - here.start))
        piece, cache = extending(case)(jnp.asarray(tokens[:, here], jnp.int32), positions, cache)
        pieces.append(piece)
        start = here.stop
    return states(*(np.concatenate(part, axis=1) for part in zip(*pieces, strict=True)))


def states(aux: Any, last: Any, logits: Any) -> States:
    return States(np.moveaxis(np.asarray(aux), 2, 0), np.asarray(last), np.asarray(logits))


def alone(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows that have one document each."""
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens)


def cut(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the same size with only their first tokens; the rest is padding."""
    live = np.arange(tokens.shape[1]) < length
    return tokens * live, np.arange(tokens.shape[1]) * live * np.ones_like(tokens), live * np.ones_like(tokens)


def assert_close(ours: States, theirs: States, tolerance: float) -> None:
    """Each layer's states, `last` and the logits within `tolerance` of their largest value; the first that is not."""
    named = [(f"hidden {i}", *pair) for i, pair in enumerate(zip(ours.hidden, theirs.hidden, strict=True))]
    for name, mine, other in [*named, ("last", ours.last, theirs.last), ("logits", ours.logits, theirs.logits)]:
        assert mine.shape == other.shape, name
        apart = np.abs(mine - other).max() / np.abs(other).max()
        assert apart < tolerance, f"{name}: off by {apart:.1e} of the largest value"
