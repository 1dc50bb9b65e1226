"""FLOPs that a draft's training step cannot do without, from the mask alone; what a step counts more is waste.

A multiply-add is two FLOPs; a product's backward pass is twice its forward pass where both operands need a gradient.
Needed are:

- the teacher's logits over the whole vocabulary at positions that teach a counting slot;
- fc, and keys and values of step 0, at every position that a later counting slot looks back on;
- queries, output, MLP, and own keys and values of step k, at slots that count at step k or later;
- the draft's lm_head at slots that count at step k;
- causal attention: t + 1 keys of step 0 and k own ones for slot t at step k.

The taps and the embedding are data: fc's input and the embedding's half of the first layer's input need no gradient.
"""

from __future__ import annotations

import numpy as np

from benchmarks.works import Work


def needed_flops(work: Work, counts_KBT: np.ndarray, taught_BT: np.ndarray) -> float:
    """Forward and backward FLOPs of the step.

    Args:
      counts_KBT: which slots count at which step. taught_BT: positions that teach some counting slot.
    """
    width, mlp = work.width, work.mlp_width
    query, key = work.heads * work.head_dim, work.kv_heads * work.head_dim
    needed_KBT = np.flip(np.logical_or.accumulate(np.flip(counts_KBT, 0), axis=0), 0)
    run_K, slots = needed_KBT.sum(axis=(1, 2)), int(counts_KBT.sum())
    ran = int(run_K.sum())
    length = counts_KBT.shape[2]
    past = int((length - np.argmax(np.flip(needed_KBT[0], 1), axis=1))[needed_KBT[0].any(axis=1)].sum())
    seen = (np.arange(length) + 1)[None, None] + np.arange(len(run_K))[:, None, None]
    keys_seen = int((needed_KBT * seen).sum())

    fc = 2 * past * 3 * width * width
    keys_values = 2 * (past + int(run_K[1:].sum())) * 2 * width * 2 * key
    queries, out = 2 * ran * 2 * width * query, 2 * ran * query * width
    attention = 2 * 2 * keys_seen * query
    feed_forward = 2 * ran * 3 * width * mlp
    head = 2 * slots * width * work.draft_vocab
    teacher = 2 * int(taught_BT.sum()) * width * work.vocab
    return float(2 * fc + 2.5 * (keys_values + queries) + 3 * (out + attention + feed_forward + head) + teacher)
