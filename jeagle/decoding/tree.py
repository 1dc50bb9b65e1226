"""Draft trees: which tokens a draft proposes to continue a text, and which of them the target accepts.

A tree has N nodes. Node 0 is the last committed token; every other node is a drafted token that continues its parent. A
chain is the tree in which every node has one child. Nodes are numbered so that parents come before their children.

Source: EAGLE-2 (arXiv 2406.16858), sections 4.1 and 4.2, for trees that follow the draft's own confidence.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jeagle.errors import UserError
from jeagle.interfaces import CacheView


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """How much is drafted before each verification.

    Attributes:
      steps: forward passes of the draft, and the largest number of drafted tokens that can be accepted.
      top_k: tokens that are expanded at each step; 1 is a chain.
      verify: N, tokens that the target reads at once, the last committed one included. 0 = all that a chain has.

    Raises:
      UserError: for sizes that no tree can have.

    Source: the names are those of SGLang (speculative_num_steps, speculative_eagle_topk, speculative_num_draft_tokens).
    """

    steps: int
    top_k: int = 1
    verify: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.top_k) < 1:
            raise UserError(
                f"A draft of {self.steps} steps and top-k {self.top_k} has no tokens: both must be above 0."
            )
        if self.top_k == 1:
            if self.verify not in (0, self.steps + 1):
                raise UserError(
                    f"A chain of {self.steps} steps verifies {self.steps + 1} tokens, and not {self.verify}: give "
                    f"{self.steps + 1}, or a top-k above 1."
                )
            object.__setattr__(self, "verify", self.steps + 1)
        most = 1 + self.candidates
        if not 2 <= self.verify <= most:
            raise UserError(
                f"A tree of {self.steps} steps and top-k {self.top_k} can verify 2 to {most} tokens, not {self.verify}."
            )

    @property
    def candidates(self) -> int:
        """Number of tokens that the draft scores."""
        return self.top_k + (self.steps - 1) * self.top_k**2

    @property
    def expanded(self) -> int:
        """Number of drafted tokens that the draft itself reads."""
        return (self.steps - 1) * self.top_k

    @property
    def room(self) -> int:
        """Slots of a cache beyond the committed text that a round may write to."""
        return max(self.verify, self.expanded + 1, self.steps + 1) + 1


class Tree(NamedTuple):
    """The nodes of B trees.

    Attributes:
      tokens_BN: the token of each node.
      parents_BN: the parent of each node; 0 for node 0.
      ancestors_BNN: whether the second node is the first one or an ancestor of it.
    """

    tokens_BN: Int[Array, "B N"]
    parents_BN: Int[Array, "B N"]
    ancestors_BNN: Bool[Array, "B N N"]

    @property
    def depth_BN(self) -> Int[Array, "B N"]:
        """Number of ancestors of each node."""
        return self.ancestors_BNN.sum(axis=-1) - 1


def make_tree(tokens_BN: Int[Array, "B N"], parents_BN: Int[Array, "B N"], depth: int) -> Tree:
    """A tree of at most `depth` drafted tokens in a row, from its tokens and their parents."""
    batch, nodes = tokens_BN.shape
    ancestors_BNN = jnp.broadcast_to(jnp.eye(nodes, dtype=bool), (batch, nodes, nodes))
    for _ in range(depth):
        ancestors_BNN |= jnp.take_along_axis(ancestors_BNN, parents_BN[:, :, None], axis=1)
    return Tree(tokens_BN, parents_BN, ancestors_BNN)


def choose_nodes(
    root_B: Int[Array, " B"],
    tokens_BC: Int[Array, "B C"],
    parents_BC: Int[Array, "B C"],
    scores_BC: Float[Array, "B C"],
    shape: TreeShape,
) -> Tree:
    """The tree of the `shape.verify` - 1 best candidates.

    A candidate's score, the log-probability of the text down to it, is at most that of its parent, which has a lower
    number. Therefore the best candidates form a tree.

    Args:
      parents_BC: the candidate that each one continues; C where it continues the root.
    """
    batch, count = tokens_BC.shape
    _, best_BN = jax.lax.top_k(scores_BC, shape.verify - 1)
    best_BN = jnp.sort(best_BN, axis=1)
    rows = jnp.arange(batch)[:, None]
    numbers = jnp.broadcast_to(jnp.arange(1, shape.verify), best_BN.shape)
    number_of_BC = jnp.zeros((batch, count + 1), jnp.int32).at[rows, best_BN].set(numbers)
    parents_BN = jnp.take_along_axis(number_of_BC, jnp.take_along_axis(parents_BC, best_BN, axis=1), axis=1)
    tokens_BN = jnp.concatenate([root_B[:, None], jnp.take_along_axis(tokens_BC, best_BN, axis=1)], axis=1)
    return make_tree(tokens_BN, jnp.pad(parents_BN, ((0, 0), (1, 0))), shape.steps)


class Accepted(NamedTuple):
    """What the target accepts of B trees.

    Attributes:
      count_B: number of accepted drafted tokens.
      path_BS: the accepted nodes by depth, node 0 first: [B, steps + 1]; entries past `count_B` are arbitrary.
    """

    count_B: Int[Array, " B"]
    path_BS: Int[Array, "B S"]


def accept_path(tree: Tree, chosen_BN: Int[Array, "B N"], steps: int) -> Accepted:
    """Follows the tokens that the target chose after each node, from node 0 as far as the tree has them.

    Args:
      chosen_BN: the token that the target chose after each node, the most likely or a sampled one.
    """
    agrees_BN = tree.tokens_BN == jnp.take_along_axis(chosen_BN, tree.parents_BN, axis=1)
    agrees_BN = agrees_BN.at[:, 0].set(True)
    accepted_BN = ~(tree.ancestors_BNN & ~agrees_BN[:, None, :]).any(axis=-1)
    depth_BN = tree.depth_BN
    at_depth = accepted_BN[:, :, None] & (depth_BN[:, :, None] == jnp.arange(steps + 1))
    return Accepted(jnp.where(accepted_BN, depth_BN, 0).max(axis=1), jnp.argmax(at_depth, axis=1))


def tree_view(
    first_B: Int[Array, " B"],
    slots_BT: Int[Array, "B T"],
    depth_BM: Int[Array, "B M"],
    visible_BTM: Bool[Array, "B T M"],
    length: int,
) -> CacheView:
    """The view of a cache of `length` slots for T tokens of a tree, which is stored in M slots from `first_B` on.

    Args:
      depth_BM: position of each stored node after `first_B`.
      visible_BTM: which stored nodes each token attends to; it attends to all slots before them.
    """
    offset_BS = jnp.arange(length) - first_B[:, None]
    inside_BS = (offset_BS >= 0) & (offset_BS < depth_BM.shape[1])
    node_BS = jnp.clip(offset_BS, 0, depth_BM.shape[1] - 1)
    positions_BS = first_B[:, None] + jnp.where(inside_BS, jnp.take_along_axis(depth_BM, node_BS, axis=1), offset_BS)
    nodes_BTS = jnp.take_along_axis(visible_BTM, node_BS[:, None, :], axis=2)
    visible_BTS = jnp.where(inside_BS[:, None], nodes_BTS, offset_BS[:, None] < 0)
    return CacheView(slots_BT, positions_BS, visible_BTS)
