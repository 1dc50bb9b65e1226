"""The decoder that every target family is run by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jeagle.layers import Linear, Sight, depends_on_length, matmul, rms_norm
from jeagle.runtime.mesh import by_rows
from jeagle.targets.model.block import Block
from jeagle.targets.model.build import Build
from jeagle.targets.model.gated_delta import Recurrent
from jeagle.targets.model.spec import TargetSpec
from jeagle.targets.model.stacks import Group, runs
from jeagle.targets.model.view import Cache, View

Caches = tuple[Any, ...]


class PerLayer(nnx.Module):
    """Gemma 4's second embedding: a few numbers for each token and layer, beside a projection of the first one."""

    def __init__(self, spec: TargetSpec, build: Build):
        self.width = spec.blocks[0].per_layer_width
        total = spec.layers * self.width
        self.embed = nnx.Param(nnx.initializers.normal(0.02)(build.rngs.params(), (spec.per_layer_vocab, total)))
        self.proj = Linear(spec.width, total, build.dtype, build.rngs)
        self.norm = nnx.Param(jnp.ones(self.width))
        self.eps, self.dtype = spec.norm_eps, build.dtype

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """-> [L, B, T, P]."""
        scale = jnp.asarray(self.width**0.5, self.dtype).astype(jnp.float32)
        own = self.embed[...][tokens].astype(jnp.float32) * scale
        projected = self.proj(x) * x.shape[-1] ** -0.5
        shape = (*tokens.shape, -1, self.width)
        both = rms_norm(projected.reshape(shape), self.norm[...], self.eps) + own.reshape(shape)
        return jnp.moveaxis(both * 2**-0.5, 2, 0)


