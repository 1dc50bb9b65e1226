"""What bench's flags for chains and trees mean, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from jeagle.bench import BenchArguments, read_plans
from jeagle.decoding import Decoding, TreeShape
from jeagle.errors import UserError
from jeagle.runtime.sampling import Sampling


def plans(**more):
    return read_plans(BenchArguments(Path("runs/x"), **more))


def test_a_chain_by_default_and_a_list_of_chains_and_trees():
    assert plans(draft_tokens=5, batch=3) == [(3, Decoding(TreeShape(5)))]
    sampling = Sampling(1.0, 0.9, 20)
    made = plans(config_list=("1,3,1,4", "4,7,10,60"), temperature=1.0, top_p=0.9, top_k=20)
    assert made == [(1, Decoding(TreeShape(3), sampling)), (4, Decoding(TreeShape(7, 10, 60), sampling))]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"config_list": ("4,4",)}, "BATCH,STEPS,TOPK,VERIFY"),
        ({"config_list": ("4,a,1,5",)}, "BATCH,STEPS,TOPK,VERIFY"),
        ({"draft_tokens": 0}, "--batch and --draft-tokens"),
        ({"config_list": ("1,3,1,9",)}, "verifies 4 tokens"),
        ({"config_list": ("1,2,2,9",)}, "2 to 7 tokens"),
        ({"config_list": ("1,2,2,5",), "rule": "rejection"}, "judges chains"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_sizes_that_cannot_be_are_refused(more, said):
    with pytest.raises(UserError, match=said):
        plans(**more)
