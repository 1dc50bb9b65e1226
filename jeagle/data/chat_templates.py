"""Chat templates: the tokenizer's own, a user's file, one of a table, or one made of headers as SpecForge has them."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from jeagle.errors import UserError

# Name -> the model families that it is of. The files of these names lie in data/templates.
TEMPLATES = {
    "chatml": "models trained on plain ChatML",
    "deepseek": "DeepSeek V3, and with thinking on the models distilled from R1",
    "gemma": "Gemma 1 to 3",
    "gpt-oss": "gpt-oss (harmony)",
    "llama3": "Llama 3",
    "llama3.1": "Llama 3.1 to 3.3",
    "llama4": "Llama 4",
    "mistral": "Mistral 7B v0.3 and Mixtral 8x22B",
    "phi": "Phi 3 and 3.5",
    "phi4": "Phi 4",
    "qwen": "Qwen 2 and 2.5",
    "qwen3-thinking": "Qwen 3, thinking or not",
    "vicuna": "Vicuna 1.1 to 1.5",
}


def use_template(
    tokenizer: Any, template: str = "", *, user_header: str = "", assistant_header: str = "", end_of_turn: str = ""
) -> Any:
    """The tokenizer, with the chat template that these settings mean in place of its own.

    Args:
      template: empty for the tokenizer's own; a name of the table; or the path of a jinja file.
      user_header, assistant_header, end_of_turn: give all three, and no `template`, for one made of headers. A
        backslash with an n stands for a line break.

    Raises:
      UserError: for an unknown name, a file that cannot be read or is no jinja, or headers that are not all given.
    """
    headers = {"user-header": user_header, "assistant-header": assistant_header, "end-of-turn": end_of_turn}
    if any(headers.values()):
        if lacking := [name for name, value in headers.items() if not value]:
            raise UserError(f"--data.{lacking[0]} is missing: a template of headers needs {', '.join(headers)}.")
        if template:
            raise UserError("--data.template and headers exclude each other: give one of them.")
        tokenizer.chat_template = from_headers(*(value.replace("\\n", "\n") for value in headers.values()))
    elif template:
        tokenizer.chat_template = _named(template)
    return tokenizer


def from_headers(user_header: str, assistant_header: str, end_of_turn: str) -> str:
    """A jinja template of turns that are a header, the text and an end.

    The system's header is the user's with "system" for "user"; where the user's does not say "user", the system's
    text stands first without one. Tools are refused.
    """
    system_header = user_header.replace("user", "system") if "user" in user_header else ""
    names = {"user": user_header, "assistant": assistant_header, "system": system_header, "end": end_of_turn}
    user, assistant, system, end = (json.dumps(names[n], ensure_ascii=False) for n in names)
    return (
        "{%- if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
        "{%- if message.tool_calls or message.role == 'tool' %}"
        "{{ raise_exception('a template of headers has no form for tool calls') }}{% endif %}"
        f"{{%- set header = {{'user': {user}, 'assistant': {assistant}, 'system': {system}}}[message.role] %}}"
        f"{{{{- header + message.content + {end} }}}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
    )


def reads_date(template: Any) -> bool:
    """Whether the template writes today's date, so that rows depend on the day they were made."""
    return "strftime_now" in str(template)


def _named(template: str) -> str:
    if template in TEMPLATES:
        return (
            (resources.files("jeagle.data") / "templates" / f"{template}.jinja").read_text("utf-8").removesuffix("\n")
        )
    path = Path(template)
    if not path.is_file():
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give a jinja file, or one of {', '.join(TEMPLATES)}."
        raise UserError(f"There is no template {template}: {hint}")
    try:
        text = path.read_text("utf-8")
        _check_jinja(text)
    except Exception as error:  # jinja raises many kinds
        raise UserError(f"The template {path} cannot be used ({error}): mend it.") from error
    return text


def _check_jinja(text: str) -> None:
    from jinja2 import Environment

    Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).parse(
        text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
