"""A pytest plugin: llama.cpp's server tests, as they are, on ``edgepatch serve``.

Each of their servers is one of ours, behind a small proxy that says what the two projects write differently: paths without ``/v1``, the
native ``/completion``, names of models, what their server is started with. What the tests expect of the words of llama.cpp's own tiny model,
and of their number, is left out.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import tempfile
import threading
import types
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from edgepatch.bench.served import Served, serving
from edgepatch.converters.gguf.header import read_header

MODEL, PATCH, REPORT, ENDS = (f"EDGEPATCH_PEER_{name}" for name in ("MODEL", "PATCH", "REPORT", "ENDS"))
"""Variables: the model's file, the patch's, the file that gets a line for each test, and the ids of the model's end tokens in JSON."""

HOP_HEADERS = ("connection", "content-length", "host", "transfer-encoding", "accept-encoding")
LOOSE = ("n_prompt", "n_predicted", "re_content", "re_prefill", "finish_reason")
"""Parameters of the tests that only their own model can meet."""

PATCH_TOKENS = 50
"""Of the lab's patch: positions beside those that a test asks for."""

OWN_PATHS = ("/health", "/metrics", "/v1/")
NATIVE = ("/completion", "/completions")


sys.modules["wget"] = types.ModuleType("wget")  # which the peer's tests import for the download of its own models


class _Proxy(BaseHTTPRequestHandler):
    """One request of a test, passed on; its server has the attributes ``served`` and ``is_open``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the tests print what they need."""

    def _pass_on(self) -> None:
        owner: Any = self.server
        length = int(self.headers.get("content-length") or 0)
        path, body, is_native = _translated(self.path, self.rfile.read(length), owner.served, owner.defaults)
        left_out = (*HOP_HEADERS, *(("authorization",) if owner.is_open else ()))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        if owner.is_open:
            headers["Authorization"] = f"Bearer {owner.served.key}"
        address = owner.served.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=300)
        try:
            connection.request(self.command, path, body or None, headers)
            self._answer(connection.getresponse(), is_native)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            connection.close()

    def _answer(self, reply: http.client.HTTPResponse, is_native: bool) -> None:
        is_stream = "event-stream" in (reply.getheader("content-type") or "")
        data = b"" if is_stream else _as_theirs(reply.read(), is_native)
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name.title(), value)  # their tests look names up as llama-server spells them
        if is_stream:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        while is_stream and (line := reply.readline()):
            if line.startswith(b"data: {"):
                line = b"data: " + _as_theirs(line[6:], is_native) + b"\n"
            self.wfile.write(line)
            self.wfile.flush()

    do_GET = do_POST = do_DELETE = do_OPTIONS = do_HEAD = _pass_on


def _translated(path: str, body: bytes, served: Served, defaults: dict[str, Any]) -> tuple[str, bytes, bool]:
    """Path and body as ours are written, and whether the reply is to be in llama.cpp's native form."""
    is_native = path in NATIVE
    if is_native:
        path = "/v1/completions"
    elif not path.startswith(OWN_PATHS):
        path = f"/v1{path}"
    try:
        values = json.loads(body)
    except ValueError:
        return path, body, is_native
    if isinstance(values, dict):
        values["model"] = served.model
        if "n_predict" in values:
            values["max_tokens"] = values.pop("n_predict")
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        usual = {limit if name == "n_predict" else name: value for name, value in defaults.items()}
        values = {**usual, **values}
    return path, json.dumps(values).encode(), is_native


def _as_theirs(data: bytes, is_native: bool) -> bytes:
    """A reply as llama-server writes it: a fingerprint begins with "b", for build; native replies have a form of their own.

    A chunk without text has null for its content, where OpenAI's service and this server write an empty text.
    """
    try:
        values = json.loads(data)
    except ValueError:
        return data
    if not isinstance(values, dict):
        return data
    if "system_fingerprint" in values:
        values["system_fingerprint"] = f"b{values['system_fingerprint']}"
    for choice in values.get("choices") or ():
        if choice.get("delta", {}).get("content") == "":
            choice["delta"]["content"] = None
    if is_native and values.get("choices"):
        values = _as_native(values)
    return json.dumps(values).encode()


def _as_native(reply: dict[str, Any]) -> dict[str, Any]:
    usage, choice = reply.get("usage") or {}, reply["choices"][0]
    return {
        "content": choice["text"],
        "stop": choice["finish_reason"] is not None,
        "stop_type": {"length": "limit", "stop": "eos"}.get(choice["finish_reason"] or "", "none"),
        "truncated": False,
        "has_new_line": "\n" in choice["text"],
        "timings": {"prompt_n": usage.get("prompt_tokens"), "predicted_n": usage.get("completion_tokens")},
        "tokens": [],
    }


class _AnyCount(int):
    """A number that is equal to whatever a test compares it with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class _AnyText(str):
    """A text that is equal to whatever a test compares it with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes the words and counts of llama.cpp's own model out of the tests' parameters."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for name in LOOSE:
            value = parameters.get(name)
            if isinstance(value, (int, str)):
                parameters[name] = _AnyCount(value) if isinstance(value, int) else _AnyText(value)


def _start(peer: Any, timeout_seconds: int = 0) -> None:
    """Takes the place of ``ServerProcess.start``."""
    slots = peer.n_slots or 1
    flags: list[object] = ["--patch", os.environ[PATCH], "--sequences", slots, "--threads", 1]
    flags += ["--alias", peer.model_alias or "tinyllama-2"]
    if peer.n_ctx:
        asked = PATCH_TOKENS + (peer.n_ctx if peer.kv_unified else peer.n_ctx // slots)
        # Theirs gives a model more positions than it was trained for; ours refuses to.
        flags += ["--context-length", min(asked, read_header(Path(os.environ[MODEL])).setting("context_length"))]
    if peer.chat_template_file:
        flags += ["--chat-template", peer.chat_template_file]
    for origin in (peer.cors_origins or "").split(","):
        flags += ["--allow-origin", origin] if "://" in origin else []
    peer.stack = ExitStack()
    folder = peer.stack.enter_context(tempfile.TemporaryDirectory())
    served = peer.stack.enter_context(serving(Path(os.environ[MODEL]), flags, Path(folder), peer.api_key or ""))
    proxy: Any = ThreadingHTTPServer((peer.server_host.split(",")[0], 0), _Proxy)
    proxy.served, proxy.is_open = served, not peer.api_key
    settings = {"temperature": peer.temperature, "seed": peer.seed, "n_predict": peer.n_predict}
    proxy.defaults = {name: value for name, value in settings.items() if value is not None}
    # Their model seldom ends by itself, and the tests rely on it.
    proxy.defaults["logit_bias"] = {str(token): -100 for token in json.loads(os.environ[ENDS])}
    peer.server_port, peer.ready = proxy.server_address[1], True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    peer.stack.callback(proxy.shutdown)
    sys.modules["utils"].server_instances.add(peer)


def _stop(peer: Any) -> None:
    sys.modules["utils"].server_instances.discard(peer)
    peer.stack.close()


def pytest_configure(config: pytest.Config) -> None:
    """Puts our server in the place of theirs, before their tests are read."""
    sys.path.insert(0, str(config.rootpath))
    utils: Any = import_module("utils")
    utils.ServerProcess.start, utils.ServerProcess.stop = _start, _stop
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.match_regex = lambda regex, text: True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line for each test: how its call, or what broke before it, ended."""
    if report.when == "call" or report.outcome != "passed":
        reason = str(getattr(report.longrepr, "reprcrash", report.longrepr or ""))
        row = {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "reason": reason[-600:]}
        with open(os.environ[REPORT], "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
