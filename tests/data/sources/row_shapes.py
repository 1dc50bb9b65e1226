"""Rows in the shape of published datasets, with varied contents, and what has to become of each of them.

The texts are made here. The schemas are those of the datasets' cards on the Hub, and of the outputs of speculators'
response regeneration. A maker gets a generator and the number of the row and returns (row, expected): expected is the
texts that are learnt, in order, or the reason why the row is rejected.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Learnt = list[str]
TOOL = {"name": "find", "description": "finds", "parameters": {"type": "object", "properties": {}}}


def _talk(r: random.Random, n: int, turns: int = 0) -> list[tuple[str, str]]:
    return [
        (f"question {n}.{k} \u2028?", f"answer {n}.{k} {'é' * r.randrange(3)}") for k in range(turns or r.randint(1, 3))
    ]


def _openai(pairs, **more) -> list[dict[str, Any]]:
    sides = ("user", "assistant")
    return [{"role": role, "content": text} | more for pair in pairs for role, text in zip(sides, pair, strict=True)]


def _sharegpt(pairs, names=("human", "gpt"), **more) -> list[dict[str, Any]]:
    return [{"from": name, "value": text} | more for pair in pairs for name, text in zip(names, pair, strict=True)]


def _answers(pairs) -> Learnt:
    return [answer for _, answer in pairs]


def sharegpt(r, n):
    pairs = _talk(r, n)
    turns = _sharegpt(pairs, markdown=None, text=None)
    if r.random() < 0.1:  # cut into pieces: it begins with an answer
        return {"id": f"x_{n}", "conversations": [{"from": "gpt", "value": "lost"}, *turns]}, _answers(pairs)
    if r.random() < 0.1:
        turns[-2]["value"] = ""
        return {"id": f"x_{n}", "conversations": turns}, "a turn is empty"
    return {"id": f"x_{n}", "conversations": turns}, _answers(pairs)


def ultrachat(r, n):
    pairs = _talk(r, n)
    if r.random() < 0.5:  # the first edition: texts in turn
        return {"id": str(n), "data": [text for pair in pairs for text in pair]}, _answers(pairs)
    return {"prompt": pairs[0][0], "prompt_id": f"{n:x}", "messages": _openai(pairs)}, _answers(pairs)


def openhermes(r, n):
    pairs = _talk(r, n, 1)
    turns = _sharegpt(pairs, weight=None)
    system = r.choice([None, "", "be old"])
    if system:
        turns.insert(0, {"from": "system", "value": r.choice([system, "be young"]), "weight": None})
    row = {"conversations": turns, "system_prompt": system, "source": "airoboros2.2", "category": None, "idx": None}
    row |= {
        "custom_instruction": None,
        "language": None,
        "skip_prompt_formatting": r.choice([None, False]),
        "views": None,
    }
    if system and turns[0]["value"] != system:
        return row, "the column system_prompt differs from the system turn: --data.columns ignore=system_prompt"
    return row, _answers(pairs)


def perfectblend(r, n):
    pairs = _talk(r, n)
    turns = [{"from": "system", "value": ""}] * r.randrange(2) + _sharegpt(pairs)
    return {"conversations": turns, "source": "meta-math/MetaMathQA"}, _answers(pairs)


def numinamath(r, n):
    [(problem, solution)] = _talk(r, n, 1)
    row = {"problem": problem, "solution": solution, "source": "cn_contest", "uuid": None}
    kind = r.randrange(3)
    if kind == 0:  # CoT and TIR
        return row | {"messages": _openai([(problem, solution)])}, [solution]
    row |= {"answer": str(n * 7), "problem_type": "Algebra", "question_type": "math-word-problem", "synthetic": False}
    if kind == 1:  # 1.5
        return row, [solution]
    # OpenR1-Math: the messages have one of the generations, of which one reached the limit
    told = f"<think>\nthought {n}\n</think>\n\n{solution}"
    row |= {
        "generations": ["other", told],
        "finish_reasons": r.choice([None, ["length", "stop"]]),
        "correctness_count": 1,
    }
    return row | {"messages": _openai([(problem, told)]), "is_reasoning_complete": [True, True]}, [told]


def openthoughts(r, n):
    pairs = _talk(r, n, 1)
    told = [(pairs[0][0], f"<|begin_of_thought|>\n\nthought {n}\n\n<|end_of_thought|>\n\n{pairs[0][1]}")]
    kind = r.randrange(4)
    if kind == 0:
        return {
            "system": "Your role as an assistant",
            "conversations": _sharegpt(told, ("user", "assistant")),
        }, _answers(told)
    if kind == 1:
        row = {
            "conversations": _sharegpt(pairs, ("user", "assistant")),
            "question": pairs[0][0],
            "source": "evol",
            "id": n,
        }
        return row, _answers(pairs)
    if kind == 2:
        row = {"difficulty": r.choice([None, 7]), "source": "codegolf", "domain": "code"}
        return row | {"conversations": _sharegpt(pairs, ("human", "gpt"))}, _answers(pairs)
    row = {"problem": pairs[0][0], "deepseek_reasoning": f"thought {n}", "deepseek_solution": pairs[0][1]}
    row |= {
        "ground_truth_solution": None,
        "domain": "math",
        "source": "numina",
        "test_cases": None,
        "starter_code": None,
    }
    return row, "such as prompt=COLUMN,answer=COLUMN (it has problem, deepseek_reasoning, deepseek_solution"


def magpie(r, n):
    pairs = _talk(r, n, 1)
    row = {"uuid": f"{n}", "model": "Qwen2.5-72B-Instruct", "gen_input_configs": {"temperature": 1.0, "seed": None}}
    row |= {"instruction": pairs[0][0], "response": pairs[0][1], "conversations": _sharegpt(pairs)}
    row |= {
        "task_category": "Math",
        "other_task_category": ["Editing"],
        "difficulty": r.choice(["easy", None]),
        "intent": "i",
    }
    row |= {
        "knowledge": "birds",
        "reward_model": "FsfairX",
        "instruct_reward": -3.5,
        "min_similar_uuid": None,
        "language": "EN",
    }
    return row, _answers(pairs)


def oasst2(r, n):
    """The rows of a tree, depth first, as one list: the best path is learnt."""
    pairs, rows, parent = _talk(r, n), [], None
    more = {
        "lang": "en",
        "deleted": False,
        "synthetic": False,
        "emojis": {"name": ["+1"], "count": [1]},
        "user_id": "u",
    }
    for k, pair in enumerate(pairs):
        for role, text in zip(("prompter", "assistant"), pair, strict=True):
            node = {"message_id": f"{n}.{k}.{role}", "parent_id": parent, "message_tree_id": f"t{n}", "role": role}
            best = [node | more | {"text": text, "rank": 0 if parent else None}]
            if parent and r.random() < 0.5:  # a worse branch, before the best one
                other = {"message_id": node["message_id"] + "-", "text": "worse", "rank": 1}
                best.insert(0, node | more | other)
            rows += best
            parent = node["message_id"]
    if r.random() < 0.2:  # the nested form
        by_parent: dict[Any, list] = {}
        for row in rows:
            by_parent.setdefault(row["parent_id"], []).append(row | {"replies": []})
        for row in [row for level in by_parent.values() for row in level]:
            row["replies"] = by_parent.get(row["message_id"], [])
        [root] = by_parent[None]
        return [{"message_tree_id": f"t{n}", "tree_state": "ready_for_export", "prompt": root}], _answers(pairs)
    return rows, _answers(pairs)


def xlam(r, n):
    call = {"name": "find", "arguments": {"x": n, "y": None}}
    tools = json.dumps([TOOL])
    row = {"id": n, "query": f"question {n}", "answers": json.dumps([call] * r.randint(1, 2)), "tools": tools}
    return row, [f'find {{"x": {n}, "y": null}}'] * len(json.loads(row["answers"]))


def hermes(r, n):
    call = json.dumps({"name": "find", "arguments": {"x": n}})
    system = "You call functions. <tools>[...]</tools>" if r.random() < 0.5 else "be old"
    turns = [{"from": "system", "value": system}, {"from": "human", "value": f"question {n}"}]
    turns += [{"from": "gpt", "value": f"<tool_call>\n{call}\n</tool_call>"}]
    turns += [
        {"from": "tool", "value": "<tool_response>\n7\n</tool_response>"},
        {"from": "gpt", "value": f"It is 7 {n}"},
    ]
    row = {"id": f"{n}", "conversations": turns, "tools": json.dumps([TOOL]), "category": "IoT", "subcategory": None}
    return row | {"task": "search"}, [f"<tool_call>\n{call}\n</tool_call>", f"It is 7 {n}"]


def toolace(r, n):
    turns = [{"from": "user", "value": f"question {n}"}, {"from": "assistant", "value": f"[find(x={n})]"}]
    turns += [
        {"from": "tool", "value": '[{"name": "find", "results": 7}]'},
        {"from": "assistant", "value": f"seven {n}"},
    ]
    return {"system": "You are an expert. [{...}]", "conversations": turns}, [f"[find(x={n})]", f"seven {n}"]


def apigen(r, n):
    """APIGen-MT: the calls are turns of their own."""
    call = {"name": "find", "arguments": {"x": n}}
    turns = [{"from": "human", "value": f"question {n}"}, {"from": "function_call", "value": json.dumps(call)}]
    turns += [{"from": "observation", "value": "7"}, {"from": "gpt", "value": f"seven {n}"}]
    if r.random() < 0.1:
        turns[1]["value"] = "find(x)"
        return {"conversations": turns, "tools": json.dumps([TOOL]), "system": "s"}, "is not valid JSON"
    return {"conversations": turns, "tools": json.dumps([TOOL]), "system": "s"}, [f'find {{"x": {n}}}', f"seven {n}"]


def swe(r, n):
    kind = r.randrange(3)
    learnt = [f"I look {n}", f"done {n}"]
    if kind == 0:  # SWE-smith: the messages are JSON text, and contents are lists of parts
        turns = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": f"issue {n}"}]},
        ]
        turns += [{"role": "assistant", "content": learnt[0], "thought": learnt[0], "action": "ls", "agent": "main"}]
        turns += [{"role": "user", "content": [{"type": "text", "text": "files", "cache_control": None}]}]
        turns += [{"role": "assistant", "content": learnt[1]}]
        row = {
            "messages": json.dumps(turns),
            "instance_id": f"i{n}",
            "resolved": True,
            "model": "claude",
            "patch": "diff",
        }
        return row, learnt
    if kind == 1:  # SWE-agent trajectories
        turns = [{"role": "system", "system_prompt": "s", "text": None}, {"role": "user", "text": f"issue {n}"}]
        turns += [
            {"role": "ai", "text": learnt[0]},
            {"role": "user", "text": "files"},
            {"role": "ai", "text": learnt[1]},
        ]
        turns = [{"cutoff_date": None, "mask": False, "system_prompt": None} | turn for turn in turns]
        row = {"trajectory": turns, "instance_id": f"i{n}", "model_name": "llama", "exit_status": "submitted"}
        return row | {"target": True, "generated_patch": "diff", "eval_logs": "log"}, learnt
    # OpenHands: tool calls with arguments as text, no content beside them
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": json.dumps({"x": n})}}
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": f"issue {n}"}]
    turns += [{"role": "assistant", "content": r.choice([None, learnt[0]]), "tool_calls": [call]}]
    turns += [
        {"role": "tool", "content": "files", "tool_call_id": "c1", "name": "find"},
        {"role": "assistant", "content": learnt[1]},
    ]
    row = {"trajectory": turns, "trajectory_id": f"t{n}", "repo": "a/b", "model_patch": "diff", "exit_status": "submit"}
    calls = f'find {{"x": {n}}}'
    first = [calls] if turns[2]["content"] is None else [f"{learnt[0]} {calls}"]
    return row | {"tools": [{"type": "function", "function": TOOL}], "resolved": 1}, [*first, learnt[1]]


def nemotron(r, n):
    pairs, on = _talk(r, n), r.random() < 0.5
    row = {"uuid": f"{n}", "license": "cc-by-4.0", "generator": "Qwen3-235B-A22B", "version": "v2", "category": "chat"}
    row |= {"reasoning": "on" if on else "off", "metadata": json.dumps({"conversation_id": None})}
    if r.random() < 0.3:  # the first edition: the prompt is a list of turns
        row |= {
            "input": _openai(pairs)[:-1],
            "output": pairs[-1][1],
            "system_prompt": f"detailed thinking {row['reasoning']}",
        }
        return row | {"used_in_training": "yes"}, _answers(pairs)
    told = [(q, f"<think>\nthought\n</think>\n\n{a}" if on else a) for q, a in pairs]
    return row | {"messages": [{"role": "system", "content": ""}, *_openai(told, tool_calls=[])]}, _answers(told)


def speculators(r, n):
    ids = [r.randrange(5, 90) for _ in range(r.randint(4, 20))]
    mask = [0] * 3 + [1] * (len(ids) - 3)
    row = {
        "id": f"{n}_gen0",
        "primary_id": f"{n}",
        "input_ids": ids,
        "loss_mask": mask,
        "text": f"<|im_start|>user\n{n}",
    }
    row |= {"metadata": {"idx": n, "finish_reason": r.choice(["length", "stop"]), "is_tool_call": False}}
    if r.random() < 0.1:
        return row | {"loss_mask": mask[1:]}, "loss_mask and input_ids differ in length"
    if r.random() < 0.1:
        return row | {"loss_mask": [0] * len(ids)}, "no answer"
    return row, [str(ids[3:])]


MAKERS: dict[str, Callable[[random.Random, int], tuple[Any, Learnt | str]]] = {
    make.__name__: make
    for make in (
        *(sharegpt, ultrachat, openhermes, perfectblend, numinamath, openthoughts, magpie, oasst2, xlam, hermes),
        *(toolace, apigen, swe, nemotron, speculators),
    )
}


def rows_in_shape(name: str, count: int = 100) -> tuple[list[list[dict[str, Any]]], list[Learnt | str]]:
    """Returns the rows of each conversation (several for a message tree), and what is expected of it."""
    random_ = random.Random(name)
    made = [MAKERS[name](random_, n) for n in range(count)]
    return [row if isinstance(row, list) else [row] for row, _ in made], [expected for _, expected in made]
