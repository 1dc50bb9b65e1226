"""Short ways to read, render and pack small data in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jeagle.config import DataConfig
from jeagle.data import ConversationError, Rendered, RowWriter, parse_source, rows_of
from jeagle.data.chat.render import Renderer
from jeagle.data.rows import Packer
from jeagle.data.sources.conversations import Conversation, SourceReport, is_held_out, read_source
from jeagle.interfaces import Batch


@dataclasses.dataclass
class Read(SourceReport):
    """All conversations of a source, and the report on them."""

    conversations: list[Conversation] = dataclasses.field(default_factory=list)


def read_conversations(
    source: str, *, streaming: bool = False, columns: str = "", bad_share: float = 0.01, log: Any = None
) -> Read:
    """Reads a whole source. UserError if too much of it is rejected."""
    read = Read(bad_share=bad_share, log=log)
    read.conversations.extend(read_source(parse_source(source, columns), read, streaming=streaming))
    read.check()
    return read


def split_held_out(
    conversations: Iterable[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Returns (training conversations, held-out conversations)."""
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        sides[is_held_out(conversation, share)].append(conversation)
    return sides


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    end_token_ids: Sequence[int],
    truncated: bool = False,
    check_ids: bool = False,
    **settings: Any,
) -> Rendered:
    """Renders one conversation as one document. ConversationError if that is not possible."""
    config = DataConfig(**{"rewritten": "reject"} | settings)
    messages = [*messages[:-1], messages[-1] | {"cut": True}] if truncated else messages
    conversation = Conversation("", tuple(messages))
    [documents] = Renderer(tokenizer, config, end_token_ids)([conversation], [check_ids])
    if isinstance(documents, ConversationError):
        raise documents
    return documents[0]


class Packed(NamedTuple):
    """Rows [B, T], and the packer that made them, which counts what happened to long documents."""

    rows: Batch
    packer: Packer


def pack(documents: Iterable[Rendered], row_length: int, long: Any = "cut") -> Packed:
    """Packs documents into rows in memory."""
    packer = Packer(row_length, long)
    groups = [group for document in documents for group in packer.add(document)] + packer.finish()
    return Packed(rows_of(groups, row_length), packer)


def save_rows(rows: Batch, folder: Path) -> None:
    """Saves rows as `load_rows` loads them."""
    with RowWriter(folder, rows.tokens_BT.shape[1]) as writer:
        writer.write(rows)
