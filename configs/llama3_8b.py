"""Llama-3.1-8B-Instruct, the recipe that most published EAGLE-3 drafts follow.

python -m jeagle.train --config configs/llama3_8b.py
"""

from jeagle.config import DataConfig, DraftConfig, MeshConfig, RunConfig, TargetConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        name="llama3_8b",
        target=TargetConfig(ref="meta-llama/Llama-3.1-8B-Instruct"),
        data=DataConfig(source="conversations.jsonl", row_length=2048),
        draft=DraftConfig(vocab=32000, ttt_steps=7),
        train=TrainConfig(epochs=2, batch_rows=8, learning_rate=1e-4, save_every=1000),
        mesh=MeshConfig(fsdp=-1, tensor=1),
        trackers=("tensorboard",),
    )
