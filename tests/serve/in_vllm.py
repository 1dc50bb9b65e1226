"""Runs in vLLM's environment: python in_vllm.py JOBS, one JSON job a line; prints one JSON answer a line.

Job: target, draft (folders), draft_tokens, max_new_tokens, max_model_len, prompts (lists of token ids).
Answer: tokens of each prompt, vLLM's counters for each prompt served alone and for all of them served together; or
`failed`, with vLLM's message. This script imports nothing of jeagle.

Each job runs in a fork of one process that has imported vLLM, so that no job leaves anything behind for the next one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; its default takes a share of the whole machine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose counters are read
    "VLLM_LOGGING_LEVEL": "ERROR",
}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}
SIDE_BY_SIDE = 4  # sequences of a batch when all prompts are served together


def main(path: Path) -> None:
    os.environ.update(SETTINGS)
    import vllm  # noqa: F401  # once, before the forks

    for line in path.read_text().splitlines():
        print(json.dumps(in_a_fork(json.loads(line))), flush=True)


def in_a_fork(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what vLLM prints must not come between the answers
            try:
                answer.write_text(json.dumps(serve(job)))
            except BaseException as error:
                answer.write_text(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
            os._exit(0)  # without finalisers, because the parent still uses what the fork shares with it
        _, status = os.waitpid(child, 0)
        if not answer.is_file():
            return {"failed": f"vLLM's process ended with status {status}"}
        return json.loads(answer.read_text())


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    drafting = {"method": "eagle3", "model": job["draft"], "num_speculative_tokens": job["draft_tokens"]}
    model = LLM(
        job["target"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,  # otherwise nothing is counted
        enable_prefix_caching=False,
        max_model_len=job["max_model_len"],
        max_num_seqs=SIDE_BY_SIDE,
        # No prompt is cut: behind a cut vLLM's draft reads the prompt's last token where the next one belongs.
        max_num_batched_tokens=SIDE_BY_SIDE * job["max_model_len"],
        gpu_memory_utilization=0.05,
        speculative_config=drafting,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"], ignore_eos=True, detokenize=False)

    def answers(prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
        before = counters(model)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = [list(o.outputs[0].token_ids) for o in model.generate(given, greedy, use_tqdm=False)]
        after = counters(model)
        by_position = [a - b for a, b in zip(after.pop("by_position"), before.pop("by_position"), strict=True)]
        return found, {name: after[name] - before[name] for name in after} | {"by_position": by_position}

    alone = [answers([prompt]) for prompt in job["prompts"]]
    tokens, together = answers(job["prompts"])
    return {
        "tokens": [found[0] for found, _ in alone],
        "alone": [counted for _, counted in alone],
        "tokens_together": tokens,
        "together": together,
    }


def counters(model: Any) -> dict[str, Any]:
    """Returns vLLM's counters since its start."""
    found = {metric.name: metric for metric in model.get_metrics()}
    counted: dict[str, Any] = {}
    for name, theirs in COUNTERS.items():
        metric = found[theirs]
        counted[name] = list(metric.values) if name == "by_position" else metric.value
    return counted


if __name__ == "__main__":
    main(Path(sys.argv[1]))
