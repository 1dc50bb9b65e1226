"""A target's tokenizer, from its folder or built from a GGUF's metadata. No torch is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jeagle.errors import UserError
from jeagle.targets.reference import TargetFiles
from jeagle.targets.weights import as_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# tokenizer.ggml.token_type, from llama.cpp's llama_token_type.
_CONTROL, _USER_DEFINED = 3, 4
# tokenizer.ggml.pre -> whether digits are split singly before GPT-2's own split. From llama.cpp's llama-vocab.cpp.
_SINGLE_DIGITS = {"smollm": True, "gpt-2": False}


def load_tokenizer(files: TargetFiles) -> PreTrainedTokenizerFast:
    """The tokenizer of a target, with its chat template and its special tokens.

    For a GGUF, a tokenizer.json beside the file wins over the file's own metadata.

    Raises:
      UserError: where the folder has no fast tokenizer, or the GGUF's kind of tokenizer is not supported.
    """
    # Without this, transformers prints at import that PyTorch is missing, which is as it should be here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if files.format == "safetensors":
        return _from_folder(files.path)
    if (files.path.parent / "tokenizer.json").is_file():
        return _from_folder(files.path.parent)
    return _from_gguf(files.path)


def end_token_ids(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer, ascending: by the tokenizer, by the configuration, and by the chat template.

    Args:
      config: a WeightSource's config: its eos_token_id includes that of generation_config.json.
    """
    turn_end = chat_turn_end(tokenizer)
    return tuple(sorted({*as_ids(tokenizer.eos_token_id), *as_ids(config.get("eos_token_id")), *as_ids(turn_end)}))


def chat_turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of the special token that the chat template writes right after an answer; None if it writes none."""
    if not tokenizer.chat_template:
        return None
    answer = "jeagle's answer"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may refuse this chat in any way that Jinja allows; then it tells nothing
        return None
    _, found, tail = text.rpartition(answer)
    ids = tokenizer(tail, add_special_tokens=False).input_ids if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for files that are missing or broken
        raise UserError(
            f"The target's tokenizer in {folder} cannot be loaded ({error}): copy the model's own tokenizer.json and "
            "tokenizer_config.json there."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The target {folder} has no tokenizer.json: copy the model's own there.")
    return tokenizer


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    from jeagle.targets.gguf_reader import open_gguf

    header = open_gguf(path).metadata
    model, pre = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _SINGLE_DIGITS:
        raise UserError(
            f"The target {path} has a tokenizer of model {model!r} and pre {pre!r}; supported in GGUF are model 'gpt2' "
            f"with pre {', '.join(map(repr, _SINGLE_DIGITS))}: put the model's tokenizer.json and "
            "tokenizer_config.json beside the file."
        )
    tokens = header["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {short: header.get(f"tokenizer.ggml.{name}_token_id") for name, short in names.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(header, single_digits=_SINGLE_DIGITS[pre]),
        chat_template=header.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=header.get(f"{header['general.architecture']}.context_length"),
        **{f"{short}_token": tokens[i] for short, i in ids.items() if i is not None},
    )
    if header.get("tokenizer.ggml.add_bos_token", False):
        _put_bos_first(tokenizer)
    return tokenizer


def _byte_level_bpe(header: Mapping[str, Any], *, single_digits: bool) -> Tokenizer:
    """GPT-2's tokenizer over the file's tokens and merges, special tokens taken whole."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in header["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    split = pre_tokenizers.ByteLevel(add_prefix_space=bool(header.get("tokenizer.ggml.add_space_prefix", False)))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    whole = {_CONTROL: tokenizer.add_special_tokens, _USER_DEFINED: tokenizer.add_tokens}
    for token, kind in zip(tokens, header["tokenizer.ggml.token_type"], strict=True):
        if kind in whole:
            whole[kind]([AddedToken(token, normalized=False)])
    return tokenizer


def _put_bos_first(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
