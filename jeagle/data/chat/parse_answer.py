"""Parses the text of an answer into its content, its reasoning and its tool calls, as a server's parsers do.

The forms are those that targets write, one literal table for reasoning and one for tool calls. A form is tried if the
target's chat template writes its marks. What fits no form stays in the content, unchanged.

Sources of the forms: the chat templates of the models, and the parsers of vLLM that are named after them.
"""
# ruff: noqa: RUF001 - DeepSeek's marks contain a vertical line of full width

import ast
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
Call = tuple[str, Any, str]  # name, arguments (an object, or the JSON text that the target wrote), id or ""
Tools = Sequence[dict[str, Any]]

# How reasoning begins and ends. Prompts may already contain the beginning.
REASONING = (
    ("<think>", "</think>"),  # Qwen 3, DeepSeek, GLM-4.5, Kimi K2 Thinking, MiniMax M2, Nemotron, SmolLM3 and others
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ("[THINK]", "[/THINK]"),  # Magistral and Ministral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
)
# What targets write around the text that follows their reasoning: Hunyuan; ERNIE 4.5 and Granite 3; Command A.
_AROUND = (("<answer>", "</answer>"), ("<response>", "</response>"), ("<|START_RESPONSE|>", "<|END_RESPONSE|>"))


def _json_text(match: re.Match, tools: Tools) -> Iterable[Call]:
    yield match["name"], match["arguments"].strip(), match.groupdict().get("id") or ""


def _json_calls(match: re.Match, tools: Tools) -> Iterable[Call]:
    """Reads objects with a name and arguments, or lists of such objects, with semicolons between them or nothing."""
    text, decoder = match["json"], json.JSONDecoder()
    while text := text.lstrip("; \n"):
        calls, end = decoder.raw_decode(text)
        text = text[end:]
        for call in calls if isinstance(calls, list) else [calls]:
            arguments = call["arguments"] if "arguments" in call else call["parameters"]
            yield call["name"] if "name" in call else call["tool_name"], arguments, call.get("id") or ""


def _pairs(pair: str) -> Callable[[re.Match, Tools], Iterable[Call]]:
    """Returns a reader of arguments that are written one by one, in the form of this pattern."""

    def read(match: re.Match, tools: Tools) -> Iterable[Call]:
        name, found = match["name"].strip(), list(re.finditer(pair, match["pairs"], re.DOTALL))
        if re.sub(pair, "", match["pairs"], flags=re.DOTALL).strip():
            raise ValueError("something else stands between the arguments")
        functions = [tool.get("function", tool) for tool in tools]
        schema = next((f.get("parameters") or {} for f in functions if f.get("name") == name), {}).get("properties", {})
        texts = {k for k, of in schema.items() if isinstance(of, dict) and of.get("type") == "string"}
        texts |= {p["key"] for p in found if p.groupdict().get("string") == "true"}
        yield name, {p["key"]: p["value"] if p["key"] in texts else _value(p["value"]) for p in found}, ""

    return read


def _value(text: str) -> Any:
    """Returns the value that JSON (or Python, for lists and objects) writes with these very characters, or the text."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if not isinstance(value, str) and json.dumps(value, ensure_ascii=False) == text:
            return value
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        value = ast.literal_eval(text)
        if isinstance(value, (list, dict)) and repr(value) == text:
            return value
    return text


def _gemma(match: re.Match, tools: Tools) -> Iterable[Call]:
    """Reads an object of Gemma 4: names have no quotation marks, and those of texts are a token of their own."""

    def as_json(part: re.Match) -> str:
        return json.dumps(part[1]) if part[1] is not None else f"{json.dumps(part[2])}:"

    text = re.sub(r'<\|"\|>(.*?)<\|"\|>|([^\s{}\[\],:"<]+)\s*:', as_json, match["object"], flags=re.DOTALL)
    yield match["name"], json.loads(text), ""


def _python(match: re.Match, tools: Tools) -> Iterable[Call]:
    """Reads calls in Python's syntax: one on each line, or a list of them."""
    for statement in _JsonWords().visit(ast.parse(match["python"].strip())).body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        for call in value.elts if isinstance(value, ast.List) else [value]:
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError("this is not a call with named arguments")
            yield ast.unparse(call.func), {str(a.arg): ast.literal_eval(a.value) for a in call.keywords}, ""


