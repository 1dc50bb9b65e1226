"""Chat templates: the tokenizer's own, a user's file, a named one, or one made of headers as in SpecForge."""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from jeagle.errors import UserError

# Name -> the model families that use the template. The files are in data/chat/jinja.
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
    "qwen3-thinking": "Qwen 3, with and without thinking",
    "vicuna": "Vicuna 1.1 to 1.5",
}


def use_template(
    tokenizer: Any, template: str = "", *, user_header: str = "", assistant_header: str = "", end_of_turn: str = ""
) -> Any:
    """Sets the tokenizer's chat template as these settings say, and returns the tokenizer.

    Args:
      template: empty for the tokenizer's own template; a name of `TEMPLATES`; or the path of a Jinja file.
      user_header, assistant_header, end_of_turn: give all three, and no `template`, for a template made of headers.
        A backslash followed by n stands for a line break.

    Raises:
      UserError: if the name is unknown, if the file cannot be read or is not valid Jinja, or if only some of the
        headers are given.
    """
    headers = {"user-header": user_header, "assistant-header": assistant_header, "end-of-turn": end_of_turn}
    if any(headers.values()):
        if missing := [name for name, value in headers.items() if not value]:
            raise UserError(f"--data.{missing[0]} is missing: a template made of headers needs {', '.join(headers)}.")
        if template:
            raise UserError("--data.template and headers exclude each other: give one of them.")
        tokenizer.chat_template = from_headers(*(value.replace("\\n", "\n") for value in headers.values()))
    elif template:
        tokenizer.chat_template = _load_template(template)
    return tokenizer


def from_headers(user_header: str, assistant_header: str, end_of_turn: str) -> str:
    """Returns a Jinja template in which each turn is a header, the text and an end.

    The header of a system turn is the user's header with "system" in place of "user". If the user's header does not
    contain "user", the system text has no header. The template refuses tool calls.
    """
    system_header = user_header.replace("user", "system") if "user" in user_header else ""
    user, assistant, system, end = (
        json.dumps(text, ensure_ascii=False) for text in (user_header, assistant_header, system_header, end_of_turn)
    )
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
    """Whether the template writes today's date, so that the rows depend on the day on which they are made."""
    return "strftime_now" in str(template)


def _load_template(template: str) -> str:
    if template in TEMPLATES:
        return (resources.files(__package__) / "jinja" / f"{template}.jinja").read_text("utf-8").removesuffix("\n")
    from jinja2 import Environment

    path = Path(template)
    if not path.is_file():
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give a Jinja file, or one of {', '.join(TEMPLATES)}."
        raise UserError(f"There is no template {template}: {hint}")
    try:
        text = path.read_text("utf-8")
        # transformers removes these two tags, which mark what the assistant generates, before Jinja parses the text.
        without_tags = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).parse(without_tags)
    except Exception as error:  # Jinja raises many kinds of exceptions
        raise UserError(f"The template {path} cannot be used ({error}): correct it.") from error
    return text
