"""A RoPE that jeagle's draft has not is refused, in the schemas of transformers 4 and 5, in both layouts."""

import pytest

from jeagle.errors import UserError
from jeagle.exchange import read_export
from tests.exchange.drafts import PLAIN, edit_config, to_sglang, to_vllm

ROPES = {
    "of each kind of layer": (
        {"full_attention": {"rope_theta": 9e5}, "sliding_attention": {"rope_theta": 1e4}},
        r"RoPE for each kind of layer \(full_attention, sliding_attention\)",
    ),
    "of a part of each head": (
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "partial_rotary_factor",
    ),
    "of a kind that nothing has": ({"rope_type": "spiral", "rope_theta": 1e4}, "RoPE scaling 'spiral'"),
    "that stands still": ({"rope_type": "linear", "factor": 0, "rope_theta": 1e4}, "factor 0; it must be above 0"),
    "of no length": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0, "rope_theta": 1e4},
        "original_max_position_embeddings 0; it must be above 0",
    ),
    "of base 0": ({"rope_type": "default", "rope_theta": 0}, "rope_theta 0; it must be above 0"),
    "divided by 0": (
        {"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 0, 2], "rope_theta": 1e4},
        "long_factor .* must be above 0",
    ),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])  # of transformers 5, and of 4
@pytest.mark.parametrize("write", [to_sglang, to_vllm])
def test_a_rope_that_the_draft_has_not_is_refused(rope, field, write, tmp_path):
    """Read as the plain one, it would turn every key by other angles than the draft was trained with."""
    parameters, named = ROPES[rope]

    def change(config):
        decoder = config.get("transformer_layer_config", config)
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            decoder.pop(name, None)
        decoder[field] = parameters

    folder = write(PLAIN, tmp_path / "draft")
    edit_config(folder, change)
    with pytest.raises(UserError, match=named):
        read_export(folder)
