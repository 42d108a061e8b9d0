"""The ASGI application: routes, and what each error becomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgepatch.errors import EdgepatchError
from edgepatch.server import metrics, requests
from edgepatch.server.endpoints import GenerationEndpoint
from edgepatch.server.guards import Guard, refusal_response
from edgepatch.server.refusals import Refusal, refusal_of
from edgepatch.server.replies import ChatWriter, CompletionWriter
from edgepatch.server.service import Service

PATHS = ("/health", "/openapi.json", "/metrics", "/v1/models", "/v1/patches", "/v1/chat/completions", "/v1/completions")
JOIN_S = 5.0
"""For the runtime's thread to end once its work is cancelled; a step that takes longer is left to the end of the process."""


def create_app(service: Service) -> ASGIApp:
    """The application of a service, guarded; it starts the service's thread and ends it."""
    handlers: dict[Any, Callable[..., Any]] = {
        EdgepatchError: _answer_error(service),
        HTTPException: _answer_http_error,
        Exception: _answer_error(service),
    }
    app = Starlette(routes=routes(service), exception_handlers=handlers, lifespan=_lifespan(service))
    app.router.redirect_slashes = False
    return _Counted(Guard(app, service.settings), service.metrics)


def _lifespan(service: Service) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        building = asyncio.get_running_loop().run_in_executor(None, _build_models)
        yield
        await building
        service.text_threads.close()
        service.constraint_thread.shutdown(wait=False, cancel_futures=True)
        service.scheduler.drain(0)
        service.scheduler.join(JOIN_S)

    return lifespan


def _build_models() -> None:
    """While the model loads: pydantic is no part of the way to the first `/health`."""
    from edgepatch.server.schemas.requests import build_models

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
        Route("/v1/chat/completions", GenerationEndpoint(service, requests.parse_chat, ChatWriter), methods=["POST"]),
        Route(
            "/v1/completions",
            GenerationEndpoint(service, requests.parse_completion, CompletionWriter),
            methods=["POST"],
        ),
    ]


def _answer_error(service: Service) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        service.note_error(error)
        return refusal_response(refusal_of(error))

    return answer


def _answer_http_error(request: Request, error: HTTPException) -> Response:
    paths = ", ".join(path for path in PATHS if path.startswith("/v1"))
    words = {
        404: f"there is no such path; clients' base URL ends in /v1, and the paths are {paths}",
        405: f"the path does not take {request.method[:20]}",
    }
    status = error.status_code if error.status_code in words else 400
    response = refusal_response(
        Refusal(status, words.get(status, str(error.detail)), code="not_found" if status == 404 else "")
    )
    response.headers.update(error.headers or {})  # Allow
    return response


class _Counted:
    """Counts the replies by path and status."""

    def __init__(self, app: ASGIApp, counts: metrics.Metrics) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                self._counts.count_reply(path if path in PATHS else "other", message["status"])
            await send(message)

        await self._app(scope, receive, counted)
