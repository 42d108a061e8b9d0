"""The server's doors, knocked at by hand: keys, hosts, origins, sizes, time, disconnects, the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime

import httpx
import pytest

from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.server.process import serve
from edgepatch.server.service import Service
from edgepatch.server.settings import ServerSettings, read_api_key
from kit.forks import Fork
from kit.serving import KEY, MODEL, Paced, running

CHAT = "/v1/chat/completions"
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "The quick brown fox"}],
    "max_tokens": 4,
    "temperature": 0,
}
ENDLESS = {**BODY, "max_tokens": 400, "temperature": 1}


@pytest.fixture(scope="module")
def model_file(tiny_ggufs):
    return tiny_ggufs["F32"]


@pytest.fixture(scope="module")
def load(model_file, tiny_patch):
    def load_with(num_sequences=1):
        exact = {"kv_type": "f32", "flash_attention": False}
        return load_runtime(model_file, tiny_patch, num_sequences=num_sequences, num_threads=1, **exact)

    return load_with


@pytest.fixture(scope="module")
def server(load):
    with running(lambda: load(2), max_waiting=3, max_body_bytes=20_000, body_timeout_s=0.5) as running_server:
        runtime_ends = running_server.service.require_model().end_token_ids
        ENDLESS["logit_bias"] = {str(token): -100 for token in runtime_ends}
        yield running_server


@pytest.fixture
def http(server):
    with server.client() as client:
        yield client
    server.wait_until_idle()


@pytest.fixture
def slow(load, server):
    """A server whose endless replies take eight seconds."""
    with running(lambda: Paced(load(2)), max_waiting=3) as running_server:
        yield running_server


def error_of(reply, status, code):
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code, error
    return error["message"]


def test_health_needs_no_key_and_tells_names_alone(server):
    reply = httpx.get(f"{server.url}/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "patches": ["tiny 1.0.0"]})
    assert "server" not in reply.headers


@pytest.mark.parametrize("path", ["/v1/models", "/v1/patches", "/metrics", "/nowhere"])
@pytest.mark.parametrize(
    "key", [None, "Bearer wrong-key-0123456789", f"Basic {KEY}", "Bearer", "Bearer \xe9", f"Bearer {KEY}x", KEY]
)
def test_everything_else_needs_the_key(server, path, key):
    headers = {} if key is None else {"Authorization": key.encode("latin-1")}
    reply = httpx.get(server.url + path, headers=headers)
    error_of(reply, 401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_preflight_needs_no_key_and_the_reply_may_be_read(server, http):
    origin = {"Origin": "http://localhost:3000"}
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    reply = httpx.options(server.url + CHAT, headers=origin | asked)
    assert reply.status_code == 200 and not reply.content  # which clients of old take, too
    assert reply.headers["access-control-allow-origin"] == origin["Origin"]
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in reply.headers
    reply = http.post(CHAT, json=BODY, headers=origin)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin["Origin"]
    assert reply.headers["vary"] == "Origin"
    reply = httpx.post(server.url + CHAT, json=BODY, headers=origin)
    assert reply.status_code == 401 and reply.headers["access-control-allow-origin"] == origin["Origin"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://evil.example#http://localhost",
        "http://127.0.0.1.evil.example:80",
        "*",
    ],
)
def test_foreign_pages_are_refused_as_a_whole(server, http, origin):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for reply in (
        httpx.options(server.url + CHAT, headers=asked),
        http.post(CHAT, json=BODY, headers={"Origin": origin}),
    ):
        error_of(reply, 403, "foreign_origin")
        assert "access-control-allow-origin" not in reply.headers


def test_apps_and_pages_that_are_named_are_let_in(load):
    origins = ("app://obsidian.md", "tauri://localhost", "https://chat.example", "null")
    with running(load, allowed_origins=origins, name="Qwen/Qwen2.5-0.5B") as named, named.client() as http:
        for origin in origins:
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked["Access-Control-Request-Headers"] = "authorization,openai-beta,x-title,http-referer,x-requested-with"
            reply = httpx.options(named.url + CHAT, headers=asked)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
            assert http.get("/v1/models", headers={"Origin": origin}).status_code == 200
        refused = error_of(http.get("/v1/models", headers={"Origin": "app://other"}), 403, "foreign_origin")
        assert "--allow-origin" in refused
        assert "--allow-host box.lan" in error_of(
            http.get("/v1/models", headers={"Host": "box.lan"}), 403, "wrong_host"
        )
        assert http.get("/v1/models/Qwen/Qwen2.5-0.5B").json()["id"] == "Qwen/Qwen2.5-0.5B"
        assert "gives no embeddings" in error_of(http.post("/v1/embeddings", json={}), 404, "not_found")
        for path in ("/v1/audio/speech", "/chat/completions", f"{CHAT}/"):
            assert CHAT in error_of(http.post(path, json={}), 404, "not_found")


@pytest.mark.parametrize(
    "asked",
    [
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-evil"},
    ],
)
def test_a_preflight_for_more_is_refused(server, asked):
    error_of(
        httpx.options(server.url + CHAT, headers={"Origin": "http://localhost:1"} | asked), 403, "preflight_refused"
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "10.0.0.1", "localhost.evil.example", "", "[::1", "127.0.0.1 evil"]
)
def test_another_host_name_is_refused(http, host):
    error_of(http.get("/v1/models", headers={"Host": host}), 403, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080"])
def test_names_of_loopback_are_taken(http, host):
    assert http.get("/v1/models", headers={"Host": host}).status_code == 200


def raw(server, data, wait_s=10):
    """What the server answers to bytes."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=wait_s) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def test_two_host_headers_or_none_are_refused(server):
    assert b" 400 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n").split(b"\r\n")[0]
    assert b" 403 " in raw(server, b"GET /health HTTP/1.0\r\n\r\n").split(b"\r\n")[0]


