"""HTTP to a running llama-server."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepatch.errors import InputError

MAX_REPLY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Reply:
    """An HTTP reply.

    Attributes:
        status: 200, 404, ...
        body: the JSON document; an empty object where the reply was none.
    """

    status: int
    body: Any

    @property
    def ok(self) -> bool:
        """Whether the server did what it was asked."""
        return self.status == 200

    @property
    def message(self) -> str:
        """The server's own words for an error."""
        error = self.body.get("error") if isinstance(self.body, Mapping) else None
        text = error.get("message") if isinstance(error, Mapping) else error
        return str(text or f"HTTP {self.status}")[:500]

    def value(self, *path: str | int) -> Any:
        """What stands at a path of keys and indexes, or ``None``."""
        value = self.body
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value


class LlamaServer:
    """A llama-server that somebody started.

    Args:
        url: "http://127.0.0.1:8080"; the path, if any, is kept.
        api_key: sent as a bearer token.
        timeout_s: for each request; a slow device evaluates a prompt for minutes.

    Raises:
        InputError: the URL is none of HTTP, or the key cannot be sent.
    """

    def __init__(self, url: str, api_key: str = "", timeout_s: float = 600) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"server: expected a URL like http://127.0.0.1:8080, found {url!r}")
        if not re.fullmatch(r"[!-~]*", api_key):
            raise InputError("API key: expected printable ASCII without spaces, found other characters")
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        # A key for a device goes through no proxy, and to no address that somebody else names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())

    def get(self, path: str) -> Reply:
        """GET.

        Raises:
            InputError: the server cannot be reached.
        """
        return self._send(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """POST of a JSON document.

        Raises:
            InputError: the server cannot be reached.
        """
        return self._send(path, json.dumps(body).encode("utf-8"))

    def _send(self, path: str, data: bytes | None) -> Reply:
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return Reply(response.status, _parse(response.read(MAX_REPLY_BYTES)))
        except urllib.error.HTTPError as error:
            with error:
                if 300 <= error.code < 400:
                    target = error.headers.get("Location", "another address")
                    raise InputError(
                        f"{self.url}{path} leads to {target[:200]!r}",
                        hint="name that address, if it is the server's own",
                    ) from None
                return Reply(error.code, _parse(error.read(MAX_REPLY_BYTES)))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            reason = getattr(reason, "strerror", None) or reason
            raise InputError(
                f"cannot reach {self.url}{path}: {reason}", hint="start the server, check host and port"
            ) from None

    # What the checks ask.

    def restore(self, slot: int, filename: str) -> Reply:
        """Restores a slot from a file in the server's ``--slot-save-path``."""
        return self.post(f"/slots/{slot}?action=restore", {"filename": filename})

    def complete(self, tokens: Sequence[int], slot: int, max_tokens: int = 1, num_logprobs: int = 0) -> Reply:
        """Continues token ids greedily in one slot; whether its cache is reused is left to the server, as clients leave it."""
        return self.post(
            "/completion",
            {
                "prompt": list(tokens),
                "id_slot": slot,
                "n_predict": max_tokens,
                "n_probs": num_logprobs,
                "temperature": 0,
                "return_tokens": True,
            },
        )

    def chat(
        self, messages: Sequence[Mapping[str, str]], slot: int, max_tokens: int = 1, num_logprobs: int = 20
    ) -> Reply:
        """Answers a conversation greedily in one slot."""
        return self.post(
            "/v1/chat/completions",
            {
                "messages": list(messages),
                "id_slot": slot,
                "max_tokens": max_tokens,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": num_logprobs,
            },
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever a reply leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return {}