class _JsonWords(ast.NodeTransformer):
    """Replaces JSON's words, which some targets write in calls, by Python's values."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


class CallForm(NamedTuple):
    """How targets write tool calls.

    Attributes:
      mark: what the template contains if its target uses this form.
      calls: pattern of all calls up to the end of the answer; its first group contains them.
      call: pattern of one of them.
      read: returns the calls of a match of `call`.
      begin: what the calls begin with; None = the mark; "" = nothing, so that the whole answer must be calls.
    """

    mark: str
    calls: str
    call: str
    read: Callable[[re.Match, Tools], Iterable[Call]]
    begin: str | None = None


_JSON = r"(?P<json>[\[{].*[\]}])[;\s]*"
_PYTHON = "(?P<python>.+)"
_FUNCTION = r"<function=(?P<name>[^>\n]+)>(?P<pairs>.*?)</function>"
_PARAMETER = _pairs(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>")
_INVOKE = r'invoke name="(?P<name>[^"]+)">(?P<pairs>.*?)</'

CALLS = (
    # Qwen 2.5 and 3, Hermes, SmolLM3, ERNIE 4.5, Granite 4
    CallForm("<tool_call>", "(.*)", r"<tool_call>\s*(?P<json>[\[{].*?[\]}])\s*</tool_call>", _json_calls),
    # Qwen 3 Coder, Qwen 3.5, Nemotron 3
    CallForm("<function=", "(.*)", rf"<tool_call>\s*{_FUNCTION}\s*</tool_call>", _PARAMETER, "<tool_call>"),
    # GLM-4.5 to 4.7
    CallForm(
        "<arg_key>",
        "(.*)",
        r"<tool_call>\s*(?P<name>[^\s<{]+)\s*(?P<pairs>(?:<arg_key>.*?</arg_value>\s*)*)</tool_call>",
        _pairs(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
        "<tool_call>",
    ),
    # DeepSeek V3 and R1; then V3.1
    CallForm(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜>(.*?)(?:<｜tool▁calls▁end｜>)?",
        r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n(?P<arguments>.*?)\n```<｜tool▁call▁end｜>",
        _json_text,
    ),
    CallForm(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜>(.*?)(?:<｜tool▁calls▁end｜>)?",
        r"<｜tool▁call▁begin｜>(?P<name>[^<\n]+)<｜tool▁sep｜>(?P<arguments>.*?)<｜tool▁call▁end｜>",
        _json_text,
    ),
    # DeepSeek V3.2 and V4
    CallForm(
        "｜DSML｜",
        r"<｜DSML｜(?:function|tool)_calls>\s*(.*)</｜DSML｜(?:function|tool)_calls>",
        f"<｜DSML｜{_INVOKE}｜DSML｜invoke>",
        _pairs(r'<｜DSML｜parameter name="(?P<key>[^"]+)" string="(?P<string>\w+)">(?P<value>.*?)</｜DSML｜parameter>'),
        "<｜DSML｜",
    ),
    # Kimi K2
    CallForm(
        "<|tool_calls_section_begin|>",
        r"<\|tool_calls_section_begin\|>\s*(.*)<\|tool_calls_section_end\|>",
        r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^\s<]+?):\d+)\s*<\|tool_call_argument_begin\|>"
        r"(?P<arguments>.*?)<\|tool_call_end\|>",
        _json_text,
    ),
    # MiniMax M2
    CallForm(
        "<minimax:tool_call>",
        r"<minimax:tool_call>\s*(.*)</minimax:tool_call>",
        f"<{_INVOKE}invoke>",
        _pairs(r'<parameter name="(?P<key>[^"]+)">(?P<value>.*?)</parameter>'),
    ),
    # Seed-OSS
    CallForm("<seed:tool_call>", r"<seed:tool_call>\s*(.*)</seed:tool_call>", _FUNCTION, _PARAMETER),
    # Gemma 4
    CallForm("<|tool_call>", "(.*)", r"<\|tool_call>call:(?P<name>[\w.-]+)(?P<object>\{.*?\})<tool_call\|>", _gemma),
    # Mistral Small 3.1 and later; then 7B v0.3, Mixtral, Nemo and Small 3.0
    CallForm(
        "[TOOL_CALLS]",
        "(.*)",
        r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?(?P<arguments>\{.*?\})"
        r"(?=\s*\[TOOL_CALLS\]|\s*$)",
        _json_text,
    ),
    CallForm("[TOOL_CALLS]", r"\[TOOL_CALLS\]\s*(.*)", _JSON, _json_calls),
    # Nemotron Nano 2, Hunyuan, Phi-4 mini, Granite 3
    CallForm("<TOOLCALL>", "<TOOLCALL>(.*)</TOOLCALL>", _JSON, _json_calls),
    CallForm("<tool_calls>", r"<tool_calls>\s*(.*)</tool_calls>", _JSON, _json_calls),
    CallForm("<|tool_call|>", r"<\|tool_call\|>\s*(.*?)(?:<\|/tool_call\|>)?", _JSON, _json_calls),
    # Command R7B and A
    CallForm("<|START_ACTION|>", r"<\|START_ACTION\|>\s*(.*)<\|END_ACTION\|>", _JSON, _json_calls),
    # OLMo 3; LFM2
    CallForm("<function_calls>", "<function_calls>(.*)</function_calls>", _PYTHON, _python),
    CallForm("<|tool_call_start|>", r"<\|tool_call_start\|>(.*)<\|tool_call_end\|>", _PYTHON, _python),
    # Llama 4, then Llama 3.1 to 3.3: with marks and without
    CallForm("<|python_start|>", r"<\|python_start\|>(.*)<\|python_end\|>", _PYTHON, _python),
    CallForm("<|python_tag|>", r"<\|python_tag\|>(.*)", _JSON, _json_calls),
    CallForm('"parameters": ', r"(?:<\|python_start\|><\|python_end\|>)?(.*)", _JSON, _json_calls, ""),
    CallForm("[func_name1(", "(.*)", _PYTHON, _python, ""),
)

# One message of harmony, the form of gpt-oss: a recipient and a channel, and a text that may be cut off.
_HARMONY = re.compile(
    r"(?:<\|start\|>assistant)?(?:\s*to=functions\.(?P<to>[\w.-]+))?<\|channel\|>(?P<channel>analysis|commentary|final)"
    r"(?:\s*to=functions\.(?P<name>[\w.-]+))?\s*(?:(?:<\|constrain\|>)?\s*json\s*)?<\|message\|>(?P<body>.*?)"
    r"(?:<\|end\|>|<\|call\|>|<\|return\|>|$)",
    re.DOTALL,
)


def parse_answer(text: str, *, template: str = "", prompt: str = "", tools: Tools = ()) -> Message:
    """Parses the text of an answer.

    Args:
      text: what the target sampled, without its end token.
      template: the target's chat template; empty if it is not known, and then all forms with marks are tried.
      prompt: the end of the text before the answer, which may begin the reasoning.
      tools: the tools on offer; without them no calls are looked for.

    Returns:
      {"role", "content"} and, if the answer has them, "reasoning_content" and "tool_calls" in OpenAI's form, with the
      arguments as JSON text. The content is None if there is nothing but reasoning or calls.
    """
    if ("<|channel|>" in template) if template else text.startswith("<|channel|>"):
        reasoning, content, calls = _split_harmony(text, tools)
    else:
        reasoning, content = _split_reasoning(text, template, prompt)
        content, calls = _split_calls(content, template, tools) if tools else (content, [])
        content = content.lstrip() if reasoning or calls else content
        content = content.rstrip() if calls else content
    message: Message = {"role": "assistant", "content": None if not content and (reasoning or calls) else content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _split_harmony(text: str, tools: Tools) -> tuple[str, str, list[Message]]:
    """Returns (the reasoning, the content, the calls); the text as the content if it is anything but messages."""
    parts: dict[str, list[str]] = {"analysis": [], "commentary": [], "final": []}
    calls, position = [], 0
    while position < len(text):
        match = _HARMONY.match(text, position)
        name = match and (match["to"] or match["name"])
        try:
            if not match or (name and not tools):
                raise ValueError("this is not a message, or no tools are on offer")
            if name:
                calls.append(_checked(name, match["body"], ""))
            else:
                parts[match["channel"]].append(match["body"])
        except ValueError:
            return "", text, []
        position = match.end()
    return "\n".join(parts["analysis"]), "\n".join(parts["commentary"] + parts["final"]), calls


def _split_reasoning(text: str, template: str, prompt: str) -> tuple[str, str]:
    """Returns (the reasoning, what follows it). Reasoning that does not end was cut off, and nothing follows it."""
    for begin, end in REASONING:
        if template and end not in template:
            continue
        begun = text.lstrip().startswith(begin)
        opened = prompt.rstrip().endswith(begin.rstrip())
        if begun or opened or (not template and end in text):
            reasoning, closed, rest = (text.lstrip().removeprefix(begin) if begun else text).partition(end)
            if closed or reasoning.strip():
                break
    else:
        reasoning, rest = "", text
    for before, after in _AROUND:
        if before in (template or text) and rest.strip().startswith(before):
            rest = rest.strip().removeprefix(before).removesuffix(after)
    return reasoning.strip(), rest


def _split_calls(text: str, template: str, tools: Tools) -> tuple[str, list[Message]]:
    """Returns (what comes before the calls, the calls); the whole text and no calls if none of the forms fits it."""
    names = {tool.get("function", tool).get("name") for tool in tools}
    for form in CALLS:
        is_bare, begin = form.begin == "", text.find(form.mark if form.begin is None else form.begin)
        if begin < 0 or form.mark not in (template or text) or (is_bare and not template):
            continue
        try:
            calls = [_checked(*call) for call in _read_calls(form, text[begin:].strip(), tools)]
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError):
            continue
        if calls and not (is_bare and {call["function"]["name"] for call in calls} - names):
            return text[:begin], calls
    return text, []


def _read_calls(form: CallForm, text: str, tools: Tools) -> Iterable[Call]:
    whole = re.fullmatch(form.calls, text, re.DOTALL)
    rest = whole[1].strip() if whole else text
    while rest:
        match = re.match(form.call, rest, re.DOTALL)
        if not whole or not match:
            raise ValueError("something else than a call follows")
        yield from form.read(match, tools)
        rest = rest[match.end() :].strip()


def _checked(name: str, arguments: Any, number: str) -> Message:
    """Returns a call in OpenAI's form. ValueError if its arguments are not an object."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(name, str) or not isinstance(json.loads(text), dict):
        raise ValueError("the arguments of a call are not an object")
    return ({"id": number} if number else {}) | {"type": "function", "function": {"name": name, "arguments": text}}
