"""Gemma 1 to 4: scaled embeddings, sliding windows, and (up to Gemma 3) norms stored as their difference from 1."""

from typing import Any

from jeagle.interfaces import LogitShape
from jeagle.targets.families import common
from jeagle.targets.families.common import LAYER, Family, Names, Piece, Switches
from jeagle.targets.model.spec import BlockSpec, ExpertsSpec, RouterSpec, TargetSpec


def _biases(switches: Switches) -> dict[str, bool]:
    """`attention_biases`, after a check of a key that all Gemmas have."""
    switches.only(use_bidirectional_attention=(False, None, "vision"))
    return common.attention_biases(switches)


def _embed_scale(switches: Switches) -> float:
    return float(switches["hidden_size"]) ** 0.5


def _windowed_spec(switches: Switches, blocks: list[BlockSpec], **over: Any) -> TargetSpec:
    """`target_spec` of Gemma 2 to 4, whose layers of two kinds have rotary embeddings of their own."""
    logits = LogitShape(cap=float(switches.get("final_logit_softcapping", 0.0)))
    rope = common.rope_from_switches(switches, "full_attention")
    return common.target_spec(switches, blocks, rope=rope, embed_scale=_embed_scale(switches), logits=logits, **over)


def gemma(switches: Switches) -> TargetSpec:
    block = BlockSpec(common.attention_spec(switches, **_biases(switches)), common.dense_spec(switches))
    return common.target_spec(switches, [block] * switches["num_hidden_layers"], embed_scale=_embed_scale(switches))


def gemma2(switches: Switches) -> TargetSpec:
    """Gemma 2 and 3."""
    third = switches.architecture.startswith("Gemma3")
    soft_cap = float(switches.get("attn_logit_softcapping", 0.0))  # Gemma 3 has the key and ignores it
    switches.only(sliding_window_size=(switches.get("sliding_window", 0),))  # the same key in Gemma 2's first files
    own: dict[str, Any] = {"soft_cap": 0.0 if third else soft_cap, "qk_norm": "head" if third else ""}
    own |= {"scale": float(switches["query_pre_attn_scalar"]) ** -0.5, **_biases(switches)}
    mixers = [
        common.attention_spec(switches, rope=common.rope_from_switches(switches, kind), window=window, **own)
        for kind, window in zip(common.layer_types(switches), common.sliding_windows(switches), strict=True)
    ]
    return _windowed_spec(switches, [BlockSpec(mixer, common.dense_spec(switches), norms="both") for mixer in mixers])


def gemma4(switches: Switches) -> TargetSpec:
    kinds, shared = common.layer_types(switches), switches.get("num_kv_shared_layers", 0)
    first_shared = len(kinds) - shared
    extra = switches.get("hidden_size_per_layer_input", 0)
    switches.get("vocab_size_per_layer_input")  # unused where the width is 0
    own: dict[str, Any] = {"norms": "both", "per_layer_width": extra, "scaled": True}
    own["experts"] = _gemma4_experts(switches)
    blocks = []
    for i, kind in enumerate(kinds):
        reads_shared = i >= first_shared
        mlp = common.dense_spec(switches)
        if reads_shared and switches.get("use_double_wide_mlp"):
            mlp = common.dense_spec(switches, width=2 * mlp.width)
        shares = shared and not reads_shared and kind not in kinds[i + 1 : first_shared]  # the last of its kind
        sharing = {"share_kv_as": kind if shares else "", "read_kv_from": kind if reads_shared else ""}
        blocks.append(BlockSpec(_gemma4_mixer(switches, i, kind, **sharing), mlp, **own))
    return _windowed_spec(switches, blocks, per_layer_vocab=switches["vocab_size_per_layer_input"] if extra else 0)


def _gemma4_mixer(switches: Switches, number: int, kind: str, **sharing: str) -> Any:
    own = {int(k): v for k, v in switches.get("per_layer_config", {}).items()}.get(number, {})
    sliding = kind == "sliding_attention"
    return common.attention_spec(
        switches,
        **_biases(switches),
        kv_heads=own.get("num_key_value_heads", switches["num_key_value_heads"]),
        head_dim=own.get("head_dim", switches["head_dim"]),
        rope=common.rope_from_switches(switches, kind),
        window=switches["sliding_window"] if sliding else 0,
        scale=1.0,
        qk_norm="head",
        value_norm=True,
        values_are_keys=bool(switches.get("attention_k_eq_v")) and not sliding,
        **sharing,
    )


def _gemma4_experts(switches: Switches) -> ExpertsSpec | None:
    if not switches.get("enable_moe_block"):
        for unused in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            switches.get(unused)
        return None
    router = RouterSpec("softmax", renormalised=True, normed=True)
    activation = switches.get("hidden_activation", "gelu_pytorch_tanh")
    chosen, width = switches["top_k_experts"], switches["moe_intermediate_size"]
    return ExpertsSpec(switches["num_experts"], chosen, width, router, activation)


_GEMMA: Names = common.merged(
    common.stem_names(1.0), common.pre_norm_names(1.0), common.attention_names(), common.mlp_names()
)


def _both_norms(plus: float) -> Names:
    return common.merged(
        common.norm("before_mixer", "input_layernorm", plus),
        common.norm("after_mixer", "post_attention_layernorm", plus),
        common.norm("before_mlp", "pre_feedforward_layernorm", plus),
        common.norm("after_mlp", "post_feedforward_layernorm", plus),
    )


_GEMMA2: Names = common.merged(
    common.stem_names(1.0),
    _both_norms(1.0),
    common.attention_names(1.0),
    common.mlp_names(),
)

_GEMMA4: Names = common.merged(
    common.stem_names(),
    _both_norms(0.0),
    common.attention_names(),
    common.mlp_names(),
    common.expert_names("experts"),
    common.linear("moe.router.proj", "router.proj"),
    common.norm("after_dense", "post_feedforward_layernorm_1"),
    common.norm("before_experts", "pre_feedforward_layernorm_2"),
    common.norm("after_experts", "post_feedforward_layernorm_2"),
    common.linear("per_layer_gate", "per_layer_input_gate"),
    common.linear("per_layer_out", "per_layer_projection"),
    common.norm("per_layer_norm", "post_per_layer_input_norm"),
    {
        "blocks.moe.router.input_scale": Piece(f"{LAYER}router.scale"),
        "blocks.moe.router.expert_scale": Piece(f"{LAYER}router.per_expert_scale"),
        "blocks.output_scale": Piece(f"{LAYER}layer_scalar"),
        "per_layer.embed": Piece("model.embed_tokens_per_layer.weight", transposed=False),
        "per_layer.proj.kernel": Piece("model.per_layer_model_projection.weight"),
        "per_layer.norm": Piece("model.per_layer_projection_norm.weight"),
    },
)

FAMILIES = {
    "GemmaForCausalLM": Family(gemma, _GEMMA, "gemma"),
    "Gemma2ForCausalLM": Family(gemma2, _GEMMA2, "gemma2"),
    "Gemma3ForCausalLM": Family(gemma2, _GEMMA2, "gemma3_text"),
    "Gemma4ForCausalLM": Family(gemma4, _GEMMA4, "gemma4_text"),
}
