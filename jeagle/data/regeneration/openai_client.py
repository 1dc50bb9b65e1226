"""Asks any OpenAI-compatible server for answers, many at a time, with retries; every turn is answered once."""

import contextlib
import dataclasses
import json
import random
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx2

from jeagle.data.chat.parse_answer import parse_answer
from jeagle.data.chat.templates import ConversationError
from jeagle.data.regeneration.dialogue import SAMPLED, WITHOUT_TURNS, Dialogue, read_back
from jeagle.data.regeneration.prompts import AnswerFile, Row
from jeagle.errors import UserError

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses of failures that may be temporary
_LONGEST_PAUSE = 30.0  # seconds
_IDS = "return_token_ids"  # the field with which vLLM and SGLang are asked for token ids


@dataclasses.dataclass(frozen=True)
class AnswerServer:
    """A server, and how it is asked.

    Attributes:
      url: the address of the API, /v1 included.
      model: the model's name on the server.
      key: sent as a bearer token if it is not empty.
      concurrency: number of requests at the same time.
      retries: attempts for one prompt after the first one.
      timeout: seconds without a sign of the server after which a request has failed.
      first_pause: seconds before the first retry; every further pause is twice as long, up to 30 s.
      system_prompt: added to prompts that have none.
      fields: further fields of every request, such as max_tokens and temperature.
      prompt_ids: renders messages, with tools and the thinking switch, to the ids that the target reads. If it is
        given, the server is asked for token ids (`return_token_ids` of vLLM and SGLang), which are kept if the server
        read the very same prompt.
      sampled_with: TOKENIZER_HASH/TEMPLATE_HASH of `prompt_ids`.
      template: the target's chat template; empty if it is not known.
    """

    url: str
    model: str
    key: str = ""
    concurrency: int = 64
    retries: int = 8
    timeout: float = 600.0
    first_pause: float = 0.5
    system_prompt: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_ids: Callable[[Sequence[Row], Sequence[Row], bool], Sequence[int]] | None = None
    sampled_with: str = ""
    template: str = ""


class RequestRefusedError(Exception):
    """The server refuses a prompt, and trying again would not help."""


def ask_server(
    server: AnswerServer,
    prompts: Sequence[Row],
    file: AnswerFile,
    on_done: Callable[[int, int], None] = lambda done, refused: None,
) -> tuple[dict[str, Row], dict[str, str]]:
    """Asks for the answers to each prompt that the unfinished `file` does not contain yet, and appends them to it.

    Args:
      prompts: {"id", "messages"}, optionally with "tools" and "thinking".
      on_done: called with the numbers of answered and refused prompts.

    Returns:
      ({id: the row of its `Dialogue`, with the model}, {id: why the server refuses its first turn}).

    Raises:
      UserError: if the server cannot be reached, if it does not give answers of this kind, or if it fails again and
        again for one prompt.
    """
    rows, refused, stop = file.unfinished(), {}, threading.Event()
    client = _Client(server, stop)
    with client.http, file.growing() as append, ThreadPoolExecutor(server.concurrency, "answers") as pool:
        try:
            requests = {pool.submit(client.converse, prompt): prompt for prompt in prompts if prompt["id"] not in rows}
            for done in as_completed(requests):
                prompt = requests[done]
                try:
                    rows[prompt["id"]] = done.result()
                    append(rows[prompt["id"]])
                except RequestRefusedError as error:
                    refused[prompt["id"]] = str(error)
                on_done(len(rows), len(refused))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return rows, refused


