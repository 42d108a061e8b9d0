"""Answers without the patch, to be seen beside those with it: a second model that never held one, on a path that is there by word alone."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgepatch.server.conversations import parse_chat
from edgepatch.server.endpoints import GenerationEndpoint
from edgepatch.server.refusals import Refusal
from edgepatch.server.replies.chat import ChatWriter
from edgepatch.server.service import Service

BARE_PATH = "/bare/v1/chat/completions"
PATCH_HEADER = (b"x-edgepatch-patch", b"none")
PASSED_ON = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Proxies set them: behind one a request from another machine looks like one of this."""


def bare_routes(bare: Service | None) -> list[Route]:
    """The path of answers without the patch; none where the server does not compare."""
    if bare is None:
        return []
    endpoint = GenerationEndpoint(bare, parse_chat, ChatWriter)
    return [Route(BARE_PATH, BareEndpoint(endpoint), methods=["POST"])]


class BareEndpoint:
    """Lets requests of this machine through, and names on each reply that no patch is behind it.

    Args:
        app: answers without the patch.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _require_local(scope)

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], PATCH_HEADER]}
            await send(message)

        await self._app(scope, receive, naming)


def _require_local(scope: Scope) -> None:
    """Refuses whatever may come from another machine.

    Raises:
        Refusal: 403.
    """
    address = (scope.get("client") or ("",))[0]
    try:
        is_local = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_local = False
    headers = Headers(scope=scope)
    passed_on = next((name for name in PASSED_ON if name in headers), "")
    if not is_local or passed_on:
        source = f"one that a proxy passed on ({passed_on})" if passed_on else f"one from {address[:60]!r}"
        raise Refusal(
            403, f"answers without the patch: expected a request of this machine, found {source}", code="not_local"
        )
