"""A real browser, driven over a pipe by its own protocol; only where EDGEPATCH_CHROMIUM names its program."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "EDGEPATCH_CHROMIUM"
WAIT_S = 60.0


class Page:
    """One page of the browser.

    Args:
        write: of the browser's pipe.
        read: of the other one.
    """

    def __init__(self, write: Any, read: Any) -> None:
        self._write, self._read, self._numbers, self._held = write, read, itertools.count(1), b""
        self.errors: list[str] = []
        target = self._ask("Target.createTarget", {"url": "about:blank"}, "")["targetId"]
        self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True}, "")["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        return self._ask(method, parameters, self._session)

    def _ask(self, method: str, parameters: dict[str, Any], session: str) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            reply = json.loads(self._next())
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return dict(reply["result"])
            self._note(reply)

    def _next(self) -> bytes:
        while b"\0" not in self._held:
            part = os.read(self._read, 65536)
            assert part, "the browser has gone"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return message

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"])[:500])
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def open(self, url: str, width: int = 1100, height: int = 760, mode: str = "light") -> None:
        """Another page, in a window of that size and colour."""
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **phone)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
        self.ask("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, which may be a promise."""
        reply = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The first true value of an expression."""
        start = time.monotonic()
        while not (value := self.run(script)):
            assert time.monotonic() - start < WAIT_S, f"{script} {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Text as a keyboard writes it, into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str, number: int, text: str = "") -> None:
        """A key, by its name and number."""
        for kind in ("keyDown", "keyUp"):
            shown = {"text": text} if text and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number, **shown)

    def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser with a profile of its own."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    reading, commands = os.pipe()
    answers, writing = os.pipe()

    def on_start() -> None:
        # The browser reads descriptor 3 and writes 4; the pipes may have been given these numbers themselves.
        high = [os.dup2(descriptor, number) for descriptor, number in ((reading, 101), (writing, 102))]
        for descriptor, number in zip(high, (3, 4), strict=True):
            os.dup2(descriptor, number)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [os.environ[VARIABLE], "--headless", *sandbox, "--disable-gpu", "--remote-debugging-pipe"]
        child = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=on_start,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reading)
        os.close(writing)
        try:
            with os.fdopen(commands, "wb") as write:
                yield Page(write, answers)
        finally:
            os.killpg(child.pid, 9)
            child.wait()
            os.close(answers)
