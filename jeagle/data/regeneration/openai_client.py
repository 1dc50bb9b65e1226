"""Asks any OpenAI-compatible server for answers, many at a time, with retries; every prompt is answered once."""

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

from jeagle.data.chat.templates import with_system
from jeagle.data.regeneration.prompts import AnswerFile, Row
from jeagle.errors import UserError

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses of failures that may be temporary
_LONGEST_PAUSE = 30.0  # seconds


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


class RequestRefusedError(Exception):
    """The server refuses a prompt, and trying again would not help."""


def ask_server(
    server: AnswerServer,
    prompts: Sequence[Row],
    file: AnswerFile,
    on_done: Callable[[int, int], None] = lambda done, refused: None,
) -> tuple[dict[str, Row], dict[str, str]]:
    """Asks for an answer to each prompt that the unfinished `file` does not contain yet, and appends it to the file.

    Args:
      prompts: {"id", "messages"}, optionally with "tools" and "thinking".
      on_done: called with the numbers of answered and refused prompts.

    Returns:
      ({id: the prompt's row with the answer, finish_reason and model}, {id: why the server refuses the prompt}).

    Raises:
      UserError: if the server cannot be reached, if it does not give answers of this kind, or if it fails again and
        again for one prompt.
    """
    rows, refused, stop = file.unfinished(), {}, threading.Event()
    client = _Client(server, stop)
    with client.http, file.growing() as append, ThreadPoolExecutor(server.concurrency, "answers") as pool:
        try:
            requests = {pool.submit(client.ask, prompt): prompt for prompt in prompts if prompt["id"] not in rows}
            for done in as_completed(requests):
                prompt = requests[done]
                try:
                    rows[prompt["id"]] = prompt | done.result()
                    append(rows[prompt["id"]])
                except RequestRefusedError as error:
                    refused[prompt["id"]] = str(error)
                on_done(len(rows), len(refused))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return rows, refused


class _Client:
    """Asks for one answer at a time, from any thread, and retries until `stop` is set.

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
        self._url = f"{str(url).rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {server.key}"} if server.key else {}
        self.http = httpx2.Client(
            headers=headers,
            timeout=server.timeout,
            limits=httpx2.Limits(max_connections=server.concurrency, max_keepalive_connections=server.concurrency),
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    def ask(self, prompt: Row) -> Row:
        """Returns {"messages" with the answer, "finish_reason", "model"}."""
        pause, reason, status = self._server.first_pause, "", 0
        content = json.dumps(self._request(prompt)).encode()
        for attempt in range(self._server.retries + 1):
            if attempt:
                self._stop.wait(pause * (0.5 + random.random()))  # random, so that not all retry at the same time
                pause = min(pause * 2, _LONGEST_PAUSE)
            if self._stop.is_set():
                raise UserError("The requests were stopped.")
            try:
                response = self.http.post(self._url, content=content)
            except httpx2.RequestError as error:
                status, reason = 0, f"{type(error).__name__}: {error}"
                continue
            status = response.status_code
            if status == 200:
                try:
                    return self._answer(prompt, response.json())
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

    def _request(self, prompt: Row) -> dict[str, Any]:
        request = {
            "model": self._server.model,
            "messages": with_system(prompt["messages"], self._server.system_prompt),
            **self._server.fields,
        }
        if prompt.get("tools"):
            request["tools"] = prompt["tools"]
        if "thinking" in prompt:  # SGLang and vLLM pass these on to the template; the names are Qwen's and DeepSeek's
            request["chat_template_kwargs"] = dict.fromkeys(("enable_thinking", "thinking"), prompt["thinking"])
        return request

    def _answer(self, prompt: Row, tree: dict[str, Any]) -> Row:
        choice = tree["choices"][0]
        message = choice["message"]
        reply: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
        for name in ("reasoning_content", "reasoning", "tool_calls"):
            if message.get(name):
                reply["reasoning_content" if name == "reasoning" else name] = message[name]
        if len(reply) == 2 and not reply["content"].strip() and choice.get("finish_reason") != "length":
            raise ValueError("it is empty")
        return {
            "messages": [*prompt["messages"], reply],
            "finish_reason": choice.get("finish_reason"),
            "model": tree.get("model") or self._server.model,
        }
