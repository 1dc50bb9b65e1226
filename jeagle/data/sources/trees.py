"""Assembles conversations from message trees, as OpenAssistant (oasst1, oasst2) publishes them.

A prompt may have several answers, and each of them several replies. The conversation of a tree is the path of the best
ranks: from the root on, the reply with the lowest rank (0 is the best) follows, or the first one if none is ranked.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from jeagle.data.sources.json_rows import Record

_MESSAGE = {"message_id", "message_tree_id", "role", "text"}


def assemble_trees(records: Iterable[Record]) -> Iterator[Record]:
    """Yields one record for each tree, and other records unchanged. The rows of a tree must follow one another."""
    tree: list[Record] = []
    for record in records:
        row = record.row if isinstance(record.row, dict) else {}
        number = row["message_tree_id"] if row.keys() >= _MESSAGE else None
        if tree and tree[0].row["message_tree_id"] != number:
            yield _best_path(tree)
            tree = []
        if number is not None:
            tree.append(record)
        elif isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
            nodes = [Record(record.where, node) for node in _flat(row["prompt"], str(row.get("message_tree_id")))]
            yield _best_path(nodes)
        else:
            yield record
    if tree:
        yield _best_path(tree)


def _flat(node: dict[str, Any], parent: str) -> Iterator[dict[str, Any]]:
    """Yields the messages of a nested tree, each with its parent."""
    waiting = [(node, parent)]
    while waiting:
        node, parent = waiting.pop()
        yield node | {"parent_id": parent}
        waiting += [(reply, str(node.get("message_id"))) for reply in reversed(node.get("replies") or [])]


def _best_path(tree: list[Record]) -> Record:
    """Returns the record of a tree's conversation; its places are those of the tree's first row."""
    replies: dict[Any, list[dict[str, Any]]] = {}
    ids = {record.row.get("message_id") for record in tree}
    for record in tree:
        parent = record.row.get("parent_id")
        if not record.row.get("deleted"):
            replies.setdefault(parent if parent in ids else None, []).append(record.row)
    path: list[dict[str, Any]] = []
    level = replies.pop(None, [])
    if len(level) > 1:
        reason = "the messages of a tree do not follow one another: sort the rows by message_tree_id"
        return Record(tree[0].where, None, reason)
    while level:
        ranks = [(node.get("rank") is None, node.get("rank") or 0) for node in level]
        path.append(level[ranks.index(min(ranks))])
        level = replies.pop(path[-1].get("message_id"), [])
    turns = [{"role": node.get("role"), "content": node.get("text")} for node in path]
    return Record(tree[0].where, {"messages": turns, "other_branches": len(tree) - len(path) or None})
