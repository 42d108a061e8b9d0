"""The OpenAPI document, made of the models that the requests are checked with and of the types of the replies."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

import edgepatch
from edgepatch.server.refusals import KINDS
from edgepatch.server.schemas import replies, requests, response_replies, response_requests, validation

COMPONENTS = (
    requests.ChatCompletionRequest,
    replies.ChatCompletion,
    replies.ChatCompletionChunk,
    response_requests.ResponseRequest,
    response_replies.Response,
    response_replies.ResponseEvent,
    requests.CompletionRequest,
    replies.Completion,
    replies.CompletionChunk,
    replies.Error,
    replies.Health,
    replies.Model,
    replies.Models,
    replies.Patches,
)
"""Types of whole bodies; what they hold comes along."""

REASONS = {
    400: "The request cannot be used; the message names the field, and what was expected and found.",
    401: "The API key is missing or wrong.",
    403: "The request names another host, or comes from a page of another one.",
    404: "There is no such model or path.",
    405: "The path does not take this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    431: "Too many header fields.",
    500: "The server failed.",
    503: "The model is loading, the queue is full, or the server is stopping; Retry-After says when to come again.",
    504: "The reply was not complete in time.",
}
EVERYWHERE = (403, 405, 431, 500)
GENERATING = (400, 401, 404, 408, 413, 415, 503, 504)


class _WithoutTitles(GenerateJsonSchema):
    """A title that only repeats the name of a field says nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schemas(ref_template: str = "#/components/schemas/{model}") -> dict[str, Any]:
    """JSON Schemas of all bodies and what they hold, by name.

    Args:
        ref_template: how they refer to each other.
    """
    validation.build_models()
    adapters: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [
        (body.__name__, "validation", TypeAdapter(body)) for body in COMPONENTS
    ]
    _, document = TypeAdapter.json_schemas(adapters, ref_template=ref_template, schema_generator=_WithoutTitles)
    return dict(document["$defs"])


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1 of the whole server."""
    chat, completion = ("ChatCompletionRequest", "ChatCompletion"), ("CompletionRequest", "Completion")
    model_path = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 256},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgepatch",
            "version": edgepatch.__version__,
            "description": "An OpenAI-compatible server of patched models.",
        },
        "security": [{"key": []}],
        "paths": {
            "/health": {"get": {**_get("health", "Health", 503), "security": []}},
            "/openapi.json": {"get": {**_operation("openapi", {"type": "object"}), "security": []}},
            "/v1/models": {"get": _get("listModels", "Models", 401, 503)},
            "/v1/models/{model}": {"get": {**_get("getModel", "Model", 401, 404, 503), "parameters": [model_path]}},
            "/v1/patches": {"get": _get("listPatches", "Patches", 401, 503)},
            "/v1/chat/completions": {"post": _post("createChatCompletion", *chat)},
            "/v1/responses": {"post": _post("createResponse", "ResponseRequest", "Response", is_named=True)},
            "/v1/completions": {"post": _post("createCompletion", *completion)},
            "/metrics": {"get": _metrics()},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": json_schemas(),
        },
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(
    name: str, schema: dict[str, Any], *statuses: int, media_type: str = "application/json"
) -> dict[str, Any]:
    error = {"application/json": {"schema": _ref("Error")}}
    assert set(statuses) <= set(KINDS)
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": {media_type: {"schema": schema}}}}
    for status in sorted({*statuses, *EVERYWHERE}):
        responses[str(status)] = {"description": REASONS[status], "content": error}
    return {"operationId": name, "responses": responses}


def _get(name: str, schema: str, *statuses: int) -> dict[str, Any]:
    operation = _operation(name, _ref(schema), *statuses)
    if schema == "Health":
        operation["responses"]["503"] = {
            "description": "The model is loading, or the server stops or has failed.",
            "content": {"application/json": {"schema": _ref(schema)}},
        }
    return operation


def _post(name: str, request: str, reply: str, is_named: bool = False) -> dict[str, Any]:
    operation = _operation(name, _ref(reply), *GENERATING)
    chunk = f"A {reply}Event in JSON." if is_named else f"A {reply}Chunk or an Error in JSON; [DONE] at the end."
    properties: dict[str, Any] = {"data": {"type": "string", "description": chunk}}
    event = {
        "type": "object",
        "properties": properties | ({"event": {"type": "string"}} if is_named else {}),
        "required": ["data"],
        "description": "One event, where `stream` is true.",
    }
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": event}
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    return operation


def _metrics() -> dict[str, Any]:
    return _operation("metrics", {"type": "string"}, 401, 503, media_type="text/plain")
