"""Llama-3.1-8B-Instruct with the settings that most published EAGLE-3 drafts have.

Command:   python -m jeagle.train --config configs/llama3_8b.py
Data:      conversations.jsonl, best the target's own answers (python -m jeagle.regenerate)
Hardware:  fits a TPU v5e:2x4, as the TPU compiler counts: 9.1 of 16 GiB on each chip with 8 rows of 2048 tokens
Cost:      not measured
Result:    not run yet
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
