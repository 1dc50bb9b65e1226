"""The decoder that runs every target family: its layers, how they are stacked, and the scan over them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jeagle.interfaces import CacheView
from jeagle.layers import GATES, AttentionMask, Dense, Linear, depends_on_length, matmul, rms_norm
from jeagle.runtime.mesh import by_rows
from jeagle.targets.model.attention import BuildOptions, GroupedQueryAttention, KVCache, LatentAttention, TokenContext
from jeagle.targets.model.gated_delta import GatedDelta, RecurrentCache
from jeagle.targets.model.moe import MoE
from jeagle.targets.model.spec import AttentionSpec, BlockSpec, DeltaSpec, LatentSpec, TargetSpec

Caches = tuple[Any, ...]
MIXERS: dict[type, Any] = {AttentionSpec: GroupedQueryAttention, LatentSpec: LatentAttention, DeltaSpec: GatedDelta}


class Block(nnx.Module):
    """x -> x + mixer(norm(x)) -> x + mlp(norm(x)), with the norms that `BlockSpec` names."""

    def __init__(self, spec: BlockSpec, target: TargetSpec, build: BuildOptions):
        width, eps = target.width, target.norm_eps

        def norm() -> nnx.Param:
            return nnx.Param(jnp.ones(width))

        if spec.norms in ("pre", "both"):
            self.before_mixer, self.before_mlp = norm(), norm()
        if spec.norms in ("post", "both"):
            self.after_mixer, self.after_mlp = norm(), norm()
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, width, eps, build)
        if (mlp := spec.mlp) is not None:
            options = {"activation": mlp.activation, "bias": mlp.bias, "stored": build.stored}
            self.mlp = Dense(width, mlp.width, build.dtype, build.rngs, **options)
        if spec.experts is not None:
            self.moe = MoE(spec.experts, width, eps, build)
        if spec.mlp is not None and spec.experts is not None:
            self.after_dense, self.before_experts, self.after_experts = norm(), norm(), norm()
        if spec.per_layer_width:
            self.per_layer_gate = build.linear(width, spec.per_layer_width)
            self.per_layer_out = build.linear(spec.per_layer_width, width)
            self.per_layer_norm = norm()
        if spec.scaled:
            self.output_scale = nnx.Param(jnp.ones(1))
        self.spec, self.eps = spec, eps

    def __call__(self, x: jax.Array, context: TokenContext, cache: Any, shared: dict, per_layer_BTP: Any):
        """x [B, T, H] -> (x, the mixer's new cache, the keys and values that later layers may read, by name).

        Args:
          shared: the keys and values that earlier layers share with later ones, by name.
          per_layer_BTP: this layer's part of Gemma 4's per-layer inputs; None without them.
        """

        def norm(name: str, x: jax.Array) -> jax.Array:
            return rms_norm(x, getattr(self, name)[...], self.eps) if hasattr(self, name) else x

        mixed, cache, keys_values = self.mixer(norm("before_mixer", x), context, cache, shared)
        x = x + norm("after_mixer", mixed) * self.spec.residual
        normed = norm("before_mlp", x)
        if self.spec.experts is None:
            out = self.mlp(normed)
        elif self.spec.mlp is None:
            out = self.moe(normed, normed)
        else:
            out = norm("after_dense", self.mlp(normed))
            out = out + norm("after_experts", self.moe(norm("before_experts", x), x))
        x = x + norm("after_mlp", out) * self.spec.residual
        if self.spec.per_layer_width:
            assert self.spec.mlp is not None
            gated = GATES[self.spec.mlp.activation](self.per_layer_gate(x), per_layer_BTP)
            x = x + norm("per_layer_norm", self.per_layer_out(gated))
        shares = getattr(self.spec.mixer, "share_kv_as", "")
        return (x * self.output_scale[...] if self.spec.scaled else x), cache, {shares: keys_values} if shares else {}


class LayerGroup(NamedTuple):
    """Layers of one shape, whose weights are stacked; `layers` are their numbers."""

    block: BlockSpec
    layers: tuple[int, ...]


Run = tuple[LayerGroup, ...]
"""A short pattern of layers that repeats, one group for each layer of the pattern."""


def repeating_runs(blocks: tuple[BlockSpec, ...], longest: int = 12) -> tuple[Run, ...]:
    """Divides the layers into few runs, so that each pattern is compiled once and scanned over.

    Gemma 3's 26 layers, with five windowed layers to each full one, are a run of a pattern of 6 layers that repeats
    four times, and a run of one layer that repeats twice. Dynamic programming finds the runs with the fewest pattern
    layers in total and, among those, the fewest runs.

    Args:
      longest: of a pattern, in layers.
    """
    total = len(blocks)
    # For the layers from each one on: (pattern layers, runs, period and repeats of the first run) of the best division.
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (total + 1)
    for start in reversed(range(total)):
        options = []
        for period in range(1, min(longest, total - start) + 1):
            pattern, repeats = blocks[start : start + period], 1
            while blocks[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            for times in {1, repeats}:
                rest = best[start + period * times]
                options.append((period + rest[0], 1 + rest[1], period, times))
        best[start] = min(options)
    runs, start = [], 0
    while start < total:
        _, _, period, times = best[start]
        end = start + period * times
        runs.append(tuple(LayerGroup(blocks[i], tuple(range(i, end, period))) for i in range(start, start + period)))
        start = end
    return tuple(runs)


class PerLayerInputs(nnx.Module):
    """Gemma 4's second embedding: a vector [P] for each token and layer, added to a projection of the first one."""

    def __init__(self, spec: TargetSpec, build: BuildOptions):
        self.width = spec.blocks[0].per_layer_width
        total = spec.layers * self.width
        self.embed = nnx.Param(nnx.initializers.normal(0.02)(build.rngs.params(), (spec.per_layer_vocab, total)))
        self.proj = Linear(spec.width, total, build.dtype, build.rngs)
        self.norm = nnx.Param(jnp.ones(self.width))
        self.eps, self.dtype = spec.norm_eps, build.dtype

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Tokens [B, T] and their embeddings x [B, T, H] -> [L, B, T, P]."""
        scale = jnp.asarray(self.width**0.5, self.dtype).astype(jnp.float32)
        own = self.embed[...][tokens].astype(jnp.float32) * scale
        projected = self.proj(x) * x.shape[-1] ** -0.5
        shape = (*tokens.shape, -1, self.width)
        both = rms_norm(projected.reshape(shape), self.norm[...], self.eps) + own.reshape(shape)
        return jnp.moveaxis(both * 2**-0.5, 2, 0)


class Decoder(nnx.Module):
    """Embedding, L layers, final norm and lm_head.

    The residual stream is float32; matrix products are in `dtype`. Layers of one shape are stacked and scanned over,
    so that compile time does not grow with depth. With `stacked` false they are separate and unrolled, because XLA's
    CPU backend copies every slice of a stacked bfloat16 weight, which makes it several times slower.

    Attributes:
      blocks: one module for each group of `groups`; its parameters have a leading axis where layers are stacked.
    """

    def __init__(
        self, spec: TargetSpec, dtype: Any, rngs: nnx.Rngs, *, stacked: bool, stored: Any = None, mesh: Any = None
    ):
        init = nnx.initializers.normal(0.02)
        build = BuildOptions(dtype, rngs, stored, mesh)
        self.embed_tokens = nnx.Param(init(rngs.params(), (spec.vocab, spec.width)))
        one_by_one = tuple((LayerGroup(block, (i,)),) for i, block in enumerate(spec.blocks))
        self.runs = repeating_runs(spec.blocks) if stacked else one_by_one

        def make_block(group: LayerGroup) -> Block:
            if not stacked:
                return Block(group.block, spec, build)
            one = lambda rngs: Block(group.block, spec, build._replace(rngs=rngs))  # noqa: E731
            return nnx.vmap(one, in_axes=(0,), out_axes=0)(rngs.split(len(group.layers)))

        self.blocks = nnx.List([make_block(group) for group in self.groups])
        self.norm = nnx.Param(jnp.ones(spec.width))
        if not spec.tied:
            self.lm_head = nnx.Param(init(rngs.params(), (spec.vocab, spec.width)))
        if spec.per_layer_vocab:
            self.per_layer = PerLayerInputs(spec, build)
        self.spec, self.dtype, self.stacked, self.mesh = spec, dtype, stacked, mesh
        ropes = [getattr(block.mixer, "rope", None) for block in spec.blocks]
        self.needs_lengths = any(rope is not None and depends_on_length(rope) for rope in ropes)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups of all runs, in the order of `blocks`."""
        return tuple(group for run in self.runs for group in run)

    def head_rows(self) -> Float[Array, "V H"]:
        """The rows of lm_head, which are the embedding's where the two are tied."""
        return self.embed_tokens[...] if self.spec.tied else self.lm_head[...]

    def logits(self, last: Float[Array, "*B H"], head: Float[Array, "V H"] | None = None) -> Float[Array, "*B V"]:
        """float32 logits of states after the final norm; `head` replaces `head_rows`."""
        rows = self.head_rows() if head is None else head
        return self.spec.logits(matmul(last, rows, self.dtype, by_rows=True))

    def embed(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B H"]:
        """float32 embeddings, multiplied by the family's scale."""
        x = self.embed_tokens[...][tokens].astype(jnp.float32)
        scale = self.spec.embed_scale
        return x * jnp.asarray(scale, self.dtype).astype(jnp.float32) if scale != 1.0 else x

    def final_norm(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """The norm between the last layer and lm_head."""
        return rms_norm(x, self.norm[...], self.spec.norm_eps)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        aux_layers: tuple[int, ...],
    ) -> tuple[Float[Array, "B T A H"] | None, Float[Array, "B T H"]]:
        """Runs packed rows; a token attends to the tokens of its own segment up to itself.

        Args:
          aux_layers: layer boundaries, 0 (embeddings) to L (after the last layer).

        Returns:
          (float32 residual streams at `aux_layers`, None if there are none; float32 states after the final norm).
        """
        tokens, positions, segments = (by_rows(array, self.mesh) for array in (tokens, positions, segments))
        lengths = None
        if self.needs_lengths:
            same = segments[:, :, None] == segments[:, None, :]
            lengths = jnp.where(same, positions[:, None, :], 0).max(axis=-1) + 1
        mask = AttentionMask(positions, positions, segments, segments)
        x, aux, _ = self._through_layers(tokens, TokenContext(positions, segments, mask, lengths), None, aux_layers)
        return aux, self.final_norm(x)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Caches,
        aux_layers: tuple[int, ...],
        count_B: Int[Array, " B"] | None = None,
        view: CacheView | None = None,
    ) -> tuple[Float[Array, "B T A H"] | None, Float[Array, "B T H"], Caches]:
        """Runs tokens after those of the cache, in which their keys and values are written at `positions`.

        A token attends to every cached position up to its own. Positions that hold rejected tokens are overwritten
        before any token attends to them.

        Args:
          positions: rise by one along each row, unless there is a view.
          count_B: the number of real tokens in each row, which come first; None = all. A recurrent state needs it;
            attention does not, since whatever follows is overwritten.
          view: slots and visible keys of the tokens of a tree; only for a model without recurrent layers.

        Returns:
          (as `forward`, as `forward`, the new cache).
        """
        length = next((c.keys.shape[-3] for c in cache if isinstance(c, KVCache)), tokens.shape[1])
        keys = jnp.broadcast_to(jnp.arange(length), (tokens.shape[0], length))
        lengths = None
        if self.needs_lengths:
            total = positions[:, 0] + (tokens.shape[1] if count_B is None else count_B)
            lengths = jnp.broadcast_to(total[:, None], positions.shape)
        mask, slots = AttentionMask(positions, keys), None
        if view is not None:
            mask, slots = AttentionMask(positions, view.key_positions_BS, also_BTS=view.visible_BTS), view.slots_BT
            lengths = positions + 1 if self.needs_lengths else None
        context = TokenContext(positions, None, mask, lengths, count_B, slots)
        x, aux, cache = self._through_layers(tokens, context, cache, aux_layers)
        return aux, self.final_norm(x), cache

    def empty_cache(self, rows: int, length: int, dtype: Any, rollback: int = 0) -> Caches:
        """Empty caches of all layer groups, for `rows` sequences of up to `length` tokens.

        Args:
          rollback: number of tokens by which a row may go back when a draft is rejected; only recurrent states use it.
        """
        caches = []
        for group, block in zip(self.groups, self.blocks, strict=True):
            lead = (len(group.layers),) if self.stacked else ()
            one = block.mixer.empty(rows, length, dtype, rollback)
            caches.append(jax.tree.map(lambda x, lead=lead: jnp.broadcast_to(x, (*lead, *x.shape)), one))
        return tuple(caches)

    def move_slots(self, cache: Caches, from_BN: Int[Array, "B N"], to_BN: Int[Array, "B N"]) -> Caches:
        """Copies keys and values between slots of each row, as the accepted path of a tree needs it."""
        lead = (slice(None),) if self.stacked else ()
        rows = jnp.arange(from_BN.shape[0])[:, None]
        return jax.tree.map(lambda x: x.at[(*lead, rows, to_BN)].set(x[(*lead, rows, from_BN)]), cache)

    def admit(self, cache: Caches, fresh: Caches, rows_R: Int[Array, " R"]) -> Caches:
        """Replaces the rows `rows_R` of `cache` by those of `fresh`, which may be shorter; rows out of range are
        dropped."""
        lead = (slice(None),) if self.stacked else ()

        def put(old: Any, new: Any) -> Any:
            slots = () if isinstance(old, RecurrentCache) else (slice(new.keys.shape[-3]),)
            return jax.tree.map(lambda a, b: a.at[(*lead, rows_R, *slots)].set(b, mode="drop"), old, new)

        return tuple(None if old is None else put(old, new) for old, new in zip(cache, fresh, strict=True))

    def _through_layers(self, tokens: jax.Array, context: TokenContext, cache: Caches | None, aux_layers: tuple):
        """-> (x after all layers, aux hidden states [B, T, A, H], the new cache of each group)."""
        x = self._split_by_rows(self.embed(tokens), context)
        extra = self.per_layer(tokens, x) if self.spec.per_layer_vocab else None
        aux, shared = {0: x}, {}
        new_caches: list[Any] = []
        for run in self.runs:
            groups = slice(len(new_caches), len(new_caches) + len(run))
            blocks = list(self.blocks)[groups]
            caches = [None] * len(run) if cache is None else list(cache[groups])
            if self.stacked:
                x, new = self._scan(run, blocks, x, context, caches, shared, extra, aux_layers, aux)
            else:
                number = run[0].layers[0]
                own = None if extra is None else extra[number]
                x, one, shares = blocks[0](x, context, caches[0], shared, own)
                x, new = self._split_by_rows(x, context), [one]
                aux[number + 1] = x
                shared |= shares
            new_caches += new
        wanted = [aux[layer] for layer in aux_layers]
        return x, jnp.stack(wanted, axis=2) if aux_layers else None, tuple(new_caches)

    def _split_by_rows(self, x: jax.Array, context: TokenContext) -> jax.Array:
        """Splits packed rows over devices by rows; left to itself, the compiler would split them as the weights are."""
        return x if context.segments_BT is None else by_rows(x, self.mesh)

    def _scan(self, run, blocks, x, context, caches, shared, extra, aux_layers, aux):
        """Scans over the repeats of one run of layers; adds its aux hidden states to `aux` and its keys and values to
        `shared`."""
        parts = [nnx.split(block) for block in blocks]
        inside = [layer for layer in aux_layers if any(layer - 1 in group.layers for group in run)]
        # A slot for each aux layer in this run, and a last one that all other layers overwrite.
        buffer = jnp.zeros((len(inside) + 1, *x.shape), x.dtype)
        slots = [[inside.index(i + 1) if i + 1 in inside else len(inside) for i in group.layers] for group in run]
        extras = None if extra is None else [extra[jnp.array(group.layers)] for group in run]
        before = dict(shared)

        def repeat(carry, inputs):
            x, buffer = carry
            states, slot, cache, own = inputs
            new, shared_here = [], {}
            for j, (graphdef, _) in enumerate(parts):
                block = nnx.merge(graphdef, states[j])
                x, one, shares = block(x, context, cache[j], before | shared_here, None if own is None else own[j])
                x = self._split_by_rows(x, context)
                buffer = jax.lax.dynamic_update_index_in_dim(buffer, x, slot[j], 0)
                new.append(one)
                shared_here |= shares
            return (x, buffer), (new, shared_here)

        inputs = ([state for _, state in parts], [jnp.array(s, jnp.int32) for s in slots], caches, extras)
        (x, buffer), (new, shared_here) = jax.lax.scan(repeat, (x, buffer), inputs)
        aux.update({layer: buffer[slot] for slot, layer in enumerate(inside)})
        shared.update({name: jax.tree.map(lambda a: a[-1], pair) for name, pair in shared_here.items()})
        return x, new
