"""Loads a target's tokenizer from its folder or from a GGUF's metadata; torch is not needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jeagle.errors import UserError
from jeagle.targets.checkpoint.reference import TargetFiles
from jeagle.targets.checkpoint.weights import as_ids, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(files: TargetFiles) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a target, with its chat template and its special tokens.

    A tokenizer.json takes precedence over a tokenizer.model in the folder, and over the metadata of a GGUF beside it.

    Raises:
      UserError: if there is no tokenizer, if its kind is not supported, or if it belongs to another model, in that it
        has tokens for which the target has no embedding.
    """
    folder = files.path if files.format == "safetensors" else files.path.parent
    if files.format == "gguf":  # the gguf package takes a second to import
        from jeagle.targets.gguf.reader import open_gguf
        from jeagle.targets.gguf.tokenizer import gguf_tokenizer
    if files.format == "gguf" and not (folder / "tokenizer.json").is_file():
        tokenizer = gguf_tokenizer(files.path)
    else:
        tokenizer = _from_folder(folder)
    if files.format == "gguf":
        embedding = open_gguf(files.path).tensors.get("token_embd.weight")
        rows = embedding.shape[0] if embedding else None
    else:
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    # Special tokens without a role may lie beyond the embedding, since only a text that spells them out contains them.
    # (Gemma 3's text models have such a token for images.)
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    added, vocab = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    beyond = {} if rows is None else {i: token for token, i in vocab.items() if i >= rows}
    if any(i in roles or i not in added or not added[i].special for i in beyond):
        raise UserError(
            f"The tokenizer of the target {files.reference} has {max(vocab.values()) + 1} tokens, but the target "
            f"embeds only {rows} ({beyond[min(beyond)]!r} is the first without a row): copy the model's own tokenizer "
            "there."
        )
    return tokenizer


def end_token_ids(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ascending ids that end an answer, by the tokenizer, the configuration or the chat template.

    Args:
      config: of a WeightSource, whose eos_token_id includes that of generation_config.json.
    """
    turn_end = chat_turn_end(tokenizer)
    return tuple(sorted({*as_ids(tokenizer.eos_token_id), *as_ids(config.get("eos_token_id")), *as_ids(turn_end)}))


def chat_turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Returns the id of the added token with which the chat template ends an answer; None if it writes none.

    It is the last one that stands behind an answer whether or not another turn follows: what only an earlier answer has
    may belong to the next turn, and what only the last one has may end the whole text.
    """
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "jeagle's answer"}
    try:
        chats = ([question, answer], [question, answer, question])
        texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
        prompt = str(tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True))
    except (
        Exception
    ):  # a tokenizer may have no template, and a template may refuse these chats with any error of Jinja's
        return None
    tails = [text.rpartition(answer["content"])[2] for text in texts]
    last, earlier = (
        [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in tokenizer.added_tokens_decoder]
        for tail in tails
    )
    shared = [i for i, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False))]
    opening = tokenizer(prompt, add_special_tokens=False).input_ids
    return shared[-1] if shared else next((i for i in last[:1] if i not in opening), None)


def wrap_tokenizer(
    tokenizer: Tokenizer,
    roles: Mapping[str, str],
    *,
    add_bos: bool,
    add_eos: bool,
    chat_template: Any,
    longest: int | None,
) -> PreTrainedTokenizerFast:
    """Returns transformers' tokenizer of a tokenizer of the tokenizers library.

    Args:
      roles: "bos", "eos", "unk" or "pad" -> token; tokens that are not in the vocabulary are left out.
      add_bos, add_eos: whether these tokens, if they exist, are added before and after a text.
      chat_template: Jinja, or name -> Jinja, or None.
      longest: the longest sequence that the model was made for, in tokens.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    known = {role: token for role, token in roles.items() if tokenizer.token_to_id(token) is not None}
    around = {role: known[role] for role, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted and role in known}
    if around:
        first, last = f"{around['bos']} " if "bos" in around else "", f" {around['eos']}" if "eos" in around else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}$A{last}",
            pair=f"{first}$A{last} {first}$B{last}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around.values()],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
        **{f"{role}_token": token for role, token in known.items()},
    )


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = {name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).is_file()}
    if not files:
        raise UserError(
            f"The target folder {folder} has no tokenizer (neither tokenizer.json nor tokenizer.model): copy the "
            "model's own there."
        )
    if files == {"tokenizer.model"}:
        from jeagle.targets.tokenizers.sentencepiece import sentencepiece_folder

        return sentencepiece_folder(folder)
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            settings = folder / "tokenizer_config.json"
            if not (settings.is_file() and read_json(settings).get("auto_map")):
                raise
            # The folder names a class of its own, whose code is never run; a tokenizer.json does not need it.
            if "tokenizer.json" not in files:
                raise UserError(
                    f"The target's tokenizer in {folder} needs Python code of that folder, which jeagle never runs: "
                    "put the tokenizer.json of the same model there."
                ) from error
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for files that are missing or damaged
        raise UserError(
            f"The target's tokenizer in {folder} cannot be loaded ({error}): copy the model's own tokenizer.json and "
            "tokenizer_config.json there."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The target {folder} has no tokenizer.json: copy the model's own there.")
    return tokenizer
