"""What requests may hold: a field that is not here is refused, and text is no number.

No field names a place in the cache, and none ever may: the patch lies in front of everything a client can address.
"""

from __future__ import annotations

from typing import Annotated, Literal

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
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _without_limit(value: object) -> object:
    """Clients say "no limit" with -1, which is what a field says that is left out."""
    return None if value == -1 and not isinstance(value, bool) else value


NO_LIMIT = BeforeValidator(_without_limit)
MaxTokens = Annotated[int, Field(ge=1, le=INT32), WHOLE]
MaxTokensOrNone = Annotated[
    MaxTokens | None,
    NO_LIMIT,
    Field(
        json_schema_extra={
            "anyOf": [{"type": "integer", "minimum": 1, "maximum": INT32}, {"const": -1}, {"type": "null"}]
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=INT32), WHOLE]
Prompt = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**18, fail_fast=True)]


class TextPart(EchoedModel):
    """A part of a message; there is no other kind."""

    type: Literal["text"]
    text: Text
    cache_control: Unused = None


class RefusalPart(EchoedModel):
    """What the model said in place of an answer."""

    type: Literal["refusal"]
    refusal: Text


SaidPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    by_tag("type", {"text": "<text>", "refusal": "<refusal>"}),
]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
SaidParts = Annotated[list[SaidPart], Field(max_length=1024, fail_fast=True)]
Content = Annotated[Annotated[Text, Tag("<text>")] | Annotated[TextParts, Tag("<list>")], by_shape(_tag_of_content)]
SaidContent = Annotated[Annotated[Text, Tag("<text>")] | Annotated[SaidParts, Tag("<list>")], by_shape(_tag_of_content)]


class CalledFunction(EchoedModel):
    """A function that the model called, with its arguments."""

    name: Name
    arguments: Annotated[Text, Field(description="A JSON object as text.")]
    parsed_arguments: Unused = None


class ToolCall(EchoedModel):
    """A call that the model made in an earlier turn."""

    id: Name
    type: Literal["function"]
    function: CalledFunction
    index: Unused = None


class PlainMessage(EchoedModel):
    """A turn of the user, or what holds for the whole conversation; "developer" is OpenAI's newer word for "system"."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Name | None = None
    id: Unused = None
    cache_control: Unused = None


class AssistantMessage(EchoedModel):
    """An earlier turn of the model, as replies bring it."""

    role: Literal["assistant"]
    content: SaidContent | None = None
    refusal: Text | None = Field(None, description="What the model said in place of a content.")
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    reasoning_content: Text | None = Field(None, description="The thoughts of that turn; for the chat template.")
    reasoning: Text | None = Field(None, description="Another name of reasoning_content.")
    reasoning_details: Unused = None
    thinking_blocks: Unused = None
    id: Unused = None
    annotations: Unused = None
    parsed: Unused = None
    provider_specific_fields: Unused = None
    cache_control: Unused = None


class ToolMessage(EchoedModel):
    """What a called function returned."""

    role: Literal["tool"]
    content: Content
    name: Name | None = None
    tool_call_id: Name
    id: Unused = None
    cache_control: Unused = None


ROLES = dict.fromkeys(("system", "developer", "user"), "<plain>") | {"assistant": "<assistant>", "tool": "<tool>"}
ChatMessage = Annotated[
    Annotated[PlainMessage, Tag("<plain>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by_tag("role", ROLES),
]


class OfferedFunction(EchoedModel):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: FreeObject | None = None
    strict: bool | None = None


class Tool(EchoedModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: OfferedFunction
    cache_control: Unused = None


class ChosenFunction(RequestModel):
    """The name of an offered function."""

    name: Name


class NamedTool(RequestModel):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: ChosenFunction


class SomeTools(RequestModel):
    """Some of the offered tools, and whether one of them is to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128, fail_fast=True)]


class AllowedTools(RequestModel):
    """Some of the offered tools, as OpenAI's chat completions name them."""

    type: Literal["allowed_tools"]
    allowed_tools: SomeTools


def tag_of_choice(value: object) -> str | None:
    """Which kind of choice of tools a value is."""
    if isinstance(value, dict):
        return "<tools>" if value.get("type") == "allowed_tools" else "<tool>"
    return "<word>" if isinstance(value, str) else None


ToolWord = Literal["auto", "none", "required"]
ToolChoice = Annotated[
    Annotated[ToolWord, Tag("<word>")] | Annotated[NamedTool, Tag("<tool>")] | Annotated[AllowedTools, Tag("<tools>")],
    by_shape(tag_of_choice, "'auto', 'none', 'required', a tool or allowed_tools"),
]


class TemplateValues(RequestModel):
    """Variables that the chat template may take; none of them holds text of its own."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    clear_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=INT32), WHOLE] | None = None


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object, or one that follows a schema, as llama.cpp's clients write it."""

    type: Literal["json_object"]
    definition: Annotated[FreeObject | None, Field(alias="schema")] = None


class NamedSchema(RequestModel):
    """A JSON schema, whose name is not used."""

    name: Name | None = None
    description: Text | None = None
    definition: Annotated[FreeObject, Field(alias="schema")]
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
    include_obfuscation: Unused = None


class SampledRequest(EchoedModel):
    """What all kinds of requests take. A field that is null is the same as one that is left out."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None,
        description="0 takes the most likely token. Default of this and the next four: sampling_defaults in /v1/models.",
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Keep the likeliest tokens up to this probability; 0 takes the most likely one."
    )
    top_k: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = Field(
        None, description="Extension: keep the k likeliest tokens; 0 and -1 keep all."
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
        None, description="Makes the draw repeatable, as far as sums come out alike; a negative one draws afresh."
    )
    stop: Stop | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = Field(
        None, description="Extension: a grammar the reply follows."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = Field(None, description="Accepted and not used.")
    store: Unused = None
    metadata: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None


class ChoicesRequest(SampledRequest):
    """What requests for one or more choices take."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    response_format: ResponseFormat | None = None


class ChatCompletionRequest(ChoicesRequest):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: MaxTokensOrNone = Field(None, description="Default, and with -1: as many as the context holds.")
    max_completion_tokens: MaxTokensOrNone = Field(None, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = Field(None, description="With required, or a tool: exactly one call.")
    parallel_tool_calls: bool | None = Field(None, description="false keeps the first call of a reply.")
    chat_template_kwargs: TemplateValues | None = Field(None, description="Extension: variables of the chat template.")
    enable_thinking: bool | None = Field(None, description="Extension: the same in chat_template_kwargs.")
    reasoning_effort: Effort | None = Field(None, description="For chat templates that know it.")
    continue_final_message: bool | None = Field(
        None, description="Extension: the reply continues the last message, which is the assistant's."
    )
    add_generation_prompt: bool | None = Field(None, description="Extension: false beside continue_final_message.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    verbosity: Unused = None
    prediction: NoValue = None
    audio: NoValue = None
    functions: NoValue = None
    function_call: NoValue = None


class CompletionRequest(ChoicesRequest):
    """A request to ``/v1/completions``."""

    prompt: Annotated[
        Annotated[Prompt, Tag("<text>")]
        | Annotated[TokenIds, Tag("<list>")]
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists>")],
        by_shape(_tag_of_prompt),
    ] = Field(description="Text, token ids, or a list of either. No chat template is applied.")
    max_tokens: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = Field(
        None, description="Default 16; 0 only with echo; -1: as many as the context holds."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[Literal[1], WHOLE] | None = Field(None, description="Replies are not drawn and thrown away.")
    echo: bool | None = Field(None, description="Put the prompt, and its logprobs if asked for, in front of the reply.")