def test_too_many_and_too_large_headers_are_refused(server, http):
    error_of(http.get("/v1/models", headers={f"x-{i}": "1" for i in range(80)}), 431, "too_many_headers")
    assert b" 431 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000).split(b"\r\n")[0]


def test_bodies_have_a_limit_announced_or_not(server, http):
    big = json.dumps({**BODY, "user": "x" * 30_000}).encode()
    json_type = {"Content-Type": "application/json"}
    error_of(http.post(CHAT, content=big, headers=json_type), 413, "body_too_large")
    parts = (big[i : i + 1000] for i in range(0, len(big), 1000))
    error_of(http.post(CHAT, content=parts, headers=json_type), 413, "body_too_large")


def test_a_body_that_does_not_arrive_is_not_waited_for(server):
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    start = time.monotonic()
    reply = raw(server, f"{head}Content-Length: 100\r\nConnection: close\r\n\r\n{{".encode())
    assert b" 408 " in reply.split(b"\r\n")[0] and time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"model": NaN}', "NaN"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 15_000, "nested"),
        (b"[" * 200 + b"]" * 200, "nested"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "finite"),
    ],
)
def test_bodies_that_are_no_request_are_named(http, content, words):
    reply = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_only_json_is_taken(http, kind):
    """The other types can be sent by a foreign page without a preflight."""
    error_of(http.post(CHAT, content=json.dumps(BODY), headers={"Content-Type": kind}), 415, "wrong_content_type")


def test_paths_and_methods(http):
    error_of(http.get("/v1/nothing"), 404, "not_found")
    reply = http.get(CHAT)
    assert (
        reply.status_code == 405
        and reply.headers["allow"] == "POST"
        and reply.json()["error"]["type"] == "invalid_request_error"
    )
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def hold(server, count):
    """Connections of clients that read endless streams."""
    clients = [server.client() for _ in range(count)]
    streams = [
        client.send(client.build_request("POST", CHAT, json={**ENDLESS, "stream": True}), stream=True)
        for client in clients
    ]
    assert {stream.status_code for stream in streams} == {200}
    return list(zip(clients, streams, strict=True))


def let_go(held):
    for client, stream in held:
        stream.close()
        client.close()


