"""The ASGI application: routes, and what each error becomes."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgepatch.errors import EdgepatchError
from edgepatch.server import metrics
from edgepatch.server.conversations import parse_chat
from edgepatch.server.endpoints import TOKENS, GenerationEndpoint
from edgepatch.server.guards import Guard, refusal_response
from edgepatch.server.items import parse_response
from edgepatch.server.page import chat_page
from edgepatch.server.page.comparing import BARE_PATH, bare_routes
from edgepatch.server.refusals import Refusal, refusal_of
from edgepatch.server.replies.chat import ChatWriter
from edgepatch.server.replies.completions import CompletionWriter
from edgepatch.server.replies.responses import ResponseWriter
from edgepatch.server.requests import parse_completion
from edgepatch.server.service import Service

PATHS = (
    "/health",
    "/openapi.json",
    "/metrics",
    "/v1/models",
    "/v1/patches",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/completions",
)
NOT_SERVED = {
    "embeddings": "the model that is served writes text and gives no embeddings",
    "responses/": "replies are not kept: a response is read where it is made, by POST /v1/responses",
    "conversations": "conversations are not kept: each request brings all of its input",
}
"""Paths of OpenAI's that people ask for -> why they are not here."""

FRONT_PAGE = """edgepatch serves a language model here. This is an API for programs, not a page.

Try, with the key that `edgepatch serve` printed or was given:

  export EDGEPATCH_API_KEY=...
  curl {url}/models -H "Authorization: Bearer $EDGEPATCH_API_KEY"

and with the name of the model that this lists, in place of MODEL:

  curl {url}/chat/completions -H "Authorization: Bearer $EDGEPATCH_API_KEY" -H "Content-Type: application/json" -d '{{"model": "MODEL", "messages": [{{"role": "user", "content": "Hello"}}]}}'

Any client of OpenAI's API works with the base URL {url}. All paths and fields: /openapi.json
"""
CLIENT_LEFT = 499
"""Stands in the log where a client left before it had an answer."""

JOIN_S = 5.0
"""For the runtime's thread to end once its work is cancelled; a step that takes longer is left to the end of the process."""


def create_app(service: Service) -> ASGIApp:
    """The application of a service, guarded; it starts the service's thread and ends it."""
    handlers: dict[Any, Callable[..., Any]] = {
        EdgepatchError: _answer_error(service),
        HTTPException: _answer_http_error,
        Exception: _answer_error(service),
    }
    paths = [Route("/", _front_page(service)), *bare_routes(service.bare), *routes(service)]
    app = Starlette(routes=paths, exception_handlers=handlers, lifespan=_lifespan(service))
    app.router.redirect_slashes = False
    log = metrics.RequestLog(service.settings.log) if service.settings.log else None
    return _Watched(Guard(app, service.settings), service.metrics, log)


def _lifespan(service: Service) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for one in service.all:
            one.scheduler.start()
        building = asyncio.get_running_loop().run_in_executor(None, _build_models)
        yield
        await building
        for one in service.all:
            one.text_threads.close()
            one.constraint_threads.close()
            one.scheduler.drain(0)
            one.scheduler.join(JOIN_S)

    return lifespan


def _build_models() -> None:
    """While the model loads: pydantic is no part of the way to the first `/health`."""
    from edgepatch.server.schemas.validation import build_models

    build_models()


def _document() -> dict[str, Any]:
    from edgepatch.server.schemas import openapi  # what makes the document is needed when somebody asks for it

    return openapi.document()


def routes(service: Service) -> list[Route]:
    """All paths, which the OpenAPI document describes."""

    async def health(request: Request) -> Response:
        state = service.scheduler.state
        loaded = {"patches": service.patches} if state == "ok" else {}
        notes = {"notes": service.notes} if service.notes else {}
        return JSONResponse({"status": state, **loaded, **notes}, 200 if state == "ok" else 503)

    async def document(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(_document))

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.require_model().entry]})

    async def model(request: Request) -> Response:
        served, asked = service.require_model(), request.path_params["model"]
        if asked != served.name:
            raise Refusal(404, f"model: expected {served.name!r}, found {asked[:100]!r}", "model", "model_not_found")
        return JSONResponse(served.entry)

    async def patches(request: Request) -> Response:
        served = service.require_model()
        return JSONResponse({"object": "list", "data": served.patches, "system_fingerprint": served.fingerprint})

    async def figures(request: Request) -> Response:
        served, scheduler = service.require_model(), service.scheduler
        gauges = {
            "sequences": served.num_sequences,
            "generations_running": scheduler.num_running,
            "generations_waiting": scheduler.num_waiting,
        }
        return PlainTextResponse(service.metrics.text(gauges, served.labels), media_type=metrics.CONTENT_TYPE)

    return [
        Route("/health", health),
        Route("/openapi.json", document),
        Route("/metrics", figures),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/v1/patches", patches),
        *(
            Route(path, GenerationEndpoint(service, parse, writer), methods=["POST"])
            for path, parse, writer in (
                ("/v1/chat/completions", parse_chat, ChatWriter),
                ("/v1/responses", parse_response, ResponseWriter),
                ("/v1/completions", parse_completion, CompletionWriter),
            )
        ),
    ]


def _answer_error(service: Service) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        service.note_error(error)
        return refusal_response(refusal_of(error))

    return answer


def _answer_http_error(request: Request, error: HTTPException) -> Response:
    paths, asked = ", ".join(path for path in PATHS if path.startswith("/v1")), request.url.path.removeprefix("/v1")
    why = next((why for name, why in NOT_SERVED.items() if asked.startswith(f"/{name}")), "there is no such path")
    words = {
        404: f"{why}; clients' base URL ends in /v1, and the paths are {paths}",
        405: f"the path does not take {request.method[:20]}",
    }
    status = error.status_code if error.status_code in words else 400
    response = refusal_response(
        Refusal(status, words.get(status, str(error.detail)), code="not_found" if status == 404 else "")
    )
    response.headers.update(error.headers or {})  # Allow
    return response


def _front_page(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """For people who open the address in a browser; it says nothing of the model or of its use."""

    async def page(request: Request) -> Response:
        is_browser = "text/html" in request.headers.get("accept", "")
        if is_browser and service.settings.has_page:
            return chat_page(service.bare is not None)
        address = f"{request.url.scheme}://{request.headers['host']}/v1"  # which the guard has looked at
        text = FRONT_PAGE.format(url=address)
        return _as_page(text) if is_browser else PlainTextResponse(text)

    return page


def _as_page(text: str) -> Response:
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = f'<title>edgepatch</title><pre style="white-space: pre-wrap">{html.escape(text)}</pre></html>'
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    return HTMLResponse(head + body, headers={"Content-Security-Policy": policy})


def _route_of(path: str) -> str:
    """One of our paths, or what stands for all others: a path may hold whatever a client puts there."""
    if path in ("/", BARE_PATH, *PATHS):
        return path
    return "/v1/models/..." if path.startswith("/v1/models/") else "other"


class _Watched:
    """Counts the replies by path and status, and writes the log."""

    def __init__(self, app: ASGIApp, counts: metrics.Metrics, log: metrics.RequestLog | None) -> None:
        self._app, self._counts, self._log = app, counts, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, route = time.monotonic(), CLIENT_LEFT, _route_of(scope["path"])
        scope[TOKENS] = {}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._counts.count_reply(route if route in PATHS else "other", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if self._log is not None:
                self._log.note(scope["method"], route, status, time.monotonic() - start, scope[TOKENS])
