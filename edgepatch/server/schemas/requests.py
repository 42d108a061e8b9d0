"""What requests may hold: a field that is not here is refused, and text is no number.

No field names a place in the cache, and none ever may: the patch lies in front of everything a client can address.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from edgepatch.server.schemas.base import WHOLE, RequestModel, Text, by_shape, by_tag, problem
from edgepatch.server.schemas.limits import INT32, MAX_BIASES, MAX_CHOICES, MAX_LOGPROBS, MAX_PROMPTS


def _require_few_biases(value: object) -> object:
    """Before each of them is looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise problem("too_many", f"at most {MAX_BIASES} entries")
    return value


def _tag_of_content(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _tag_of_prompt(value: object) -> str | None:
    if not isinstance(value, list) or not value:
        return _tag_of_content(value)
    return "<texts>" if isinstance(value[0], str) else "<lists>" if isinstance(value[0], list) else "<list>"


Name = Annotated[str, Field(min_length=1, max_length=256)]
MaxTokens = Annotated[int, Field(ge=1, le=INT32), WHOLE]
TokenId = Annotated[int, Field(ge=0, le=INT32), WHOLE]
Prompt = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**18, fail_fast=True)]


class TextPart(RequestModel):
    """A part of a message; there is no other kind."""

    type: Literal["text"]
    text: Text


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
Content = Annotated[Annotated[Text, Tag("<text>")] | Annotated[TextParts, Tag("<list>")], by_shape(_tag_of_content)]


class CalledFunction(RequestModel):
    """A function that the model called, with its arguments."""

    name: Name
    arguments: Annotated[Text, Field(description="A JSON object as text.")]


class ToolCall(RequestModel):
    """A call that the model made in an earlier turn."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class PlainMessage(RequestModel):
    """A turn of the user, or what holds for the whole conversation; "developer" is OpenAI's newer word for "system"."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Name | None = None


class AssistantMessage(RequestModel):
    """An earlier turn of the model."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128, fail_fast=True)] | None = None
    refusal: None = None


class ToolMessage(RequestModel):
    """What a called function returned."""

    role: Literal["tool"]
    content: Content
    name: Name | None = None
    tool_call_id: Name


ROLES = dict.fromkeys(("system", "developer", "user"), "<plain>") | {"assistant": "<assistant>", "tool": "<tool>"}
ChatMessage = Annotated[
    Annotated[PlainMessage, Tag("<plain>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by_tag("role", ROLES),
]


class OfferedFunction(RequestModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: OfferedFunction


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON schema with a name."""

    name: Name
    description: Text | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(RequestModel):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_tag("type", {"text": "<text>", "json_object": "<json_object>", "json_schema": "<json_schema>"}),
]
StopTexts = Annotated[list[Name], Field(max_length=16, fail_fast=True)]
Stop = Annotated[Annotated[Name, Tag("<text>")] | Annotated[StopTexts, Tag("<list>")], by_shape(_tag_of_content)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(_require_few_biases),
]


class StreamOptions(RequestModel):
    """What a stream brings beside its text."""

    include_usage: bool | None = None


class SampledRequest(RequestModel):
    """What both kinds of requests take. A field that is null is the same as one that is left out."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the most likely token. Default 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=INT32), WHOLE] | None = Field(
        None, description="Extension: keep the k likeliest tokens; 0 keeps all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Extension: keep tokens of at least this share of the likeliest one's probability."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = Field(
        None, description="Extension: above 1 makes repeated tokens less likely."
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = Field(
        None, description="Makes the draw repeatable."
    )
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = Field(
        None, description="Extension: a grammar the reply follows."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = Field(None, description="Accepted and not used.")


class ChatCompletionRequest(SampledRequest):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: MaxTokens | None = Field(None, description="Default: as many as the context holds.")
    max_completion_tokens: MaxTokens | None = Field(None, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none"] | None = None


class CompletionRequest(SampledRequest):
    """A request to ``/v1/completions``."""

    prompt: Annotated[
        Annotated[Prompt, Tag("<text>")]
        | Annotated[TokenIds, Tag("<list>")]
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists>")],
        by_shape(_tag_of_prompt),
    ] = Field(description="Text, token ids, or a list of either. No chat template is applied.")
    max_tokens: Annotated[int, Field(ge=0, le=INT32), WHOLE] | None = Field(
        None, description="Default 16; 0 only with echo."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    echo: bool | None = Field(None, description="Put the prompt, and its logprobs if asked for, in front of the reply.")


_building = threading.Lock()


def build_models() -> None:
    """Builds the validators, once; two threads must not do it at the same time."""
    with _building:
        for model in (ChatCompletionRequest, CompletionRequest):
            model.model_rebuild()
