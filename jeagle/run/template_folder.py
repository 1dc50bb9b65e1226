"""Checks every chat template of a folder with a target's tokenizer, with the one beside it, or with a neutral one."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jeagle import data as room
from jeagle import targets
from jeagle.errors import UserError

# How templates spell special tokens: Llama's and DeepSeek's bars, Mistral's, MiniMax's and EXAONE's brackets, and the
# names of some without either. Tags such as <think> and <tool_call> are plain text for most models.
_SPECIAL = re.compile(
    r'<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<\|[\w"]+>|<[\w"]+\|>|\[\|\w+\|\]|\[/?[A-Z_]{3,}\]|\[gMASK\]'
    r"|<(?:s|/s|sop|eop|bos|eos|sep|start_of_turn|end_of_turn|\w+:[be]os|[A-Z]+(?:_[A-Z0-9]+)+)>|[\[\]]!?[a-z]?~!?[a-z]?[\[\]]"
)
_SETTINGS = ("chat_template.json", "tokenizer_config.json")


class TemplateFile(NamedTuple):
    """A chat template in a folder.

    Attributes:
      name: the path in the folder, of the file or of the model's folder.
      text: Jinja, or name -> Jinja.
      model: the folder of the model that the template belongs to; None if it lies alone.
    """

    name: str
    text: str | dict[str, str]
    model: Path | None


def check_folder(folder: Path, target: str = "") -> dict[str, dict[str, room.Outcome]]:
    """Renders a dozen kinds of chats with every template in a folder and in the folders below it.

    Args:
      folder: with Jinja files, or with models' folders, of which only the small JSON files and the tokenizer are read.
      target: the reference of a target whose tokenizer is used with every template; empty for the tokenizer beside a
        template, or, if there is none, a byte-level one that has the special tokens that the template spells.

    Returns:
      name of the template -> kind of chat -> outcome.

    Raises:
      UserError: if the folder has no template, or if a file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --templates is a folder with chat templates.")
    shared = None
    if target:
        files = targets.resolve(target)
        shared = targets.load_tokenizer(files), targets.open_weights(files).config
    results = {}
    for file in read_templates(folder):
        tokenizer, config = shared or _beside(file)
        tokenizer.chat_template = file.text
        results[file.name] = room.check_template(tokenizer, targets.end_token_ids(tokenizer, config))
    if not results:
        raise UserError(f"{folder} has no chat templates: give Jinja files, or folders of models.")
    return results


def read_templates(folder: Path) -> Iterator[TemplateFile]:
    """Yields the templates in a folder and in the folders below it."""
    for path in sorted(folder.rglob("*")):
        model, parent = path.parent, path.parent.relative_to(folder).as_posix()
        name = folder.name if parent == "." else parent
        if path.suffix == ".jinja":
            is_model = path.name == "chat_template.jinja"
            name = name if is_model else path.relative_to(folder).with_suffix("").as_posix()
            yield TemplateFile(name, _text(path), model if is_model else None)
        elif path.name in _SETTINGS and not any((model / other).exists() for other in _before(path.name)):
            text = _read(path).get("chat_template")
            if isinstance(text, list):  # transformers chooses among them by name
                text = {entry["name"]: entry["template"] for entry in text}
            if text:
                yield TemplateFile(name, text, model)


def neutral_tokenizer(template: str | dict[str, str], settings: dict[str, Any]) -> Any:
    """Returns a tokenizer whose tokens are bytes and the special tokens that the template and the settings spell.

    Templates may put a token together from a bar and a role, so that a text that they write is searched as well.

    Args:
      settings: a model's tokenizer_config.json, or nothing.
    """
    roles = {role: settings.get(role) for role in ("bos_token", "eos_token")}
    roles = {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()}
    if not settings:
        roles = {"bos_token": "<s>", "eos_token": "</s>"}
    added = [token["content"] for token in settings.get("added_tokens_decoder", {}).values() if token.get("special")]
    special = [token for token in roles.values() if token] + added + _SPECIAL.findall(str(template))
    tokenizer = _of_bytes(special, roles)
    tokenizer.chat_template = template
    return _of_bytes(special + _SPECIAL.findall("".join(room.sample_texts(tokenizer))), roles)


def _of_bytes(special: list[str], roles: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(special)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def _beside(file: TemplateFile) -> tuple[Any, dict[str, Any]]:
    """Returns the tokenizer for a template, and a configuration with the ids that end an answer."""
    if file.model is None:
        return neutral_tokenizer(file.text, {}), {}
    config = _read(file.model / "config.json") | _read(file.model / "generation_config.json")
    if any((file.model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return targets.load_tokenizer(targets.TargetFiles(str(file.model), file.model, "safetensors", "")), config
    settings = _read(file.model / "tokenizer_config.json")
    tokenizer, added = neutral_tokenizer(file.text, settings), settings.get("added_tokens_decoder", {})
    ends = config.get("eos_token_id") or []
    spelt = [added[str(i)]["content"] for i in (ends if isinstance(ends, list) else [ends]) if str(i) in added]
    return tokenizer, {"eos_token_id": tokenizer.convert_tokens_to_ids(spelt)}


def _before(name: str) -> tuple[str, ...]:
    """The files that take precedence over this one as the place of a model's template."""
    return "chat_template.jinja", *_SETTINGS[: _SETTINGS.index(name)]


def _read(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, which is empty if there is no file."""
    try:
        tree = json.loads(_text(path)) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again.") from error
    return tree if isinstance(tree, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again.") from error


def is_wrong(results: Mapping[str, Mapping[str, room.Outcome]]) -> bool:
    """Whether a chat is rendered wrongly, or a template is refused in whole."""
    return any(
        any(outcome.verdict == "WRONG" for outcome in kinds.values())
        or all(outcome.verdict == "refused" for outcome in kinds.values())
        for kinds in results.values()
    )


def table(results: Mapping[str, Mapping[str, room.Outcome]]) -> Iterator[str]:
    """Yields the lines of a table of outcomes, and of a list of the reasons for all that is not right."""
    kinds, width = list(next(iter(results.values()))), max(map(len, results)) + 1
    yield from (f"{number:>2}  {kind}" for number, kind in enumerate(kinds, 1))
    yield "\n" + " " * width + "".join(f"{number:<6}" for number in range(1, len(kinds) + 1)).rstrip()
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, outcomes in results.items():
        cells = ["-" if outcome.verdict == "refused" else outcome.verdict for outcome in outcomes.values()]
        yield (f"{name:<{width}}" + "".join(f"{cell:<6}" for cell in cells)).rstrip()
        for kind, outcome in outcomes.items():
            if outcome.verdict != "right":
                reasons.setdefault((outcome.verdict, outcome.reason), {}).setdefault(kind, []).append(name)
    for (verdict, reason), places in sorted(reasons.items()):
        yield f"\n{verdict}: {reason}"
        yield from (f"    {kind}: {', '.join(names)}" for kind, names in places.items())
    verdicts = [outcome.verdict for outcomes in results.values() for outcome in outcomes.values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("right", "refused", "WRONG"))
    yield f"\n{len(results)} templates: {counts}"
