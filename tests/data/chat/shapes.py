"""Small chat templates of our own in the shapes that published ones have: where a turn ends, what a prompt opens or
closes, which thoughts the history keeps, and in which form calls are written."""

# ruff: noqa: E501 (templates are easier to read without breaks within a tag)

from __future__ import annotations

from typing import NamedTuple

from jeagle.data import use_template
from jeagle.run.template_folder import neutral_tokenizer


class Shape(NamedTuple):
    """A chat template.

    Attributes:
      text: Jinja.
      ends: tokens that end an answer by the model's own configuration; the first is the eos token.
      refuses: kinds of chats that the template has no form for.
    """

    text: str
    ends: tuple[str, ...]
    refuses: frozenset[str] = frozenset()


def tokenizer_of(shape: Shape):
    """Returns a tokenizer of bytes and the template's special tokens, and the ids that end an answer."""
    roles = {"bos_token": "<s>", "eos_token": shape.ends[0]}
    added = {str(i): {"content": token, "special": True} for i, token in enumerate(shape.ends)}
    tokenizer = neutral_tokenizer(shape.text, roles | {"added_tokens_decoder": added})
    tokenizer.chat_template = shape.text
    return tokenizer, tokenizer.convert_tokens_to_ids(list(shape.ends))


def named(name: str, ends: tuple[str, ...]):
    """Returns the same for a named template of jeagle."""

    class Holder:
        chat_template = ""

    return tokenizer_of(Shape(use_template(Holder(), name).chat_template, ends))


REASONING = frozenset({"reasoning", "reasoning earlier", "agent loop", "cut in thought"})
CALLS = frozenset({"call", "several calls", "agent loop"})
PLAIN = frozenset(
    (
        "one turn",
        "several turns",
        "with system",
        "thinking off",
        "call",
        "several calls",
        "cut",
        "not learnt",
        "odd text",
    )
)
_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
_LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_CALL = "<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>"
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)

