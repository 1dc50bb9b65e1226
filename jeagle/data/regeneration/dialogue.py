"""A conversation whose answers a target generates one after another, each after its own answers so far."""

from collections.abc import Sequence
from typing import Any

from jeagle.data.chat.templates import with_system
from jeagle.data.sources.schema import Columns, messages_of
from jeagle.runtime.manifest import fingerprint

Row = dict[str, Any]
WITHOUT_TURNS = ("text", "ids")  # the roles of messages that are a row of their own
SAMPLED = ("finish_reason", "sampled_ids", "sampled_hash")  # fields of an answer that tell how it was sampled


class Dialogue:
    """Decides what the target is asked next.

    Every turn of the user is answered. Tool results come from the prompt's row; they are used if the target calls the
    same tools as the answer that they follow there. If it calls others, or none, the conversation ends there, because
    later turns would not fit.

    Args:
      prompt: {"id", "messages"} and further fields, as `read_prompts` returns them with every turn. The answers in it
        are not used; their calls tell to what the tool results belong.
      system_prompt: added if the prompt has none.

    Attributes:
      messages: the turns so far. If `ended` is false, the target is to answer them.
      prompt_ids: the token ids that the target has read before the next answer, if the caller knows them.
      ended: whether there is nothing more to answer.
      stopped: why the conversation ends before its last turn; empty if it does not.
    """

    def __init__(self, prompt: Row, system_prompt: str | None = None):
        self.prompt, self.stopped = prompt, ""
        self.messages: list[Row] = []
        self.prompt_ids: list[int] = []
        self._left = with_system(prompt["messages"], system_prompt)
        self.ended = not self._next_question()

    @property
    def turn(self) -> int:
        """The number of answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def answer(self, reply: Row, finish_reason: str, sampled_ids: list[int] | None = None) -> None:
        """Appends the target's answer, and the turns up to the next question.

        Args:
          reply: {"role", "content"} and, if it has them, "reasoning_content" and "tool_calls".
          sampled_ids: the token ids of the answer, if they are known.
        """
        reply = reply | {"finish_reason": finish_reason}
        calls = [
            {"id": f"call{len(self.messages):03}{n:02}"} | call for n, call in enumerate(reply.get("tool_calls", ()))
        ]
        if calls:
            reply["tool_calls"] = calls
        if sampled_ids is not None:
            reply |= {"sampled_ids": sampled_ids, "sampled_hash": fingerprint(sampled_ids)}
        self.messages.append(reply)
        expected, results = self._take_answer()
        if results and calls and _names(calls) == _names(expected):
            self.messages += _with_ids(results, expected, calls)
            return
        left = any(message["role"] == "user" for message in self._left)
        if results and calls:
            self.stop("the target calls other tools than the row, which has no results for them")
        elif results:
            self.stop("the target calls no tool where the row has results of one")
        elif calls and left:
            self.stop("the target calls a tool, and the row has no result")
        else:
            self.ended = not self._next_question()

    def stop(self, reason: str) -> None:
        """Ends the conversation before its last turn; its last unanswered turns are removed."""
        while self.messages and self.messages[-1]["role"] != "assistant":
            self.messages.pop()
        self.stopped, self.ended = reason, True

    def row(self) -> Row:
        """Returns the prompt's row with the conversation so far in place of its own.

        A text without turns becomes a row of token ids with a mask, of which the answer is supervised.
        """
        row = {name: value for name, value in self.prompt.items() if name not in ("where", "messages")}
        answer = self.messages[-1]
        if self.messages[0]["role"] in WITHOUT_TURNS:
            ids = answer["sampled_ids"]
            row |= {"input_ids": self.prompt_ids + ids, "loss_mask": [0] * len(self.prompt_ids) + [1] * len(ids)}
        else:
            row["messages"] = self.messages
        return row | {"finish_reason": answer["finish_reason"]} | ({"stopped": self.stopped} if self.stopped else {})

    def _next_question(self) -> bool:
        """Appends the turns up to the user's next one; returns whether there is one."""
        roles = [message["role"] for message in self._left]
        end = next((i for i, role in enumerate(roles) if role not in ("system", "assistant", "tool")), None)
        if end is None:
            return False
        self.messages += [m for m in self._left[: end + 1] if m["role"] not in ("assistant", "tool")]
        self._left = self._left[end + 1 :]
        return True

    def _take_answer(self) -> tuple[list[Row], list[Row]]:
        """Removes the row's own answer from the turns that are left; returns its calls and their results."""
        calls: list[Row] = []
        while self._left and self._left[0]["role"] == "assistant":
            calls += self._left.pop(0).get("tool_calls", ())
        results = []
        while self._left and self._left[0]["role"] == "tool":
            results.append(self._left.pop(0))
        return calls, results


def read_back(messages: Sequence[Row]) -> list[Row]:
    """Returns messages as `prepare` reads them from a row.

    Raises:
      ValueError: if `prepare` would reject the row.
    """
    if messages[0]["role"] in WITHOUT_TURNS:
        return list(messages)
    return messages_of({"messages": list(messages)}, Columns(chat="messages"))


def _names(calls: list[Row]) -> list[str]:
    return [call["function"]["name"] for call in calls]


def _with_ids(results: list[Row], expected: list[Row], calls: list[Row]) -> list[Row]:
    """Returns the results of the row's own calls as results of the target's calls."""
    numbers = {call["id"]: i for i, call in enumerate(expected) if "id" in call}
    places = [numbers.get(result.get("tool_call_id", ""), min(i, len(calls) - 1)) for i, result in enumerate(results)]
    return [result | {"tool_call_id": calls[i]["id"]} for i, result in zip(places, results, strict=True)]
