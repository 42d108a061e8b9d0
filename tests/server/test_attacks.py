"""What a hostile client tries: none of it delays, ends or unpatches another client's reply, and none of it is the server's fault."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import h11
import httpx
import pytest

from edgepatch.runtimes import load_runtime
from edgepatch.server import budgets, connections, constraint_threads
from kit.serving import KEY, MODEL, Paced, running

BODY = {"model": MODEL, "prompt": "The quick brown fox", "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
ENDLESS = {"max_tokens": 300, "stream": True, "logit_bias": {"2": -100}}
"""The model draws at random, and its token 2 would end a reply."""


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_patch):
    with running(lambda: Paced(load_runtime(tiny_folder, tiny_patch, num_sequences=3), 0.005)) as running_server:
        yield running_server


def post(server, body, path="/v1/completions", **options):
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    with server.client(**options) as http:
        return http.post(path, content=content, headers={"Content-Type": "application/json"})


def require_refused(reply, status=400):
    assert reply.status_code == status and reply.json()["error"]["message"], reply.text


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


COSTLY = {
    "large multiple": {"type": "integer", "multipleOf": 999983},
    "patterns": {"allOf": [{"type": "string", "pattern": f"^.*{c}.{{20}}$"} for c in "abcdef"]},
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_costly_schema_is_refused_while_others_go_on(server, kind):
    with (
        server.client() as http,
        http.stream("POST", "/v1/completions", json={**BODY, **ENDLESS}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": COSTLY[kind]}}
        reply = post(server, {**CHAT, "response_format": schema}, "/v1/chat/completions")
        require_refused(reply)
        assert sum(line.startswith("data:") for line in lines) > 10


def test_a_slow_schema_delays_no_other(server):
    def ask(schema):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return post(server, {**CHAT, "response_format": form}, "/v1/chat/completions")

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, {"type": "integer", "multipleOf": 999979})
        time.sleep(0.2)
        assert ask({"type": "object", "properties": {"new": {"type": "boolean"}}}).status_code == 200
        assert not slow.done(), "the ordinary schema waited for the slow one"
        require_refused(slow.result())


def test_constraints_that_wait_are_bounded(server, monkeypatch):
    monkeypatch.setattr(constraint_threads, "MAX_WAITING", 0)
    form = {"type": "json_object", "schema": {"properties": {"never seen": {}}}}
    require_refused(post(server, {**CHAT, "response_format": form}, "/v1/chat/completions"), 503)
    monkeypatch.undo()
    assert post(server, {**CHAT, "response_format": form}, "/v1/chat/completions").status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e-9},
        {"temperature": 5e-324, "seed": 1},
        {"presence_penalty": 1e400},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {str(i): -100 for i in range(512)}},
    ],
)
def test_hostile_parameters_end_their_own_reply_alone(server, fields):
    body = {**BODY, "max_tokens": 40, "stream": True, "seed": 3}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert post(server, json.dumps({**BODY, **fields})).status_code in (200, 400)
        assert "data: [DONE]" in list(lines)
    assert post(server, BODY).status_code == 200


FAULTS = {
    "surrogate in a name": rb'{"model":"tiny","\ud800":1}',
    "surrogate in a name within a schema": rb'{"model":"tiny","messages":[{"role":"user","content":"a"}],"tools":[{"type":"function",'
    rb'"function":{"name":"f","parameters":{"\udfff":1}}}]}',
    "surrogate in a schema": rb'{"model":"tiny","messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema",'
    rb'"json_schema":{"name":"f","schema":{"const":"\udfff"}}}}',
    "surrogate in a grammar": rb'{"model":"tiny","prompt":"a","grammar":"root ::= \"\ud800\""}',
    "400 digits": b'{"model":"tiny","prompt":"a","temperature":' + b"1" * 400 + b"}",
    "400 digits where anything goes": b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"tools":[{"type":"function",'
    b'"function":{"name":"f","parameters":{"a":' + b"1" * 400 + b"}}}]}",
    "infinite": b'{"model":"tiny","prompt":"a","temperature":1e999}',
    "nested arguments": json.dumps(
        {
            **CHAT,
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a":' + "[" * 900 + "]" * 900 + "}"},
                        }
                    ],
                },
                {"role": "tool", "content": "b", "tool_call_id": "1"},
            ],
        }
    ).encode(),
    "a line end behind a name": rb'{"model":"tiny","messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f\n"}}]}',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_clients_fault_is_no_fault_of_the_server(server, caplog, fault):
    path = "/v1/chat/completions" if b"messages" in FAULTS[fault] else "/v1/completions"
    with caplog.at_level(logging.INFO):
        require_refused(post(server, FAULTS[fault], path))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_disconnect_within_a_body_is_not_logged(server, caplog):
    with caplog.at_level(logging.INFO), connect(server) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        raw.sendall(f'{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"mod'.encode())
        time.sleep(0.1)
        raw.close()
        assert post(server, BODY).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_our_own_faults_are_logged_in_one_line_without_texts(server, caplog):
    try:
        {}["what a client wrote"]
    except KeyError as error:
        with caplog.at_level(logging.INFO):
            server.service.note_error(error)
    (record,) = caplog.records
    assert "what a client wrote" not in record.getMessage() and record.exc_info is None
    assert "KeyError in test_attacks.py" in record.getMessage()


def test_two_lengths_are_refused(server):
    with connect(server) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        raw.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")


AUTHORIZED = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"


JSON = f"{AUTHORIZED}Content-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("begin", "filler", "status", "code"),
    [
        ("GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: ", "a", 431, "head_too_long"),
        ("GET /", "a", 431, "head_too_long"),
        ("\x16\x03\x01", "\r\n", 400, "malformed_request"),
        (f"{JSON}Content-Length: 8000000\r\n\r\n", " ", 413, "body_too_large"),
        (f"{AUTHORIZED}Content-Type: text/plain\r\nContent-Length: 8000000\r\n\r\n", " ", 415, "wrong_content_type"),
        (f"{JSON}Transfer-Encoding: chunked\r\n\r\nno number", "\r\n", 400, "malformed_request"),
    ],
    ids=["head", "line", "no HTTP", "body", "type", "chunks"],
)
def test_who_still_sends_reads_why_it_is_refused(server, begin, filler, status, code):
    """A socket that is closed with bytes unread is reset, and the answer is lost on its way."""
    with connect(server) as raw:
        raw.settimeout(20)
        raw.sendall((begin + filler * (8_000_000 // len(filler))).encode())
        reply = http.client.HTTPResponse(raw)
        reply.begin()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (status, code)
    assert post(server, BODY).status_code == 200


def test_a_connection_that_the_client_has_reset_is_closed_without_an_error():
    """Before the event loop has heard of it, which no client can time."""

    async def close_after_a_reset() -> bool:
        transports: asyncio.Queue[asyncio.Transport] = asyncio.Queue()

        class Kept(asyncio.Protocol):
            def connection_made(self, transport):
                transports.put_nowait(transport)

        listening = await asyncio.get_running_loop().create_server(Kept, "127.0.0.1", 0)
        with socket.create_connection(listening.sockets[0].getsockname()) as raw:
            transport = await transports.get()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
        conn = h11.Connection(h11.SERVER)
        conn.receive_data(b"no HTTP\r\n\r\n")
        with pytest.raises(h11.RemoteProtocolError):
            conn.next_event()
        connections.Lingering(transport, conn).close()
        listening.close()
        return transport.is_closing()

    assert asyncio.run(close_after_a_reset())


def test_who_sends_on_for_long_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(connections, "LINGER_S", 0.3)
    begin = time.monotonic()
    with connect(server) as raw, suppress(OSError):
        raw.settimeout(20)
        while time.monotonic() < begin + 20:
            raw.sendall(b"a" * 10_000)
            time.sleep(0.01)
    assert time.monotonic() < begin + 20


def closed_within(raw, seconds):
    raw.settimeout(seconds)
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


def test_silence_and_slow_heads_end(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.5)
    silent, slow = connect(server), connect(server)
    end = time.monotonic() + 20
    try:
        while time.monotonic() < end:
            slow.sendall(b"G")
            time.sleep(0.2)
    except OSError:
        pass
    assert time.monotonic() < end and closed_within(silent, 10)
    silent.close()
    slow.close()


def test_silent_connections_shut_nobody_out(server, monkeypatch):
    monkeypatch.setattr(connections, "MAX_SILENT", 4)
    silent = [connect(server) for _ in range(12)]
    assert post(server, BODY).status_code == 200
    assert closed_within(silent[0], 10)
    for one in silent:
        one.close()


def test_a_reply_that_nobody_takes_ends(server, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_TIMEOUT_S", 0.3)
    with connect(server) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        one = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for _ in range(60):
            try:
                raw.sendall(one)
            except OSError:
                break
            time.sleep(0.02)
        time.sleep(3)
        assert not [c for c in server.server.server_state.connections if c.transport.get_write_buffer_size()]


def test_log_probabilities_are_bounded_in_sum(server, monkeypatch):
    monkeypatch.setattr(budgets, "MAX_OF_REQUEST", 100)
    prompts = ["The quick brown fox jumps"] * 20
    require_refused(post(server, {**BODY, "prompt": prompts, "echo": True, "logprobs": 5, "max_tokens": 0}))
    require_refused(post(server, {**BODY, "logprobs": 20, "max_tokens": 60}))
    monkeypatch.setattr(budgets, "MAX_OF_REQUEST", 10**6)
    monkeypatch.setattr(budgets, "MAX_OF_SERVER", 100)
    require_refused(post(server, {**BODY, "prompt": prompts, "echo": True, "logprobs": 5, "max_tokens": 0}), 503)
    monkeypatch.undo()
    assert post(server, {**BODY, "prompt": prompts, "echo": True, "logprobs": 5, "max_tokens": 0}).status_code == 200


def test_length_is_judged_before_work(server):
    """Four megabytes of a prompt are refused while another stream goes on."""
    with (
        server.client() as http,
        http.stream("POST", "/v1/completions", json={**BODY, **ENDLESS}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        for _ in range(3):
            try:
                require_refused(post(server, {**BODY, "prompt": "word " * 800_000}))
            except httpx.WriteError:
                pytest.fail("the connection was cut instead of answered")
        assert sum(line.startswith("data:") for line in lines) > 10