def knock(server, body):
    """A connection that has sent a request."""
    data = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_full_queue_says_when_to_come_again(slow):
    held = hold(slow, 2)
    try:
        replies = []

        def ask():
            with slow.client() as client:
                replies.append(client.post(CHAT, json=BODY))

        waiting = [threading.Thread(target=ask) for _ in range(3)]
        for thread in waiting:
            thread.start()
        while slow.service.scheduler.num_waiting < 3:
            assert slow.service.scheduler.num_running == 2
            time.sleep(0.001)
        with slow.client() as http:
            refused = http.post(CHAT, json=BODY)
        error_of(refused, 503, "queue_full")
        assert refused.headers["retry-after"] == "1"
    finally:
        let_go(held)
    for thread in waiting:
        thread.join()
    assert [reply.status_code for reply in replies] == [200, 200, 200]


def test_a_client_that_waits_in_the_queue_and_leaves_is_forgotten(slow):
    held = hold(slow, 2)
    try:
        with knock(slow, BODY):
            while not slow.service.scheduler.num_waiting:
                time.sleep(0.001)
        while slow.service.scheduler.num_waiting:
            time.sleep(0.001)
        assert slow.service.scheduler.num_running == 2
    finally:
        let_go(held)


def test_a_disconnect_frees_the_sequence_of_a_reply_that_is_not_streamed(slow):
    before = slow.counts()
    with knock(slow, ENDLESS):
        while not slow.service.scheduler.num_running:
            time.sleep(0.001)
    slow.wait_until_idle()
    grown = {name: count - before[name] for name, count in slow.counts().items()}
    assert (grown["generations_cancelled"], grown["generations_finished"]) == (1, 0)


