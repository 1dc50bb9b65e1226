"""Against a real HTTP server that drops connections, is too busy, fails, and dies: each prompt is answered once."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jeagle import regenerate
from jeagle.data import AnswerFile, AnswerServer, ask_server
from jeagle.errors import UserError
from jeagle.runtime.manifest import fingerprint
from tests.data.helpers import read_conversations

PROMPTS = [{"id": f"{i:03}", "messages": [{"role": "user", "content": f"prompt {i}"}]} for i in range(60)]


class Fake:
    """Answers with the prompt turned round. `trouble(text, attempt)` says what goes wrong: a status, "drop", "half"."""

    def __init__(self, trouble=lambda text, attempt: None, finish="stop", say=lambda text: text[::-1]):
        self.asked, self.most, self.now = collections.Counter(), 0, 0
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with lock:
                    fake.asked[text] += 1
                    fake.now += 1
                    fake.most = max(fake.most, fake.now)
                    wrong = trouble(text, fake.asked[text])
                try:
                    self.reply(text, body, wrong)
                finally:
                    with lock:
                        fake.now -= 1

            def reply(self, text, body, wrong):
                if wrong == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                message = {"role": "assistant", "content": say(text)}
                tree = {"model": body["model"], "choices": [{"message": message, "finish_reason": finish}]}
                data = json.dumps(tree if not isinstance(wrong, int) else {"error": "no"}).encode()
                self.send_response(wrong if isinstance(wrong, int) else 200)
                if wrong == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if wrong == "half":
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def server(url: str, **more) -> AnswerServer:
    return AnswerServer(url, "m", **({"concurrency": 8, "first_pause": 0.01, "timeout": 20.0, "retries": 6} | more))


def answer_file(out) -> AnswerFile:
    return AnswerFile(out, {"model": "m"})


def check(rows: dict, partial) -> None:
    assert sorted(rows) == [p["id"] for p in PROMPTS]
    for prompt in PROMPTS:
        row = rows[prompt["id"]]
        assert row["messages"] == [
            *prompt["messages"],
            {"role": "assistant", "content": prompt["messages"][0]["content"][::-1], "finish_reason": "stop"},
        ]
        assert row["finish_reason"] == "stop" and row["model"] == "m"
    written = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert sorted(row["id"] for row in written) == sorted(rows)  # none twice


def test_every_prompt_is_answered_once_in_spite_of_failures(tmp_path):
    kinds = [429, 500, 503, "drop", "half"]
    two, met = threading.Barrier(2), threading.Event()

    def say(text):
        if text in ("prompt 0", "prompt 1") and not met.is_set():  # the first two requests are under way together
            two.wait(60)
            met.set()
        return text[::-1]

    def trouble(text, attempt):
        return kinds[int(text.split()[1]) % 5] if attempt <= 1 + int(text[-1]) % 3 else None

    with Fake(trouble, say=say) as fake:
        rows, refused = ask_server(server(fake.url), PROMPTS, answer_file(tmp_path / "a"))
    assert not refused and 1 < fake.most <= 8 and max(fake.asked.values()) >= 4
    check(rows, tmp_path / "a.partial")


def test_answers_are_continued_after_the_server_died(tmp_path):
    with (
        Fake(lambda text, attempt: "drop" if int(text.split()[1]) >= 25 else None) as dying,
        pytest.raises(UserError, match="failed 3 times.*continues from there"),
    ):
        ask_server(server(dying.url, retries=2), PROMPTS, answer_file(tmp_path / "a"))
    kept = len((tmp_path / "a.partial").read_text().splitlines()) - 1
    assert 18 <= kept <= 25  # prompt 25 is asked when 18 are answered
    with Fake() as fake:
        rows, _ = ask_server(server(fake.url), PROMPTS, answer_file(tmp_path / "a"))
        assert sum(fake.asked.values()) == len(PROMPTS) - kept
    check(rows, tmp_path / "a.partial")


PROGRAM = """
import json, sys
from pathlib import Path
from jeagle.data import AnswerFile, AnswerServer, ask_server
prompts, done = json.loads(sys.argv[2]), lambda done, _: print(done, flush=True)
ask_server(AnswerServer(sys.argv[1], "m", concurrency=4), prompts, AnswerFile(Path(sys.argv[3]), {"model": "m"}), done)
"""


def test_a_killed_client_continues_after_its_last_answer(tmp_path):
    partial, gate = tmp_path / "a.partial", threading.Event()

    def slow(text, attempt):
        if int(text.split()[1]) > 20:
            gate.wait(60)  # until the client is dead

    with Fake(slow) as fake:
        program = [sys.executable, "-c", PROGRAM, fake.url, json.dumps(PROMPTS), str(tmp_path / "a")]
        client = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        for line in client.stdout:
            if int(line) >= 15:
                break
        os.kill(client.pid, signal.SIGKILL)
        assert client.wait() == -signal.SIGKILL
        gate.set()
    with partial.open("a") as file:
        file.write('{"id": "059", "mess')  # as a kill in the middle of a line leaves it
    kept = partial.read_text().count('"model": "m"}\n')
    with Fake() as fake:
        rows, _ = ask_server(server(fake.url), PROMPTS, answer_file(tmp_path / "a"))
        assert kept >= 15 and sum(fake.asked.values()) == len(PROMPTS) - kept
    check(rows, partial)


def test_an_unfinished_file_of_an_older_version_is_continued(tmp_path):
    """Its header is a hash of the settings."""
    done = PROMPTS[0] | {"finish_reason": "stop"}
    lines = [{"key": fingerprint({"model": "m"})}, done]
    (tmp_path / "a.partial").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Fake() as fake:
        rows, _ = ask_server(server(fake.url), PROMPTS[:2], answer_file(tmp_path / "a"))
    assert list(fake.asked) == ["prompt 1"] and rows[PROMPTS[0]["id"]] == done


def test_a_refused_prompt_does_not_stop_the_others(tmp_path):
    with Fake(lambda text, attempt: 400 if text.endswith("7") else None) as fake:
        rows, refused = ask_server(server(fake.url), PROMPTS, answer_file(tmp_path / "a"))
    assert sorted(refused) == [p["id"] for p in PROMPTS if p["id"].endswith("7")]
    assert len(rows) + len(refused) == len(PROMPTS) and max(fake.asked.values()) == 1
    assert "status 400" in next(iter(refused.values()))


def test_a_prompt_with_an_empty_answer_is_refused_and_the_others_are_answered(tmp_path):
    with Fake(say=lambda text: "" if text.endswith("7") else text[::-1]) as fake:
        rows, refused = ask_server(server(fake.url, retries=2), PROMPTS, answer_file(tmp_path / "a"))
    assert sorted(refused) == [p["id"] for p in PROMPTS if p["id"].endswith("7")]
    assert len(rows) + len(refused) == len(PROMPTS) and "it is empty" in next(iter(refused.values()))


def test_answers_that_were_cut_off_are_marked(tmp_path):
    with Fake(finish="length") as fake:
        rows, _ = ask_server(server(fake.url), PROMPTS[:3], answer_file(tmp_path / "a"))
    assert {row["finish_reason"] for row in rows.values()} == {"length"}


@pytest.mark.parametrize(("status", "message"), [(404, "refuses model"), (401, "refuses model")])
def test_a_server_without_the_model_is_a_user_error(tmp_path, status, message):
    with Fake(lambda text, attempt: status) as fake, pytest.raises(UserError, match=message):
        ask_server(server(fake.url), PROMPTS, answer_file(tmp_path / "a"))


def test_a_damaged_file_or_a_wrong_address_is_a_user_error(tmp_path):
    header = json.dumps({"made_from": {"model": "m"}})
    for text in ('{"key": "other"}\n', "garbage\n", header + "\n[1]\n", '{"made_from": {"model": "n"}}\n', "[1]\n"):
        (tmp_path / "a.partial").write_text(text)
        with pytest.raises(UserError, match="delete it|move it away"):
            ask_server(server("http://127.0.0.1:9/v1"), PROMPTS, answer_file(tmp_path / "a"))
    with pytest.raises(UserError, match="another character") as raised:
        ask_server(server("http://127.0.0.1:9/v1", key="secret\nkey"), PROMPTS, answer_file(tmp_path / "d"))
    assert "secret" not in str(raised.value)
    with pytest.raises(UserError, match="is not an address"):
        ask_server(server("ftp://x"), PROMPTS, answer_file(tmp_path / "b"))
    with pytest.raises(UserError, match="failed 1 times"):
        ask_server(server("http://127.0.0.1:9/v1", retries=0), PROMPTS, answer_file(tmp_path / "c"))


def test_the_command_writes_sorted_answers_with_their_model(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"turns": [f"prompt {i}"]}) + "\n" for i in range(20)))
    arguments = ["--target", "m", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "a.jsonl.gz")]
    with Fake() as fake:
        regenerate.main([*arguments, "--server", fake.url, "--system-prompt", "be old"])
    found = read_conversations(str(tmp_path / "a.jsonl.gz")).conversations
    assert len(found) == 20 and {c.model for c in found} == {"m"} and not list(tmp_path.glob("*.partial"))
    assert (
        all(c.messages[0] == {"role": "system", "content": "be old"} for c in found)
        and "20 answers in" in capsys.readouterr().out
    )
    with Fake(lambda text, attempt: 400) as fake, pytest.raises(UserError, match="refuses 20 of 20 prompts"):
        regenerate.main([*arguments[:-1], str(tmp_path / "b.jsonl"), "--server", fake.url])
    assert not (tmp_path / "b.jsonl").exists()
