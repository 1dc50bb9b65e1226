"""A whole training step with a random target, put together from the parts that `jeagle.train` puts it together from."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from benchmarks.needed import needed_flops
from benchmarks.random_target import random_target
from benchmarks.step import live_of, slot_width
from benchmarks.tpu_needed import needed_flops as target_flops
from benchmarks.tpu_shapes import MODELS as PUBLISHED
from benchmarks.works import SEED, Work, make_batch
from jeagle import features
from jeagle.config import RunConfig
from jeagle.drafts import Eagle3
from jeagle.interfaces import Batch, DraftSpec
from jeagle.run import assemble
from jeagle.run.draft_init import draft_spec
from jeagle.targets import TargetSpec
from jeagle.targets.families import read_spec
from jeagle.training.optimiser import learning_rate, make_optimiser
from jeagle.training.setup import make_program
from jeagle.training.step import Frozen, Program, TrainState, first_state, live_slots, teacher_features

MODELS = PUBLISHED | {
    "tiny": PUBLISHED["llama-3.1-8b"]
    | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"num_hidden_layers": 7, "vocab_size": 512}
}
"""config.json of published targets, and of one that a CPU steps through in no time."""


class WholeStep(NamedTuple):
    """All of a run that its steps need, but their state and rows; `draft` is what the state's draft is of."""

    config: RunConfig
    model: dict[str, Any]
    target: TargetSpec
    draft: DraftSpec
    mesh: Mesh
    program: Program
    optimiser: optax.GradientTransformation
    frozen: Frozen

    @property
    def draft_only(self) -> bool:
        return self.program.target is None

    def start(self) -> TrainState:
        """The state before the first step; the same each time."""
        tables = self.frozen.tables
        draft = assemble.draft_state(self.config, self.draft, self.target, tables, self.mesh, None)[1]
        return first_state(draft, self.optimiser, self.mesh, average=self.config.train.ema)

    def work(self, rows: int, length: int, supervised: float) -> Work:
        draft, steps = self.draft, self.config.draft.ttt_steps
        sizes = {name: getattr(draft, name) for name in ("width", "heads", "kv_heads", "head_dim", "mlp_width")}
        vocabularies = {"vocab": draft.target_vocab, "draft_vocab": draft.draft_vocab}
        return Work(rows, length, steps=steps, supervised=supervised, objective="ours", **sizes, **vocabularies)

    def read(self, work: Work) -> features.StoredFeatures:
        """The features of the work's rows, on the host, as a store keeps them exactly."""
        batch = jax.tree.map(jnp.asarray, batch_of(work))
        return jax.device_get(_stored(self.program, self.frozen, batch, slot_width(work, batch_of(work))))

    def without_target(self) -> WholeStep:
        """The step of a run whose features are all read."""
        return self._replace(program=self.program._replace(target=None), frozen=self.frozen._replace(target=None))

    def flops_needed(self, work: Work) -> float:
        """That the step cannot do without; of a draft alone, the teacher's logits over the draft's vocabulary only."""
        counts_KBT, taught_BT = live_of(work, batch_of(work))
        draft, taught, head = needed_flops(work, counts_KBT, taught_BT), int(taught_BT.sum()), 2.0 * work.width
        if self.draft_only:
            return draft - head * taught * (work.vocab - work.draft_vocab)
        # The target's own count has the logits of every position, the draft's those that teach.
        return draft + target_flops(self.model, work.rows, work.length) - head * work.rows * work.length * work.vocab


def build(config: RunConfig, model: dict[str, Any]) -> WholeStep:
    """The config's online step, for a target of random weights that config.json `model` describes.

    The draft's vocabulary is as large as the config says, or half the target's where that is smaller.

    Raises:
      UserError: where mesh and devices do not go together, or the target has no room.
    """
    spec, mesh = read_spec(model), assemble.mesh_of(config)
    target = random_target(spec, mesh, config.target)
    size = min(config.draft.vocab, spec.vocab // 2)
    ids_D = np.sort(np.random.default_rng(SEED).permutation(spec.vocab)[:size]).astype(np.int32)
    draft = draft_spec(config, spec, size, ())
    graphdef = nnx.split(nnx.eval_shape(lambda: Eagle3(draft, jnp.dtype(config.train.dtype), nnx.Rngs(0))))[0]
    program = make_program(config, draft, graphdef, mesh, target.graphdef, spec.logits)
    optimiser = make_optimiser(config.train, learning_rate(config.train, 1000), trained=program.trained)
    frozen = Frozen(target.state, assemble.make_tables(target, ids_D, mesh))
    return WholeStep(config, model, spec, draft, mesh, program, optimiser, frozen)


def batch_of(work: Work) -> Batch:
    """Rows of random tokens, one document each, on the host."""
    tokens_BT = np.random.default_rng(SEED).integers(0, work.vocab, (work.rows, work.length), dtype=np.int32)
    return make_batch(work)._replace(tokens_BT=tokens_BT)


@functools.partial(jax.jit, static_argnames=("program", "width"))
def _stored(program: Program, frozen: Frozen, batch: Batch, width: int) -> features.StoredFeatures:
    found = teacher_features(program, frozen, batch, live_slots(program, batch, width))
    kind = str(program.dtype)  # what products round them to anyway
    return features.encode_features(found, features.StoreFormat(kind, kind), {"taps": None, "last": None})
