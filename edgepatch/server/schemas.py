"""What requests may hold. The models are closed and strict: a field that is not here is refused, and text is no number.

No field names a place in the cache, and none ever may: the patch lies in front of everything a client can address.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
MAX_BIASES = 1024
INT32 = 2**31 - 1


def _problem(kind: str, expected: str, **context: str) -> PydanticCustomError:
    """A problem that pydantic has no check for; `edgepatch.server.validation` puts its sentence together."""
    # pydantic cannot carry halves of characters, which a field's name may hold.
    safe = {name: text.encode("utf-8", "backslashreplace").decode("utf-8") for name, text in context.items()}
    return PydanticCustomError(kind, expected, safe)


class RequestModel(BaseModel):
    """An object in a request. What a client adds is looked for first, so that many unknown fields are no more work than one."""

    # Built by `build_models`, not at import: a server that starts needs none of them yet.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _require_known_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names, tags = _fields_of(cls)
        for name, tag in tags.items():
            # A wrong tag says that another kind of object was meant, whose fields are no surprise then.
            if name in value and value[name] != tag:
                raise _problem(f"wrong_{name}", repr(tag))
        unknown = next((name for name in value if name not in names), None)
        if unknown is not None:
            raise _problem("unknown_field", f"one of {', '.join(names)}", field=unknown)
        return value


@cache
def _fields_of(model: type[RequestModel]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of an object's fields, and the values of those that tell it from other objects."""
    fields = model.model_fields
    tags = {
        name: get_args(field.annotation)[0] for name, field in fields.items() if get_origin(field.annotation) is Literal
    }
    return tuple(field.alias or name for name, field in fields.items()), tags


def _require_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _problem("string_unicode", "valid Unicode") from None
    return text


def as_integer(value: object) -> object:
    """JSON has one kind of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_few_biases(value: object) -> object:
    """Before each of them is looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise _problem("too_many", f"at most {MAX_BIASES} entries")
    return value


def _tag_of_content(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _tag_of_prompt(value: object) -> str | None:
    if not isinstance(value, list) or not value:
        return _tag_of_content(value)
    return "<texts>" if isinstance(value[0], str) else "<lists>" if isinstance(value[0], list) else "<list>"


def _by_shape(choose: Callable[[object], str | None]) -> Discriminator:
    """Alternatives that are told apart by what kind of value they are. Tags are in brackets, as no field's name is."""
    return Discriminator(choose, "wrong_shape", "text or a list")


def _by_tag(field: str, *tags: str) -> Discriminator:
    """Objects that are told apart by the value of one field."""

    def choose(value: object) -> str | None:
        tag = value.get(field) if isinstance(value, dict) else None
        return f"<{tag}>" if isinstance(tag, str) and tag in tags else None

    return Discriminator(choose, f"wrong_{field}", " or ".join(map(repr, tags)))


WHOLE = BeforeValidator(as_integer)
Text = Annotated[str, AfterValidator(_require_unicode)]
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
Content = Annotated[Annotated[Text, Tag("<text>")] | Annotated[TextParts, Tag("<list>")], _by_shape(_tag_of_content)]


class CalledFunction(RequestModel):
    """A function that the model called, with its arguments."""

    name: Name
    arguments: Annotated[Text, Field(description="A JSON object as text.")]


class ToolCall(RequestModel):
    """A call that the model made in an earlier turn."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(RequestModel):
    """What holds for the whole conversation."""

    role: Literal["system"]
    content: Content
    name: Name | None = None


class DeveloperMessage(RequestModel):
    """OpenAI's newer word for a system message."""

    role: Literal["developer"]
    content: Content
    name: Name | None = None


class UserMessage(RequestModel):
    """A turn of the user."""

    role: Literal["user"]
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


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[DeveloperMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    _by_tag("role", "system", "developer", "user", "assistant", "tool"),
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
    _by_tag("type", "text", "json_object", "json_schema"),
]
StopTexts = Annotated[list[Name], Field(max_length=16, fail_fast=True)]
Stop = Annotated[Annotated[Name, Tag("<text>")] | Annotated[StopTexts, Tag("<list>")], _by_shape(_tag_of_content)]
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
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = Field(
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
        _by_shape(_tag_of_prompt),
    ] = Field(description="Text, token ids, or a list of either. No chat template is applied.")
    max_tokens: Annotated[int, Field(ge=0, le=INT32), WHOLE] | None = Field(
        None, description="Default 16; 0 only with echo."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    echo: bool | None = Field(None, description="Put the prompt, and its logprobs if asked for, in front of the reply.")


_building = threading.Lock()


def build_models() -> None:
    """Builds the validators, once, at the first request; two threads must not do it at the same time."""
    with _building:
        for model in (ChatCompletionRequest, CompletionRequest):
            model.model_rebuild()
