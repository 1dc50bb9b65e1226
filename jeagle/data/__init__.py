"""Conversations -> token rows -> packed batches; the draft vocabulary."""

from jeagle.data.conversations import (
    Conversation,
    read_conversations,
    read_prompts,
    read_rows,
    split_held_out,
    starter_answers,
)
from jeagle.data.pack import Packed, load_rows, pack, save_rows, unpack
from jeagle.data.render import ConversationError, Rendered, render, render_prompt, template_hash, tokenizer_hash
from jeagle.data.stream import RowStream
from jeagle.data.vocabulary import choose, count_tokens, coverage, load_tables, save_tables

__all__ = [
    "Conversation",
    "ConversationError",
    "Packed",
    "Rendered",
    "RowStream",
    "choose",
    "count_tokens",
    "coverage",
    "load_rows",
    "load_tables",
    "pack",
    "read_conversations",
    "read_prompts",
    "read_rows",
    "render",
    "render_prompt",
    "save_rows",
    "save_tables",
    "split_held_out",
    "starter_answers",
    "template_hash",
    "tokenizer_hash",
    "unpack",
]