class _Client:
    """Leads one conversation at a time, from any thread, and retries until `stop` is set.

    Redirects are not followed and proxies are not used, so that the key is sent to the server's address alone.
    """

    def __init__(self, server: AnswerServer, stop: threading.Event):
        self._server, self._stop = server, stop
        try:
            url = httpx2.URL(server.url if "//" in server.url else f"http://{server.url}")
        except httpx2.InvalidURL:
            url = httpx2.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"--server {server.url} is not an address: give one such as http://localhost:30000/v1.")
        if not (server.key.isascii() and server.key.isprintable()):
            raise UserError(
                "The server's key has a line break or another character that HTTP does not allow: set it again."
            )
        self._url, self._wants_ids = f"{str(url).rstrip('/')}/chat/completions", server.prompt_ids is not None
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {server.key}"} if server.key else {}
        self.http = httpx2.Client(
            headers=headers,
            timeout=server.timeout,
            limits=httpx2.Limits(max_connections=server.concurrency, max_keepalive_connections=server.concurrency),
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    def converse(self, prompt: Row) -> Row:
        """Returns the row of a conversation in which the server has answered every turn.

        Raises:
          RequestRefusedError: if it refuses the first one.
        """
        dialogue, more = Dialogue(prompt, self._server.system_prompt), {"model": self._server.model}
        if dialogue.messages[0]["role"] in WITHOUT_TURNS:
            raise RequestRefusedError("a text without turns is no chat")
        while not dialogue.ended:
            try:
                reply, finish_reason, ids, found = self._ask(dialogue, more)
            except RequestRefusedError:
                if not dialogue.turn:
                    raise
                dialogue.stop("the server refuses the next turn")
            else:
                dialogue.answer(reply, finish_reason, ids)
                more |= found
        return dialogue.row() | more

    def _ask(self, dialogue: Dialogue, more: Row) -> tuple[Row, str, list[int] | None, Row]:
        """Returns the answer to the dialogue's last turn, as `_read` does."""
        pause, reason, status = self._server.first_pause, "", 0
        for attempt in range(self._server.retries + 1):
            if attempt:
                self._stop.wait(pause * (0.5 + random.random()))  # random, so that not all retry at the same time
                pause = min(pause * 2, _LONGEST_PAUSE)
            if self._stop.is_set():
                raise UserError("The requests were stopped.")
            try:
                response = self._post(dialogue)
            except httpx2.RequestError as error:
                status, reason = 0, f"{type(error).__name__}: {error}"
                continue
            status = response.status_code
            if status == 200:
                try:
                    return self._read(response.json(), dialogue, more)
                except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                    reason = f"the answer cannot be read: {error!r}"
                    continue
            reason = f"status {status}: {response.text[:200].strip()}"
            if status not in _RETRIED:
                if status in (401, 403, 404):
                    raise UserError(f"The server {self._server.url} refuses model {self._server.model!r} ({reason}).")
                raise RequestRefusedError(reason)
            with contextlib.suppress(ValueError):  # for a date, the growing pauses are enough
                pause = max(pause, min(float(response.headers.get("Retry-After", 0)), _LONGEST_PAUSE))
        if status == 200:  # the server works, but has no answer to this prompt
            raise RequestRefusedError(reason)
        raise UserError(
            f"The server {self._server.url} failed {self._server.retries + 1} times for one prompt (last: {reason}). "
            "The answers so far are saved: the same command continues from there."
        )

    def _post(self, dialogue: Dialogue) -> httpx2.Response:
        request = self._request(dialogue)
        response = self.http.post(self._url, content=json.dumps(request).encode())
        if _IDS not in request or response.status_code not in (400, 422) or _IDS not in response.text:
            return response
        self._wants_ids = False  # this server does not know the field
        return self._post(dialogue)

    def _request(self, dialogue: Dialogue) -> dict[str, Any]:
        request = {"model": self._server.model, "messages": list(map(_sent, dialogue.messages)), **self._server.fields}
        if dialogue.prompt.get("tools"):
            request["tools"] = dialogue.prompt["tools"]
        if "thinking" in dialogue.prompt:  # SGLang and vLLM pass these on to the template, as Qwen and DeepSeek call it
            names = ("enable_thinking", "thinking")
            request["chat_template_kwargs"] = dict.fromkeys(names, dialogue.prompt["thinking"])
        return request | ({_IDS: True} if self._wants_ids else {})

    def _read(self, tree: dict[str, Any], dialogue: Dialogue, more: Row) -> tuple[Row, str, list[int] | None, Row]:
        """Returns (the answer, its finish reason, its token ids if they are known, more fields of the row)."""
        choice, tools = tree["choices"][0], dialogue.prompt.get("tools", ())
        message, finish_reason = choice["message"], choice.get("finish_reason") or "stop"
        given = {"reasoning_content": message.get("reasoning_content") or message.get("reasoning")}
        given |= {"tool_calls": message.get("tool_calls")}
        given = {name: value for name, value in given.items() if value}
        content = message.get("content") or ""
        reply = parse_answer(content, template=self._server.template, tools=() if "tool_calls" in given else tools)
        if given.keys() & reply.keys():  # the server's parser has left this text
            reply = {"role": "assistant", "content": content}
        reply |= given
        if given and not reply["content"]:
            reply["content"] = None
        if len(reply) == 2 and not content.strip():
            if finish_reason == "length":
                raise RequestRefusedError("the answer is empty where it is cut off: raise --max-new-tokens")
            raise ValueError("it is empty")
        read_back([reply])
        found = {"model": tree.get("model") or self._server.model}
        ids, read = choice.get("token_ids"), choice.get("prompt_token_ids") or tree.get("prompt_token_ids")
        thinking = self._thinking(dialogue, more.get("thinking"), read) if ids and read else None
        if thinking is None:
            return reply, finish_reason, None, found
        found |= {"thinking": thinking} if "thinking" in self._server.template else {}
        return reply, finish_reason, ids, found | {"sampled_with": self._server.sampled_with}

    def _thinking(self, dialogue: Dialogue, known: bool | None, read: list[int]) -> bool | None:
        """Returns the thinking switch with which the server has rendered this prompt; None if neither gives its ids."""
        known, render = dialogue.prompt.get("thinking", known), self._server.prompt_ids
        for thinking in (True, False) if known is None else (known,):
            with contextlib.suppress(ConversationError):
                if render and list(render(dialogue.messages, dialogue.prompt.get("tools", ()), thinking)) == read:
                    return thinking
        return None


def _sent(message: Row) -> Row:
    """Returns a message as it is sent: reasoning has two names, of which servers know at least one."""
    sent = {name: value for name, value in message.items() if name not in SAMPLED}
    return sent | ({"reasoning": message["reasoning_content"]} if "reasoning_content" in message else {})