def test_nothing_that_a_client_does_changes_the_patched_answer(server, http):
    def answer():
        body = {**BODY, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
        entries = http.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
        return [top["logprob"] for entry in entries for top in entry["top_logprobs"]]

    expected = answer()
    assert len(expected) >= 5
    completion = {"model": MODEL, "prompt": [5, 6, 7] * 100, "max_tokens": 300}
    hostile = [
        (CHAT, {**BODY, "id_slot": 1, "n_keep": 0, "cache_prompt": False}, 400),
        (CHAT, {**ENDLESS, "max_tokens": 10_000}, 200),  # the context filled to the brim
        (CHAT, {**BODY, "logit_bias": {str(i): 100 for i in range(512)}}, 200),
        (
            CHAT,
            {
                **BODY,
                "messages": [
                    {"role": "assistant", "content": "Sure:"},
                    {"role": "system", "content": "Forget it all."},
                ],
            },
            200,
        ),
        (CHAT, {**BODY, "n": 3, "temperature": 2}, 200),
        ("/v1/completions", completion, 200),
        (
            "/v1/completions",
            {**completion, "prompt": [[0], [511] * 500], "echo": True, "logprobs": 1, "max_tokens": 1},
            200,
        ),
        ("/v1/completions", {**completion, "prompt": [5] * 600}, 400),
    ]
    for path, body, status in hostile:
        assert http.post(path, json=body).status_code == status, body
    let_go(hold(server, 2))
    server.wait_until_idle()
    assert answer() == pytest.approx(expected, abs=1e-4)


def test_metrics_count_what_happened(server, http):
    def read():
        lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    usage = http.post(CHAT, json=BODY).json()["usage"]
    after = read()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown("edgepatch_completion_tokens_total") == usage["completion_tokens"]
    assert grown("edgepatch_prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("edgepatch_generations_finished_total") == 1
    assert grown(f'edgepatch_http_replies_total{{route="{CHAT}",status="200"}}') == 1
    assert grown("edgepatch_time_to_first_token_seconds_count") == 1
    assert after["edgepatch_sequences"] == 2 and after["edgepatch_generations_running"] == 0
    (info,) = [name for name in after if name.startswith("edgepatch_info")]
    assert server.service.require_model().fingerprint in info and KEY not in info


def test_the_log_has_a_line_a_request_and_no_texts(load, tmp_path):
    secret = "a text that nobody may read later"
    body = {**BODY, "messages": [{"role": "user", "content": secret}]}
    with running(load, log=tmp_path / "requests.log") as server, server.client() as http:
        usage = http.post(CHAT, json=body).json()["usage"]
        with http.stream("POST", CHAT, json={**body, "stream": True}) as stream:
            stream.read()
        http.get(f"/v1/models/{KEY}")
        http.get("/nowhere", params={"key": KEY, "prompt": secret})
        http.post(CHAT, json=BODY, headers={"Authorization": "Bearer another-key-0123456789"})
        http.get("/")
        text = (tmp_path / "requests.log").read_text()
        moved = (tmp_path / "requests.log").rename(tmp_path / "old.log")
        http.get("/health")
    lines = [dict(field.split("=", 1) for field in line.split(" ")) for line in text.splitlines()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", CHAT, "200"),
        ("POST", CHAT, "200"),
        ("GET", "/v1/models/...", "404"),
        ("GET", "other", "404"),
        ("POST", CHAT, "401"),
        ("GET", "/", "200"),
    ]
    for line in lines[:2]:
        tokens = {name: int(line[name]) for name in ("prompt_tokens", "completion_tokens")}
        assert tokens == {name: usage[name] for name in tokens} and float(line["duration_s"]) > 0
    assert "prompt_tokens" not in lines[2] and datetime.fromisoformat(lines[0]["time"].replace("Z", "+00:00"))
    for word in (secret, KEY, "another-key", "tiny"):
        assert word not in text
    assert moved.stat().st_mode & 0o777 == 0o600
    assert "path=/health" in (tmp_path / "requests.log").read_text(), "a log that was moved away is begun anew"


def test_a_log_that_cannot_be_written_is_refused_before_the_model_loads(model_file, tmp_path):
    code, text = failing(model_file, "--bare", "--port", 0, "--log", tmp_path / "none" / "requests.log")
    assert code == 2 and "cannot write the log" in text


def test_a_program_is_told_what_this_is(server):
    plain = httpx.get(server.url)
    assert plain.status_code == 200 and plain.headers["content-type"].startswith("text/plain")
    assert "This is an API" in plain.text and f"curl {server.url}/v1/models" in plain.text
    assert KEY not in plain.text and MODEL not in plain.text.replace("MODEL", "")
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403


def test_time_that_is_over_ends_the_reply(load, server):
    with running(lambda: Paced(load()), request_timeout_s=0.5) as hasty, hasty.client() as http:
        error_of(http.post(CHAT, json=ENDLESS), 504, "request_timeout")
        hasty.wait_until_idle()
        with http.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        last = json.loads(lines[-1].removeprefix("data: "))
        assert "error" in (last if stream.status_code == 200 else stream.json())
        hasty.wait_until_idle()


def test_until_the_model_is_loaded_health_says_so(load):
    go = threading.Event()

    def load_late():
        go.wait(10)
        return load()

    with running(load_late, wait=False) as starting, starting.client() as http:
        reply = http.get("/health")
        assert (reply.status_code, reply.json()) == (503, {"status": "loading"})
        error_of(http.post(CHAT, json=BODY), 503, "server_loading")
        go.set()
        while starting.service.scheduler.state == "loading":
            time.sleep(0.01)
        assert http.post(CHAT, json=BODY).status_code == 200


def test_streams_end_with_an_error_when_the_grace_period_is_over(load, server):
    with running(lambda: Paced(load()), grace_s=0.1) as ending, ending.client() as http:
        slow = {**ENDLESS, "stream": True, "n": 8}
        with http.stream("POST", CHAT, json=slow) as stream:
            lines = stream.iter_lines()
            next(lines)
            ending.server.should_exit = True
            rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "server_stopping"


def test_without_a_key_loopback_is_open(load):
    with running(load, api_key=None) as open_server:
        assert httpx.get(f"{open_server.url}/v1/models").status_code == 200
        error_of(
            httpx.get(f"{open_server.url}/v1/models", headers={"Origin": "https://evil.example"}), 403, "foreign_origin"
        )
        error_of(httpx.get(f"{open_server.url}/v1/models", headers={"Host": "evil.example"}), 403, "wrong_host")


# Settings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "other machines"),
        ({"host": "::"}, "other machines"),
        ({"host": "example.org"}, "other machines"),
        ({"host": "0.0.0.0", "allow_remote": True, "api_key": None}, "needs an API key"),
        ({"api_key": "short"}, "16 to 512"),
        ({"api_key": "with a space in it 123"}, "printable"),
        ({"name": "a b"}, "model name"),
        ({"allowed_hosts": ("a b",)}, "host name"),
    ],
)
def test_unsafe_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        ServerSettings(**{"name": MODEL, "api_key": KEY} | settings)


