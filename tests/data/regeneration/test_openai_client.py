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
    """Answers with the prompt turned round. `trouble(text, attempt)` says what goes wrong: a status, "drop", "half".

    `choose(body)` gives a whole choice and more fields of the reply, or a status, in place of this.
    """

    def __init__(self, trouble=lambda text, attempt: None, finish="stop", say=lambda text: text[::-1], choose=None):
        self.asked, self.most, self.now, self.bodies = collections.Counter(), 0, 0, []
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with lock:
                    fake.bodies.append(body)
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
                chosen = choose(body) if choose else ({}, {})
                if isinstance(chosen, str):
                    wrong, tree = 400, {}
                else:
                    tree["choices"][0] |= chosen[0]
                    tree |= chosen[1]
                data = json.dumps(tree if not isinstance(wrong, int) else {"error": chosen}).encode()
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


def user(text):
    return {"role": "user", "content": text}


def called(name, number="theirs", arguments='{"a": 1}'):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def answered(tmp_path, prompt, choose, **more):
    """The row of one prompt, and the requests."""
    with Fake(choose=choose) as fake:
        rows, refused = ask_server(server(fake.url, **more), [{"id": "x"} | prompt], answer_file(tmp_path / "a"))
    (tmp_path / "a.partial").unlink()
    return rows.get("x", refused.get("x")), fake.bodies


def test_every_turn_is_answered_after_the_servers_own_answers(tmp_path):
    turns = [user("one"), {"role": "assistant", "content": "another model's"}, user("two"), user("three")]

    def choose(body):
        number = len(body["messages"]) // 2
        message = {"content": None if number == 2 else f"answer {number}", "reasoning_content": f"thought {number}"}
        return {"message": message, "finish_reason": "length" if number == 2 else "stop"}, {}

    row, bodies = answered(tmp_path, {"messages": turns}, choose, system_prompt="be kind")
    assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * 3]
    replies = row["messages"][2::2]
    assert [(m["content"], m["reasoning_content"], m["finish_reason"]) for m in replies] == [
        ("answer 1", "thought 1", "stop"),
        (None, "thought 2", "length"),
        ("answer 3", "thought 3", "stop"),
    ]
    assert "another" not in json.dumps(bodies) and len(bodies) == 3 and row["finish_reason"] == "stop"
    sent = bodies[2]["messages"][2]
    assert sent == {"role": "assistant", "content": "answer 1"} | dict.fromkeys(
        ("reasoning", "reasoning_content"), "thought 1"
    )


@pytest.mark.parametrize(
    ("message", "stopped"),
    [
        ({"content": None, "tool_calls": [called("look", "ours")]}, ""),
        ({"content": None, "tool_calls": [called("hear", "ours")]}, "the target calls other tools than the row"),
        ({"content": "gulls"}, "the target calls no tool where the row has results of one"),
    ],
)
def test_tool_results_come_from_the_row_if_the_target_calls_the_same_tool(tmp_path, message, stopped):
    result = {"role": "tool", "tool_call_id": "theirs", "content": "gulls fly"}
    turns = [user("what"), {"role": "assistant", "content": "", "tool_calls": [called("look")]}, result]
    turns += [{"role": "assistant", "content": "some gulls"}, user("and now")]

    def choose(body):
        return {"message": message if len(body["messages"]) == 1 else {"content": "later"}}, {}

    row, bodies = answered(tmp_path, {"messages": turns, "tools": [{"name": "look"}]}, choose)
    assert row.get("stopped", "").startswith(stopped) and bool(row.get("stopped")) is bool(stopped)
    if stopped:
        assert len(bodies) == 1 and row["messages"][1:] == [{"role": "assistant", "finish_reason": "stop"} | message]
    else:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
        assert row["messages"][2] == result | {"tool_call_id": "ours"} == bodies[1]["messages"][2]


def test_what_the_server_left_in_the_text_is_parsed(tmp_path):
    text = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    prompt = {"messages": [user("what")], "tools": [{"name": "look"}]}
    row, _ = answered(tmp_path, prompt, lambda body: ({"message": {"content": text}}, {}))
    reply = row["messages"][1]
    assert (reply["content"], reply["reasoning_content"]) == (None, "hm") and len(reply["tool_calls"]) == 1
    row, _ = answered(tmp_path, prompt, lambda body: ({"message": {"content": text, "reasoning": "so"}}, {}))
    assert (row["messages"][1]["content"], row["messages"][1]["reasoning_content"]) == (text, "so")


def test_a_later_turn_that_is_refused_ends_the_conversation_there(tmp_path):
    def choose(body):
        return "too long" if len(body["messages"]) > 1 else ({}, {})

    row, _ = answered(tmp_path, {"messages": [user("one"), user("two")]}, choose)
    assert row["stopped"] == "the server refuses the next turn"
    assert [m["content"] for m in row["messages"]] == ["one", "eno"] and row["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("message", "finish", "why"),
    [
        ({"content": None}, "length", "raise --max-new-tokens"),
        ({"content": None, "tool_calls": [called("f", arguments='{"a": ')]}, "stop", "not valid JSON"),
    ],
)
def test_an_answer_that_prepare_could_not_read_is_refused(tmp_path, message, finish, why):
    choose = lambda body: ({"message": message, "finish_reason": finish}, {})  # noqa: E731
    refused, _ = answered(tmp_path, {"messages": [user("one")]}, choose, retries=1)
    assert why in refused


@pytest.mark.parametrize("place", ["vLLM", "SGLang"])
def test_token_ids_are_kept_if_the_server_read_the_same_prompt(tmp_path, place):
    def prompt_ids(messages, tools, thinking):
        return [len(messages), int(thinking)]

    def choose(body, thinking=0):
        read = {"prompt_token_ids": [len(body["messages"]), thinking]}
        ids = {"token_ids": [7, len(body["messages"])]}
        return (ids, read) if place == "vLLM" else (ids | read, {})

    more = {"prompt_ids": prompt_ids, "sampled_with": "a/b", "template": "{{ enable_thinking }}"}
    prompt = {"messages": [user("one"), user("two")]}
    row, bodies = answered(tmp_path, prompt, choose, **more)
    assert row["sampled_with"] == "a/b" and row["thinking"] is False and bodies[0]["return_token_ids"] is True
    replies = row["messages"][1::2]
    assert [m["sampled_ids"] for m in replies] == [[7, 1], [7, 3]]
    assert [m["sampled_hash"] for m in replies] == [fingerprint([7, 1]), fingerprint([7, 3])]
    assert not {"sampled_ids", "sampled_hash", "finish_reason"} & bodies[1]["messages"][1].keys()
    for odd in (prompt | {"thinking": True}, prompt):  # another prompt than the server's
        row, _ = answered(tmp_path, odd, lambda body: choose(body, 2), **more)
        assert "sampled_with" not in row and "sampled_ids" not in row["messages"][1]


def test_a_server_that_does_not_know_the_field_for_token_ids_is_asked_without_it(tmp_path):
    def choose(body):
        return "unknown field return_token_ids" if "return_token_ids" in body else ({}, {})

    prompt = {"messages": [user("one"), user("two")]}
    row, bodies = answered(tmp_path, prompt, choose, prompt_ids=lambda *_: [], retries=0)
    assert [m["content"] for m in row["messages"]] == ["one", "eno", "two", "owt"] and len(bodies) == 3


def test_a_text_without_turns_is_not_asked_of_a_server(tmp_path):
    refused, bodies = answered(tmp_path, {"messages": [{"role": "text", "content": "once"}]}, None)
    assert "no chat" in refused and not bodies


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
