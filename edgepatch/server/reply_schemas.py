"""What replies hold, for the OpenAPI document and the type checker; at run time they are plain dictionaries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict  # pydantic reads `typing`'s own only from Python 3.12 on

CLOSED = ConfigDict(extra="forbid")

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls"] | None
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{12}[+]([0-9a-f]{12}|bare)$")]


@with_config(CLOSED)
class PromptTokensDetails(TypedDict):
    """Of the tokens of the prompts, those that were not evaluated again."""

    cached_tokens: Count


@with_config(CLOSED)
class Usage(TypedDict):
    """Tokens that were read and generated."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


@with_config(CLOSED)
class TopLogprob(TypedDict):
    """A token that the model could have drawn."""

    token: str
    logprob: float
    bytes: list[Count]


@with_config(CLOSED)
class ChatTokenLogprob(TopLogprob):
    """A token that the model drew."""

    top_logprobs: list[TopLogprob]


@with_config(CLOSED)
class ChatLogprobs(TypedDict):
    """Log-probabilities of the reply's tokens."""

    content: list[ChatTokenLogprob]


@with_config(CLOSED)
class CompletionLogprobs(TypedDict):
    """Log-probabilities of the tokens of reply and prompt, a list for each property of theirs."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


@with_config(CLOSED)
class ReplyFunction(TypedDict):
    """A function with its arguments."""

    name: str
    arguments: Annotated[str, Field(description="A JSON object as text.")]


@with_config(CLOSED)
class ReplyToolCall(TypedDict):
    """A call of a tool; chunks number them."""

    id: str
    type: Literal["function"]
    function: ReplyFunction
    index: NotRequired[Count]


@with_config(CLOSED)
class ReplyMessage(TypedDict):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ReplyToolCall]]


@with_config(CLOSED)
class Delta(TypedDict, total=False):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ReplyToolCall]


@with_config(CLOSED)
class ChatChoice(TypedDict):
    """One of the model's turns."""

    index: Count
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: NotRequired[FinishReason]


@with_config(CLOSED)
class ChatChunkChoice(TypedDict):
    """What a chunk adds to one of the model's turns."""

    index: Count
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: NotRequired[FinishReason]


@with_config(CLOSED)
class CompletionChoice(TypedDict):
    """One continuation, or what a chunk adds to it."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: NotRequired[FinishReason]


class Envelope(TypedDict):
    """What all replies begin with."""

    id: str
    created: Count
    model: str
    system_fingerprint: Fingerprint


@with_config(CLOSED)
class ChatCompletion(Envelope):
    """A reply of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


@with_config(CLOSED)
class ChatCompletionChunk(Envelope):
    """An event of a streamed reply of ``/v1/chat/completions``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


@with_config(CLOSED)
class Completion(Envelope):
    """A reply of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


@with_config(CLOSED)
class CompletionChunk(Envelope):
    """An event of a streamed reply of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


@with_config(CLOSED)
class ErrorDetails(TypedDict):
    """Why a request is not served."""

    message: str
    type: str
    param: Annotated[str | None, Field(description='The field, as a path ("messages.0.role").')]
    code: str | None


@with_config(CLOSED)
class Error(TypedDict):
    """The reply to a request that is not served."""

    error: ErrorDetails


@with_config(CLOSED)
class Model(TypedDict):
    """The served model."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str


@with_config(CLOSED)
class Models(TypedDict):
    """The list of the one served model."""

    object: Literal["list"]
    data: list[Model]


@with_config(CLOSED)
class Patch(TypedDict):
    """A patch, and how its seed came into the cache."""

    object: Literal["patch"]
    name: str
    version: str
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    num_virtual_tokens: Count
    active: bool
    seed_route: str


@with_config(CLOSED)
class Patches(TypedDict):
    """The active patch, or none."""

    object: Literal["list"]
    data: list[Patch]
    system_fingerprint: str


@with_config(CLOSED)
class Health(TypedDict):
    """Whether the server can answer."""

    status: Literal["loading", "ok", "stopping", "failed"]
    notes: NotRequired[list[str]]
