"""Rows with the real schema of each named data set, their texts written for this project."""

from __future__ import annotations

import json
from typing import Any

QUESTION, ANSWER = "Which bird is red?", "The cardinal is red."
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

ROWS: dict[str, dict[str, Any]] = {
    "sharegpt": {"id": "QWJhYvA_0", "conversations": SHAREGPT},
    "ultrachat": {"prompt": QUESTION, "prompt_id": "f0e37e9f7800", "messages": CHAT},
    "perfectblend": {"conversations": SHAREGPT, "source": "meta-math/MetaMathQA"},
    "open-perfectblend": {"conversations": SHAREGPT, "source": "HuggingFaceH4/ultrachat_200k"},
    "magpie": {
        "uuid": "b0a2e5a3",
        "instruction": QUESTION,
        "response": ANSWER,
        "conversations": SHAREGPT,
        "gen_input_configs": {
            "temperature": 1.0,
            "top_p": 1.0,
            "input_generator": "Qwen2.5-72B-Instruct",
            "seed": None,
        },
        "intent": "The user wants to know",
        "knowledge": "birds",
        "difficulty": "easy",
        "input_quality": "good",
        "task_category": "Information seeking",
        "language": "EN",
    },
    "opencodeinstruct": {
        "id": "3b1c",
        "input": QUESTION,
        "output": ANSWER,
        "domain": "generic",
        "generation_algorithm": "self-instruct",
        "llm_judgement": '{"requirement_conformance": {"score": 5}}',
        "unit_tests": '["assert True"]',
        "tests_execution_status": '["pass"]',
        "average_test_score": 1.0,
    },
    "gsm8k": {"question": QUESTION, "answer": ANSWER},
    "infinity-instruct": {
        "id": "1234",
        "conversations": SHAREGPT,
        "label": {"ability_en": ["reading"], "ability_zh": [], "cate_ability_en": ["language"], "cate_ability_zh": []},
        "langdetect": "en",
        "source": "code_exercises",
    },
    "nemotron": {
        "uuid": "a5c1",
        "license": "cc-by-4.0",
        "generator": "Qwen3-235B-A22B",
        "version": "v2",
        "category": "chat",
        "reasoning": "on",
        "messages": [
            {"role": "system", "content": "", "tool_calls": []},
            CHAT[0] | {"tool_calls": []},
            {"role": "assistant", "content": f"<think>\nLet me see.\n</think>\n\n{ANSWER}", "tool_calls": []},
        ],
        "metadata": json.dumps({"conversation_id": None}),
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "column messages": {"messages": CHAT},
    "column conversations": {"conversations": json.dumps(CHAT)},
    "columns prompt and completion": {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
    "columns instruction and input and output": {"instruction": QUESTION, "input": "red, blue", "output": ANSWER},
    "columns prompt and response": {"prompt": QUESTION, "response": ANSWER},
    "column text": {"text": "the cat sat on a mat"},
}
