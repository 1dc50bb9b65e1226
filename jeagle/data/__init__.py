"""Conversations -> token rows -> packed batches; the draft vocabulary."""

from jeagle.data.answer_file import ANSWER_FILES, VARIETY, AnswerFile, beside
from jeagle.data.answers import ConversationError
from jeagle.data.build import ROWS, build
from jeagle.data.chat_templates import TEMPLATES, from_headers, reads_date, use_template
from jeagle.data.conversations import Conversation, Reading, read_conversations, read_source, split_held_out
from jeagle.data.describe import describe
from jeagle.data.near_duplicates import variety
from jeagle.data.openai_client import Server, answer
from jeagle.data.pack import Packed, RowWriter, load_rows, pack, rows_of, save_rows, unpack
from jeagle.data.preview_rows import PAGE, html_page, metrics, pieces, terminal_row, token_texts
from jeagle.data.prompts import read_prompts, read_rows
from jeagle.data.render import Rendered, Renderer, render
from jeagle.data.self_instruct import Turns, requests, turns_of
from jeagle.data.sources import SOURCES, parse_source, source_fingerprint, starter_answers
from jeagle.data.split_writer import Shape
from jeagle.data.stream import RowStream
from jeagle.data.texts import Rules, parse_arguments, render_prompt, template_hash, tokenizer_hash
from jeagle.data.vocabulary import TABLES, choose, count_tokens, coverage, given_map, ids_hash, load_tables, save_tables

__all__ = [
    "ANSWER_FILES",
    "PAGE",
    "ROWS",
    "SOURCES",
    "TABLES",
    "TEMPLATES",
    "VARIETY",
    "AnswerFile",
    "Conversation",
    "ConversationError",
    "Packed",
    "Reading",
    "Rendered",
    "Renderer",
    "RowStream",
    "RowWriter",
    "Rules",
    "Server",
    "Shape",
    "Turns",
    "answer",
    "beside",
    "build",
    "choose",
    "count_tokens",
    "coverage",
    "describe",
    "from_headers",
    "given_map",
    "html_page",
    "ids_hash",
    "load_rows",
    "load_tables",
    "metrics",
    "pack",
    "parse_arguments",
    "parse_source",
    "pieces",
    "read_conversations",
    "read_prompts",
    "read_rows",
    "read_source",
    "reads_date",
    "render",
    "render_prompt",
    "requests",
    "rows_of",
    "save_rows",
    "save_tables",
    "source_fingerprint",
    "split_held_out",
    "starter_answers",
    "template_hash",
    "terminal_row",
    "token_texts",
    "tokenizer_hash",
    "turns_of",
    "unpack",
    "use_template",
    "variety",
]
