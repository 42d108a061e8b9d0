"""What requests to ``/v1/responses`` may hold: items in place of messages. Nothing is kept here, so each request brings all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from edgepatch.server.schemas.base import (
    WHOLE,
    EchoedModel,
    FreeObject,
    NoValue,
    RequestModel,
    Text,
    Unused,
    by_shape,
    by_tag,
    problem,
)
from edgepatch.server.schemas.limits import INT32, MAX_LOGPROBS
from edgepatch.server.schemas.requests import (
    Effort,
    FunctionName,
    JsonObjectFormat,
    MaxTokensOrNone,
    Name,
    RefusalPart,
    SampledRequest,
    TextFormat,
    ToolWord,
    tag_of_choice,
)

NOT_KEPT = "replies are not kept here, send the whole conversation as input"


class MessagePart(EchoedModel):
    """A part of a message."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Unused = None
    logprobs: Unused = None
    parsed: Unused = None


PART_TAGS = {"input_text": "<text>", "output_text": "<text>", "refusal": "<refusal>"}
Part = Annotated[
    Annotated[MessagePart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")], by_tag("type", PART_TAGS)
]


def _tag_of_content(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Parts = Annotated[list[Part], Field(min_length=1, max_length=1024, fail_fast=True)]
PartsOrText = Annotated[Annotated[Text, Tag("<text>")] | Annotated[Parts, Tag("<list>")], by_shape(_tag_of_content)]


class MessageItem(EchoedModel):
    """A turn of anyone, or what holds for the whole conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: PartsOrText
    id: Unused = None
    status: Unused = None
    phase: Unused = None


class FunctionCallItem(EchoedModel):
    """A call that the model made in an earlier turn."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Annotated[Text, Field(description="A JSON object as text.")]
    parsed_arguments: Unused = None
    id: Unused = None
    status: Unused = None


class FunctionResultItem(EchoedModel):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: Name
    output: PartsOrText
    name: Name | None = None
    id: Unused = None
    status: Unused = None


class ReasoningPart(EchoedModel):
    """A thought."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(EchoedModel):
    """The thoughts of an earlier turn, for the chat template."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(max_length=1024, fail_fast=True)] | None = None
    summary: Unused = None
    id: Unused = None
    status: Unused = None


ITEM_TAGS = {name: f"<{name}>" for name in ("message", "function_call", "function_call_output", "reasoning")}


def _tag_of_item(value: object) -> str | None:
    kind = (value.get("type") or "message") if isinstance(value, dict) else None
    return ITEM_TAGS.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionResultItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    by_tag("type", ITEM_TAGS, _tag_of_item, NOT_KEPT),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True)]
Input = Annotated[Annotated[Text, Tag("<text>")] | Annotated[Items, Tag("<list>")], by_shape(_tag_of_content)]


class FunctionTool(EchoedModel):
    """A function that the model may call. Tools that OpenAI's service runs itself are not here."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: FreeObject | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class NamedFunction(RequestModel):
    """An offered function."""

    type: Literal["function"]
    name: Name


class AllowedTools(RequestModel):
    """Some of the offered functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=128, fail_fast=True)]


ToolChoice = Annotated[
    Annotated[ToolWord, Tag("<word>")]
    | Annotated[NamedFunction, Tag("<tool>")]
    | Annotated[AllowedTools, Tag("<tools>")],
    by_shape(tag_of_choice, "'auto', 'none', 'required', a function or allowed_tools"),
]


class JsonSchemaFormat(RequestModel):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: Name
    description: Text | None = None
    definition: Annotated[FreeObject, Field(alias="schema")]
    strict: bool | None = None


FORMAT_TAGS = {"text": "<text>", "json_object": "<json_object>", "json_schema": "<json_schema>"}


class TextOptions(RequestModel):
    """What the text of the reply is like."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
            by_tag("type", FORMAT_TAGS),
        ]
        | None
    ) = None
    verbosity: Unused = None


class ReasoningOptions(RequestModel):
    """How the model thinks."""

    effort: Effort | None = Field(None, description="For chat templates that know it.")
    summary: Unused = None
    generate_summary: Unused = None


def _require_nothing_kept(value: object) -> object:
    if value is not None:
        raise problem("not_kept", f"null: {NOT_KEPT}")
    return value


Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
INCLUDED_LOGPROBS = "message.output_text.logprobs"


class ResponseRequest(SampledRequest):
    """A request to ``/v1/responses``."""

    input: Input
    instructions: Text | None = Field(None, description="Stands in front of all items, as a system message.")
    max_output_tokens: MaxTokensOrNone = Field(None, description="Default, and with -1: as many as the context holds.")
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = Field(None, description="With required, or a function: exactly one call.")
    parallel_tool_calls: bool | None = Field(None, description="false keeps the first call of a reply.")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Included], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="message.output_text.logprobs has an effect; there is nothing else to include."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, Text], Field(max_length=64)] | None = Field(
        None, description="Comes back in the reply."
    )
    max_tool_calls: Annotated[int, Field(ge=0, le=INT32), WHOLE] | None = Field(
        None, description="Of tools that are not here."
    )
    background: Literal[False] | None = None
    store: Annotated[Any, Field(description="Accepted, and the reply says false: nothing is kept.")] = None
    previous_response_id: Annotated[None, BeforeValidator(_require_nothing_kept)] = None
    conversation: Annotated[None, BeforeValidator(_require_nothing_kept)] = None
    prompt: NoValue = None