class Decoder(nnx.Module):
    """Embedding, L layers, final norm, lm_head.

    The residual stream is float32; matrix products are in `dtype`. Layers of one shape are stacked and scanned over,
    so that compile time does not grow with depth, or (`stacked` false) separate and unrolled: XLA's CPU backend copies
    every slice of a stacked bfloat16 weight, which makes it several times slower than separate ones.

    Attributes:
      blocks: one module for each group of `groups`, its parameters with a leading axis where stacked.
    """

    def __init__(
        self,
        spec: TargetSpec,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        stacked: bool,
        stored: Any = None,
        mesh: Any = None,
    ):
        init = nnx.initializers.normal(0.02)
        build = Build(dtype, rngs, stored, mesh)
        self.embed_tokens = nnx.Param(init(rngs.params(), (spec.vocab, spec.width)))
        self.runs = runs(spec.blocks) if stacked else tuple((Group(b, (i,)),) for i, b in enumerate(spec.blocks))
        self.blocks = nnx.List([self._block(group, spec, build, stacked) for run in self.runs for group in run])
        self.norm = nnx.Param(jnp.ones(spec.width))
        if not spec.tied:
            self.lm_head = nnx.Param(init(rngs.params(), (spec.vocab, spec.width)))
        if spec.per_layer_vocab:
            self.per_layer = PerLayer(spec, build)
        self.spec, self.dtype, self.stacked, self.mesh = spec, dtype, stacked, mesh

    @staticmethod
    def _block(group: Group, spec: TargetSpec, build: Build, stacked: bool) -> Block:
        if not stacked:
            return Block(group.block, spec, build)

        def one(rngs: nnx.Rngs) -> Block:
            return Block(group.block, spec, Build(build.dtype, rngs, build.stored, build.mesh))

        return nnx.vmap(one, in_axes=(0,), out_axes=0)(build.rngs.split(len(group.layers)))

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for run in self.runs for group in run)

    def head_rows(self) -> jax.Array:
        """lm_head as rows [V, H]; the embedding where they are tied."""
        return self.embed_tokens[...] if self.spec.tied else self.lm_head[...]

    def logits(self, last: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """float32 logits [..., V] of states that the final norm has seen; `head` stands for `head_rows`."""
        rows = self.head_rows() if head is None else head
        return self.spec.logits(matmul(last, rows, self.dtype, True))

    def embed(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_tokens[...][tokens].astype(jnp.float32)
        scale = self.spec.embed_scale
        return x * jnp.asarray(scale, self.dtype).astype(jnp.float32) if scale != 1.0 else x

    def final_norm(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm[...], self.spec.norm_eps)

    def forward(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array, aux_layers: tuple[int, ...]):
        """Packed rows [B, T] -> (taps [B, T, A, H], last [B, T, H] after the final norm).

        A token sees the tokens of its own segment up to itself.
        """
        tokens, positions, segments = (by_rows(array, self.mesh) for array in (tokens, positions, segments))
        lengths = None
        if self._needs_lengths():
            same = segments[:, :, None] == segments[:, None, :]
            lengths = jnp.where(same, positions[:, None, :], 0).max(axis=-1) + 1
        view = View(positions, segments, Sight(positions, positions, segments, segments), lengths)
        x, aux, _ = self._through_layers(tokens, view, None, aux_layers)
        return aux, self.final_norm(x)

    def extend(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Caches,
        aux_layers: tuple[int, ...],
        count_B: jax.Array | None = None,
    ):
        """Tokens [B, T] at their positions, seen after what the cache holds -> (taps, last, cache).

        Positions rise by one along a row. Keys and values are written at `positions`; a token sees every cached
        position up to its own. Positions that were written for tokens since rejected are seen by nobody before they
        are written anew.

        Args:
          count_B: how many tokens of each row are real, the first ones; None = all. Attention does not need it (what
            lies behind is overwritten), a recurrent state does.
        """
        length = next((c.keys.shape[-3] for c in cache if isinstance(c, Cache)), tokens.shape[1])
        keys = jnp.broadcast_to(jnp.arange(length), (tokens.shape[0], length))
        lengths = None
        if self._needs_lengths():
            read = positions[:, 0] + (tokens.shape[1] if count_B is None else count_B)
            lengths = jnp.broadcast_to(read[:, None], positions.shape)
        view = View(positions, None, Sight(positions, keys), lengths, count_B)
        x, aux, cache = self._through_layers(tokens, view, cache, aux_layers)
        return aux, self.final_norm(x), cache

    def empty_cache(self, rows: int, length: int, dtype: Any, rollback: int = 0) -> Caches:
        """Room for `rows` sequences of up to `length` tokens, for each group of layers.

        Args:
          rollback: by how many tokens a row may go back, as rejected drafts make it do; only recurrent states need to
            know.
        """

        def one(group: Group, block: Block) -> Any:
            empty = block.mixer.empty(rows, length, dtype, rollback)
            lead = (len(group.layers),) if self.stacked else ()
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), empty)

        return tuple(one(group, block) for group, block in zip(self.groups, self.blocks, strict=True))

    def admit(self, cache: Caches, fresh: Caches, places_R: jax.Array) -> Caches:
        """`cache` with the rows `places_R` replaced by those of `fresh`, which may be shorter; rows out of range are
        dropped."""
        lead = (slice(None),) if self.stacked else ()

        def place(old: Any, new: Any) -> Any:
            if isinstance(old, Recurrent):
                return jax.tree.map(lambda a, b: a.at[(*lead, places_R)].set(b, mode="drop"), old, new)
            width = slice(new.keys.shape[-3])
            return jax.tree.map(lambda a, b: a.at[(*lead, places_R, width)].set(b, mode="drop"), old, new)

        return tuple(None if old is None else place(old, new) for old, new in zip(cache, fresh, strict=True))

    def _through_layers(self, tokens: jax.Array, view: View, cache: Caches | None, aux_layers: tuple[int, ...]):
        """-> (x after all layers, taps [B, T, A, H], what each group keeps)."""
        x = self._by_rows(self.embed(tokens), view)
        extra = self.per_layer(tokens, x) if self.spec.per_layer_vocab else None
        aux, shared = {0: x}, {}
        kept: list[Any] = []
        for run, blocks in self._run_blocks():
            caches = [None] * len(run) if cache is None else list(cache[len(kept) : len(kept) + len(run)])
            if self.stacked:
                x, new = self._scan(run, blocks, x, view, caches, shared, extra, aux_layers, aux)
            else:
                number = run[0].layers[0]
                own = None if extra is None else extra[number]
                x, one, pair = blocks[0](x, view, caches[0], shared, own)
                x, new = self._by_rows(x, view), [one]
                aux[number + 1] = x
                if name := getattr(run[0].block.mixer, "keep_as", ""):
                    shared[name] = pair
            kept += new
        found = [aux[tap] for tap in aux_layers]
        return x, jnp.stack(found, axis=2) if aux_layers else None, tuple(kept)

    def _by_rows(self, x: jax.Array, view: View) -> jax.Array:
        """Packed rows stay split by rows: left to itself, the compiler follows the weights' split."""
        return x if view.segments_BT is None else by_rows(x, self.mesh)

    def _needs_lengths(self) -> bool:
        ropes = (getattr(block.mixer, "rope", None) for block in self.spec.blocks)
        return any(rope is not None and depends_on_length(rope) for rope in ropes)

    def _run_blocks(self):
        start = 0
        for run in self.runs:
            yield run, list(self.blocks)[start : start + len(run)]
            start += len(run)

    def _scan(self, run, blocks, x, view, caches, shared, extra, aux_layers, aux):
        """One run of layers under a scan over its repeats; taps and shared keys and values are put where they go."""
        parts = [nnx.split(block) for block in blocks]
        inside = [tap for tap in aux_layers if any(tap - 1 in group.layers for group in run)]
        # A place for each tap inside, and a last one that untapped layers overwrite.
        room = jnp.zeros((len(inside) + 1, *x.shape), x.dtype)
        places = [[inside.index(i + 1) if i + 1 in inside else len(inside) for i in group.layers] for group in run]
        extras = None if extra is None else [extra[jnp.array(group.layers)] for group in run]
        before = dict(shared)

        def repeat(carry, inputs):
            x, room = carry
            states, place, kept, own = inputs
            new, pairs = [], {}
            for j, (graphdef, _) in enumerate(parts):
                block = nnx.merge(graphdef, states[j])
                x, one, pair = block(x, view, kept[j], before | pairs, None if own is None else own[j])
                x = self._by_rows(x, view)
                room = jax.lax.dynamic_update_index_in_dim(room, x, place[j], 0)
                new.append(one)
                if name := getattr(run[j].block.mixer, "keep_as", ""):
                    pairs[name] = pair
            return (x, room), (new, pairs)

        inputs = ([state for _, state in parts], [jnp.array(p, jnp.int32) for p in places], caches, extras)
        (x, room), (new, pairs) = jax.lax.scan(repeat, (x, room), inputs)
        aux.update({tap: room[place] for place, tap in enumerate(inside)})
        shared.update({name: jax.tree.map(lambda a: a[-1], pair) for name, pair in pairs.items()})
        return x, new