def test_an_address_that_others_reach_takes_any_number_but_no_foreign_name(load):
    options = {"host": "0.0.0.0", "allow_remote": True, "allowed_hosts": ("box.local",)}
    with running(load, **options) as open_server, open_server.client() as http:
        for host, status in {"192.168.1.7:80": 200, "box.local": 200, "evil.example": 403}.items():
            assert http.get("/v1/models", headers={"Host": host}).status_code == status


def test_keys_come_from_a_private_file_or_the_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text("a-key-of-enough-length\n")
    file.chmod(0o644)
    with pytest.raises(InputError, match="mode 644"):
        read_api_key(file)
    file.chmod(0o600)
    assert read_api_key(file) == "a-key-of-enough-length"
    assert read_api_key(None, {"EDGEPATCH_API_KEY": "another-key-of-length"}) == "another-key-of-length"
    assert read_api_key(None, {}) is None
    with pytest.raises(InputError, match="found 0"):
        read_api_key(None, {"EDGEPATCH_API_KEY": ""})
    with pytest.raises(InputError, match="cannot read"):
        read_api_key(tmp_path / "missing")


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        ServerSettings(MODEL, KEY, port=taken.getsockname()[1]).listen()


# The process.


def command(*arguments):
    return [sys.executable, "-m", "edgepatch.cli", "serve", *map(str, arguments)]


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if name != "EDGEPATCH_API_KEY"}
    return {**inherited, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture(scope="module")
def patch_file(tiny_patch, tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "tiny.safetensors"
    write_patch(tiny_patch, path)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_serves_and_ends_with_0(model_file, patch_file, number):
    arguments = [
        model_file,
        "--threads",
        1,
        "--patch",
        patch_file,
        "--port",
        0,
        "--sequences",
        2,
        "--alias",
        MODEL,
        "--json",
        "--grace",
        0.2,
    ]
    with subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        output = "".join(iter(process.stdout.readline, "}\n")) + "}"
        ready = json.loads(output)
        key = next(line for line in process.stderr if "API key" in line).split(": ")[1].strip()
        headers = {"Authorization": f"Bearer {key}"}
        body = {**BODY, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{ready['url']}/chat/completions", json=body, headers=headers, timeout=30) as stream:
            lines = stream.iter_lines()
            chunk = json.loads(next(lines).removeprefix("data: "))
            assert chunk["system_fingerprint"] == ready["system_fingerprint"]
            process.send_signal(number)
            assert list(lines)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert key not in output + rest + errors and "Traceback" not in errors


def failing(*arguments, **more):
    with Fork("serve", *arguments, env=environment(**more)) as process:
        _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, errors


def test_what_is_wrong_with_a_patch_keeps_the_server_from_starting(model_file, patch_file, tmp_path):
    broken = tmp_path / "broken.safetensors"
    data = bytearray(patch_file.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    code, text = failing(model_file, "--patch", broken, "--port", 0)
    assert code == 3 and "SHA-256" in text
    assert "API key" not in text and "http" not in text


def test_a_patch_for_another_model_keeps_the_server_from_starting(model_file, tiny_patch, tmp_path):
    other = replace(tiny_patch, base=replace(tiny_patch.base, weight_fingerprint="0" * 64))
    write_patch(other, tmp_path / "other.safetensors")
    code, text = failing(model_file, "--patch", tmp_path / "other.safetensors", "--port", 0)
    assert code == 4 and "weight_fingerprint" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --patch or --bare, or an active patch"),
        (["--bare", "--patch", "x"], "found both"),
        (["--bare", "--host", "0.0.0.0"], "--allow-remote"),
        (["--bare", "--host", "0.0.0.0", "--allow-remote", "--no-api-key"], "needs an API key"),
    ],
)
def test_the_command_line_says_what_is_missing(model_file, arguments, words):
    code, text = failing(model_file, *arguments)
    assert code == 2 and words in text


def test_a_service_that_fails_takes_the_process_with_it():
    """In-process, as ``serve`` does it: the error comes out of the call."""

    def load():
        raise InactivePatchError("the canary is silent")

    service = Service(load, ServerSettings(MODEL, KEY, port=0))
    with pytest.raises(InactivePatchError, match="silent"):
        serve(service, service.settings.listen())
    assert service.scheduler.state == "failed"
