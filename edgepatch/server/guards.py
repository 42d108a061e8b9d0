"""What stands in front of every request: the host that it names, the page that it comes from, and the key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgepatch.server.refusals import Refusal
from edgepatch.server.settings import ServerSettings

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Paths that need no key: they say nothing of the model or of its use."""

LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
ALLOWED_METHODS = "GET, POST"
# What the clients' libraries send beside Authorization and Content-Type, of which browsers ask.
CLIENT_HEADERS = re.compile(
    r"authorization|content-type|accept|x-stainless-[a-z-]+|openai-[a-z-]+|user-agent|http-referer|x-title|x-requested-with"
    r"|cache-control|pragma|idempotency-key|x-request-id|traceparent|tracestate|baggage|sentry-trace"
)
MAX_HEADERS = 64
PREFLIGHT_AGE_S = 600


def refusal_response(refusal: Refusal) -> JSONResponse:
    """The reply to a request that is not served."""
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


class Guard:
    """Lets requests through that name this server, come from no foreign page, and carry the key.

    A page in a browser can send requests to loopback whatever it is; so a request with the origin of another host is refused
    as a whole, not only its reply hidden. A host name that is not ours means that somebody's name server answers with our
    address.

    Args:
        app: what is guarded.
        settings: hosts and key.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._names = {"localhost", *settings.allowed_hosts}
        self._origins = frozenset(settings.allowed_origins)
        self._takes_any_address = not settings.is_loopback
        self._key = _digest(settings.api_key.encode("latin-1")) if settings.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        try:
            self._check_host(headers.getlist("host"))
            self._check_origin(headers.getlist("origin"))
            if "transfer-encoding" in headers and "content-length" in headers:
                raise Refusal(
                    400, "expected a content length or a transfer encoding, found both", code="ambiguous_length"
                )
            if len(headers) > MAX_HEADERS:
                raise Refusal(
                    431, f"expected at most {MAX_HEADERS} header fields, found {len(headers)}", code="too_many_headers"
                )
            if scope["method"] == "OPTIONS" and origin and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, _with_origin(send, origin))
                return
            self._check_key(scope["path"], headers.get("authorization", ""))
        except Refusal as refusal:
            allowed = origin if self._is_let_in(origin) else ""
            await refusal_response(refusal)(scope, receive, _with_origin(send, allowed))
            return
        await self._app(scope, receive, _with_origin(send, origin))

    def _check_host(self, hosts: list[str]) -> None:
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        if not (name in self._names or self._is_our_address(name)):
            hint = f"; if it is a name of this machine, start the server with --allow-host {name[:100]}" if name else ""
            raise Refusal(403, f"host: expected this server's name, found {name[:100]!r}{hint}", code="wrong_host")

    def _is_let_in(self, origin: str) -> bool:
        return LOOPBACK_ORIGIN.fullmatch(origin) is not None or origin in self._origins

    def _check_origin(self, origins: list[str]) -> None:
        wrong = [origin for origin in origins if not self._is_let_in(origin)]
        if wrong or len(origins) > 1:
            name = (wrong or origins)[0][:100]
            raise Refusal(
                403,
                f"origin: expected a page of this machine, found {name!r}; if it is yours, start the server with --allow-origin",
                code="foreign_origin",
            )

    def _is_our_address(self, name: str) -> bool:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._takes_any_address  # a name server can be hostile, a number cannot

    def _check_key(self, path: str, authorization: str) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip().encode("latin-1", errors="replace"))
        if not hmac.compare_digest(digest, self._key) or scheme.lower() != "bearer":
            raise Refusal(
                401, "expected the server's API key as a bearer token, found none or another", code="invalid_api_key"
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # so that comparing takes the same time for keys of every length


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty where it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", host.strip())
    return (match[1] or match[2]).lower() if match else ""


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks first; it needs no key, because browsers send none with the question."""
    method = headers["access-control-request-method"]
    names = [
        name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",") if name.strip()
    ]
    wrong = next((name for name in names if not CLIENT_HEADERS.fullmatch(name)), None)
    if method not in ALLOWED_METHODS.split(", ") or wrong is not None:
        actual = f"the header {wrong[:100]!r}" if wrong is not None else f"the method {method[:20]!r}"
        raise Refusal(
            403,
            f"preflight: expected {ALLOWED_METHODS} with the usual headers, found {actual}",
            code="preflight_refused",
        )
    answer = {"Access-Control-Allow-Methods": ALLOWED_METHODS, "Access-Control-Max-Age": str(PREFLIGHT_AGE_S)}
    return Response(
        status_code=200, headers=answer | ({"Access-Control-Allow-Headers": ", ".join(names)} if names else {})
    )


def _with_origin(send: Send, origin: str) -> Send:
    """Tells the browser that a page of this origin may read the reply; never with credentials."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Vary"] = "Origin"
            headers["X-Content-Type-Options"] = "nosniff"
            if origin:
                headers["Access-Control-Allow-Origin"] = origin
        await send(message)

    return wrapped
