"""A page with onnxruntime-web in a real browser: served on loopback, it posts what it answered."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes.programs import running

CHROMIUM_VARIABLE = "EDGEPATCH_CHROMIUM"
KINDS = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
PAGE = "/programs/browser.html"


def ask_browser(request: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
    """What the page answers in the browser that the environment names.

    Raises:
        InputError: it names none.
        EdgepatchError: the page failed, or did not answer in time.
    """
    package = Path(request["client"]) / "node_modules" / "onnxruntime-web"
    roots = {
        "onnxruntime": package / "dist",
        "export": Path(request["folder"]),
        "model": Path(request["model"]),
        "programs": Path(__file__).parent,
    }
    with (
        _serving(roots, json.dumps(dict(request)).encode()) as (address, answers),
        open_page(address + PAGE),
    ):
        try:
            answer: dict[str, Any] = json.loads(answers.get(timeout=deadline_s))
        except Empty:
            raise EdgepatchError(f"the page did not answer within {deadline_s:.0f} s") from None
    if "error" in answer:
        raise EdgepatchError(f"the page failed: {answer['error']}")
    version = json.loads((package / "package.json").read_text("utf-8"))["version"]
    return answer | {"version": version}


@contextmanager
def open_page(address: str) -> Iterator[None]:
    """The page in a headless browser with a profile of its own, for the time of the block.

    Raises:
        InputError: the environment names no browser, or one that does not start.
    """
    program = os.environ.get(CHROMIUM_VARIABLE)
    if not program:
        raise InputError("expected a browser, found none", hint=f"set {CHROMIUM_VARIABLE} to Chromium's program")
    # Chromium refuses its sandbox to the administrator, who is the only user in containers.
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--disable-gpu", *sandbox, f"--user-data-dir={profile}", "--no-first-run"]
        try:
            with running([*command, address]):
                yield
        except OSError as error:
            raise InputError(f"{program}: {error.strerror}", hint=f"set {CHROMIUM_VARIABLE}") from None


@contextmanager
def _serving(roots: Mapping[str, Path], request: bytes) -> Iterator[tuple[str, Queue[bytes]]]:
    answers: Queue[bytes] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data, kind = (request, ".json") if self.path == "/request.json" else _file(roots, self.path)
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Type", KINDS.get(kind, "application/octet-stream"))
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def do_POST(self) -> None:
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *words: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", answers
        finally:
            server.shutdown()
            thread.join()


def _file(roots: Mapping[str, Path], address: str) -> tuple[bytes | None, str]:
    root, _, name = address.lstrip("/").partition("?")[0].partition("/")
    path = (roots[root] / name).resolve() if root in roots else None
    if path is None or not path.is_relative_to(roots[root].resolve()) or not path.is_file():
        return None, ""
    return path.read_bytes(), path.suffix
