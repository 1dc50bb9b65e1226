"""Answers from any OpenAI-compatible server, many at a time: retried, resumed, each prompt answered once."""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from jeagle.data.answer_file import PARTIAL
from jeagle.data.texts import with_system
from jeagle.errors import UserError
from jeagle.runtime.manifest import atomic_write

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # what may be better a moment later
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_BROKEN = (OSError, http.client.HTTPException)


@dataclasses.dataclass(frozen=True)
class Server:
    """A server and how it is asked.

    Attributes:
      url: up to and with /v1. model: as the server calls it. key: sent as a bearer token, where it is not empty.
      concurrency: prompts under way at once. retries: attempts after the first, for one prompt.
      timeout: seconds that one answer may take. max_new_tokens, temperature: of an answer.
      system_prompt: shown where a prompt has none.
      first_pause: seconds before the first retry; each further one waits twice as long, up to 30 s.
      more: further fields of each request, such as top_p.
    """

    url: str
    model: str
    key: str = ""
    concurrency: int = 64
    retries: int = 8
    timeout: float = 600.0
    max_new_tokens: int = 2048
    temperature: float = 0.0
    system_prompt: str | None = None
    first_pause: float = _FIRST_PAUSE
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ServerError(Exception):
    """A request that the server refuses for what it asks: trying again would not help."""


def answer(
    server: Server,
    prompts: Sequence[dict[str, Any]],
    partial: Path,
    key: str,
    on_done: Callable[[int, int], None] = lambda done, refused: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Answers each prompt ({"id", "messages"[, "tools"]}) that `partial` does not hold yet, appending to it.

    Args:
      partial: a jsonl file that grows by one line for each answer, so that a stopped run goes on where it was.
      key: what the answers depend on; a file that was begun with another one is refused.

    Returns:
      ({id: row with the answer, finish_reason and model}, {id: why the server refuses the prompt}).

    Raises:
      UserError: when the server is out of reach, gives no such answers, or fails for one prompt again and again.
    """
    rows, refused = read_partial(partial, key), {}
    waiting = [prompt for prompt in prompts if prompt["id"] not in rows]
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps({"key": key}) + "\n")
        for prompt, result in _ask_all(server, waiting):
            if isinstance(result, ServerError):
                refused[prompt["id"]] = str(result)
            else:
                rows[prompt["id"]] = row = prompt | result
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
            on_done(len(rows), len(refused))
    return rows, refused


def read_partial(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """{id: row} of an unfinished file, a last line that was cut off left out. UserError if it was made otherwise."""
    if not path.is_file():
        return {}
    whole = path.read_bytes().split(b"\n")[:-1]
    try:
        first, *rows = map(json.loads, whole)
        if first["key"] != key:
            raise ValueError
        found = {row["id"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} was begun with another model or other settings, or is broken: delete it to start anew."
        ) from error
    atomic_write(path, b"".join(line + b"\n" for line in whole), PARTIAL)
    return found


def _ask_all(server: Server, prompts: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
    """(prompt, its answer or ServerError), as they come. At most `concurrency` prompts are under way."""
    upcoming, stop = iter(prompts), threading.Event()
    asker = _Asker(server, stop)
    with ThreadPoolExecutor(server.concurrency, "answers") as pool:
        under_way: dict[Future, dict[str, Any]] = {}
        try:
            while True:
                while len(under_way) < server.concurrency and (prompt := next(upcoming, None)) is not None:
                    under_way[pool.submit(asker.ask, prompt)] = prompt
                if not under_way:
                    return
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    prompt = under_way.pop(done)
                    try:
                        yield prompt, done.result()
                    except ServerError as error:
                        yield prompt, error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


class _Asker:
    """Asks for one answer; each thread keeps its connection."""

    def __init__(self, server: Server, stop: threading.Event):
        self._server, self._stop, self._local = server, stop, threading.local()
        parts = urllib.parse.urlsplit(server.url if "//" in server.url else f"http://{server.url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--server {server.url} is no address: give one such as http://localhost:30000/v1.")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/") + "/chat/completions"

    def ask(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """{"messages" with the answer, "finish_reason", "model"}."""
        pause, why, status = self._server.first_pause, "", 0
        for attempt in range(self._server.retries + 1):
            if attempt:
                self._stop.wait(pause * (0.5 + random.random()))  # spread, so that all do not come back at once
                pause = min(pause * 2, _LONGEST_PAUSE)
            if self._stop.is_set():
                raise UserError("The answers were stopped.")
            try:
                status, headers, body = self._post(prompt)
            except _BROKEN as error:
                self._close()
                status, why = 0, f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                try:
                    return self._answer(prompt, json.loads(body))
                except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                    why = f"an answer that cannot be read ({error!r})"
                    continue
            why = f"status {status}: {body[:200].decode('utf-8', 'replace').strip()}"
            if status not in _AGAIN:
                if status in (401, 403, 404):
                    raise UserError(f"The server {self._server.url} refuses model {self._server.model!r} ({why}).")
                raise ServerError(why)
            pause = max(pause, _seconds(headers.get("Retry-After")))
        if status == 200:  # it is well, and has nothing to say
            raise ServerError(why)
        raise UserError(
            f"The server {self._server.url} failed {self._server.retries + 1} times for one prompt (last: {why}). What "
            "was answered is kept: the same command goes on from there."
        )

    def _post(self, prompt: dict[str, Any]) -> tuple[int, Any, bytes]:
        body = {
            "model": self._server.model,
            "messages": with_system(prompt["messages"], self._server.system_prompt),
            "max_tokens": self._server.max_new_tokens,
            "temperature": self._server.temperature,
            **self._server.more,
            **({"tools": prompt["tools"]} if prompt.get("tools") else {}),
        }
        if "thinking" in prompt:  # as SGLang and vLLM hand it to templates, by Qwen's and DeepSeek's names
            body["chat_template_kwargs"] = dict.fromkeys(("enable_thinking", "thinking"), prompt["thinking"])
        headers = {"Content-Type": "application/json"}
        if self._server.key:
            headers["Authorization"] = f"Bearer {self._server.key}"
        connection = self._connection()
        connection.request("POST", self._path, json.dumps(body).encode(), headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    def _answer(self, prompt: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
        choice = tree["choices"][0]
        said = choice["message"]
        reply: dict[str, Any] = {"role": "assistant", "content": said.get("content") or ""}
        for name in ("reasoning_content", "reasoning", "tool_calls"):
            if said.get(name):
                reply["reasoning_content" if name == "reasoning" else name] = said[name]
        if len(reply) == 2 and not reply["content"].strip() and choice.get("finish_reason") != "length":
            raise ValueError("it is empty")
        return {
            "messages": [*prompt["messages"], reply],
            "finish_reason": choice.get("finish_reason"),
            "model": tree.get("model") or self._server.model,
        }

    def _connection(self) -> http.client.HTTPConnection:
        if getattr(self._local, "connection", None) is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            self._local.connection = kind(self._host, self._port, timeout=self._server.timeout)
        return self._local.connection

    def _close(self) -> None:
        if getattr(self._local, "connection", None) is not None:
            self._local.connection.close()
            self._local.connection = None


def _seconds(text: str | None) -> float:
    try:
        return min(max(float(text or 0), 0.0), _LONGEST_PAUSE)
    except ValueError:  # a date; the growing pause will do
        return 0.0