SHAPES = {
    "turns with headers": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>",),
        REASONING | CALLS,
    ),
    "trimmed, one call at most": Shape(
        "{{ bos_token }}" + _TOOLS + "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{% if m.tool_calls %}"
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set f = m.tool_calls[0].function %}{{ {'name': f.name, 'parameters': f.arguments} | tojson }}"
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        ("<|eot_id|>", "<|eom_id|>"),
        REASONING | {"several calls"},
    ),
    "history drops thoughts": Shape(
        _TOOLS + _LAST + "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}"
        "</result><|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% set t = m.reasoning_content or '' %}{% set c = m.content or '' %}{% if not t and '</think>' in c %}"
        "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{% if loop.index0 > ns.last and (loop.last or t) %}<think>\n{{ t }}\n</think>\n\n{{ c.lstrip('\n') }}"
        "{% else %}{{ c.lstrip('\n') }}{% endif %}{% for c in m.tool_calls or [] %}\n"
        + _CALL
        + "{% endfor %}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "always thinks": Shape(
        _TOOLS + _LAST + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% if loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}" + _CALL + "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ("<|im_end|>",),
        PLAIN,
    ),
    "joins arguments as text": Shape(
        "{{ bos_token }}" + _TOOLS + "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}{% elif m.role == 'tool' %}<\uff5cresult\uff5c>"
        "{{ m.content }}<\uff5c/result\uff5c>{% else %}{% if messages[loop.index0 - 1].role == 'user' %}"
        "<\uff5cAssistant\uff5c></think>{% endif %}{% set c = m.content or '' %}{{ c.split('</think>')[-1] }}"
        "{% for c in m.tool_calls or [] %}<\uff5ccall\uff5c>{{ c.function.name + '<\uff5csep\uff5c>' + c.function.arguments }}"
        "<\uff5c/call\uff5c>{% endfor %}<\uff5cend\uff5c>{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<\uff5cAssistant\uff5c>"
        "{{ '<think>' if thinking else '</think>' }}{% endif %}",
        ("<\uff5cend\uff5c>",),
    ),
    "the next role's marker ends a turn": Shape(
        "[gMASK]<sop>" + _TOOLS + _LAST + "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}"
        "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}\n"
        "<result>{{ m.content }}</result>{% elif m.role == 'system' %}<|system|>\n{{ m.content }}{% else %}<|assistant|>"
        "{% if loop.index0 > ns.last and m.reasoning_content %}\n<think>{{ m.reasoning_content.strip() }}</think>"
        "{% else %}\n<think></think>{% endif %}{% if m.content and m.content.strip() %}\n{{ m.content.strip() }}{% endif %}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
        "<k>{{ k }}</k>\n<v>{{ v }}</v>\n{% endfor %}</tool_call>{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n<think></think>' if enable_thinking is false else '' }}{% endif %}",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "no system turn, roles alternate": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + _ALTERNATE
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<eos>", "<end_of_turn>"),
        REASONING | CALLS | {"with system"},
    ),
    "an empty thought in the prompt alone": Shape(
        "{{ bos_token }}" + _TOOLS + _LAST + "{% set st = namespace(open=false) %}{% for m in messages %}"
        "{% if m.role == 'tool' %}<|tool_response>response:{{ m.name }}{{ m.content }}<tool_response|>"
        "{% else %}{% if not (m.role == 'assistant' and st.open) %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% endif %}{% set st.open = false %}{% if m.reasoning_content and loop.index0 > ns.last %}"
        "<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}{% for c in m.tool_calls or [] %}"
        "<|tool_call>call:{{ c.function.name }}{{ c.function.arguments | tojson }}<tool_call|>{% endfor %}"
        "{% if m.tool_calls %}{% set st.open = true %}{% else %}{{ m.content | trim }}<turn|>\n{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt and not st.open %}<|turn>model\n"
        "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}",
        ("<eos>", "<turn|>", "<|tool_response>"),
    ),
    "channels": Shape(
        "<|start|>system<|message|>{{ tools | tojson if tools }}<|end|>" + "{% set ns = namespace(final=-1) %}"
        "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant"
        "<|channel|>commentary<|message|>{{ m.content }}<|end|>{% elif m.role == 'assistant' %}"
        "{% if m.thinking and (loop.last or loop.index0 > ns.final) %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}"
        "<|end|>{% endif %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ f.name }}"
        "<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final"
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|return|>", "<|call|>"),
        frozenset({"several calls"}),
    ),
    "the system text moves to the last question": Shape(
        "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if loop.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST]{{ system if loop.last else '' }}{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]{% elif m.tool_calls %}"
        "[TOOL_CALLS][{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
        "{{ '' if loop.last else ', ' }}{% endfor %}]{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("</s>",),
        REASONING,
    ),
    "the next header stands there unasked": Shape(
        "{{ bos_token }}{% for m in messages %}<|TURN|><|{{ m.role }}|>{% if m.role == 'assistant' %}<|ANSWER|>{{ m.content }}"
        "<|/ANSWER|>{% else %}{{ m.content }}{% endif %}<|END_OF_TURN|>{% endfor %}<|TURN|><|assistant|>"
        "{{ '<|START_THINKING|><|END_THINKING|>' if enable_thinking is false else '' }}",
        ("<|END_OF_TURN|>",),
        CALLS,
    ),
    "the last turn ends otherwise": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant'"
        " else '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|endoftext|>", "<|im_end|>"),
        REASONING | CALLS,
    ),
    "the prompt begins the thought in words": Shape(
        "{% for m in messages %}<|begin_{{ m.role }}|>\n{{ m.content }}{{ '\n<|end|>\n' if m.role == 'assistant' and not loop.last"
        " else '\n' if m.role != 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}<|begin_assistant|>\nHere are my steps:\n{% endif %}",
        ("<|end|>",),
        REASONING | CALLS,
    ),
    "an end that no configuration names": Shape(
        "<|begin|>{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}<|sep|>{% elif m.role == 'user' %}"
        "User: {{ m.content }}\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}",
        ("</s>",),
        REASONING | CALLS,
    ),
    "calls have an end of their own": Shape(
        _TOOLS
        + _LAST
        + "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% if loop.index0 > ns.last %}"
        "<think>{{ m.reasoning_content or '' }}</think>{% else %}<think></think>{% endif %}{{ m.content or '' }}"
        "{% if m.tool_calls %}<|calls_begin|>{% for c in m.tool_calls %}<|call|>{{ c.id }}:{{ c.function.name }}<|args|>"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}{% endfor %}"
        "<|calls_end|>{% else %}<|im_end|>{% endif %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("<|im_end|>", "<|calls_end|>"),
        PLAIN,
    ),
}
