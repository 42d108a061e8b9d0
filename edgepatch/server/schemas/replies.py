"""What replies hold, for the OpenAPI document and the type checker; at run time they are plain dictionaries."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict  # pydantic reads `typing`'s own only from Python 3.12 on

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls"] | None
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{12}[+]([0-9a-f]{12}|bare)(-pinned)?(-template-[0-9a-z]{4,12})?$")]


@with_config(ConfigDict(extra="forbid"))
class Reply(TypedDict):
    """What all have in common: they are closed."""


class PromptTokensDetails(Reply):
    """Of the tokens of the prompts, those that were not evaluated again."""

    cached_tokens: Count


class Usage(Reply):
    """Tokens that were read and generated."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Reply):
    """A token that the model could have drawn."""

    token: str
    logprob: float
    bytes: list[Count]


class ChatTokenLogprob(TopLogprob):
    """A token that the model drew."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities of the reply's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(Reply):
    """Log-probabilities of the tokens of reply and prompt, a list for each property of theirs."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class ReplyFunction(Reply):
    """A function with its arguments."""

    name: str
    arguments: Annotated[str, Field(description="A JSON object as text.")]


class ReplyToolCall(Reply):
    """A call of a tool; chunks number them."""

    id: str
    type: Literal["function"]
    function: ReplyFunction
    index: NotRequired[Count]


class ReplyMessage(Reply):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ReplyToolCall]]


class Delta(Reply, total=False):
    """What a chunk adds to the model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str
    tool_calls: list[ReplyToolCall]


class ChatChoice(Reply):
    """One of the model's turns."""

    index: Count
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: NotRequired[FinishReason]


class ChatChunkChoice(Reply):
    """What a chunk adds to one of the model's turns."""

    index: Count
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: NotRequired[FinishReason]


class CompletionChoice(Reply):
    """One continuation, or what a chunk adds to it."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: NotRequired[FinishReason]


class Envelope(Reply):
    """What all replies begin with."""

    id: str
    created: Count
    model: str
    system_fingerprint: Fingerprint


class ChatCompletion(Envelope):
    """A reply of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Envelope):
    """An event of a streamed reply of ``/v1/chat/completions``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class Completion(Envelope):
    """A reply of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Envelope):
    """An event of a streamed reply of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class ErrorDetails(Reply):
    """Why a request is not served."""

    message: str
    type: str
    param: Annotated[str | None, Field(description='The field, as a path ("messages.0.role").')]
    code: str | None


class Error(Reply):
    """The reply to a request that is not served."""

    error: ErrorDetails


class SamplingDefaults(Reply):
    """What fills the settings that a request leaves open: the model's own advice, else the project's."""

    temperature: float
    top_p: float
    top_k: Count
    min_p: float
    repetition_penalty: float


class Model(Reply):
    """The served model."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    sampling_defaults: SamplingDefaults


class Models(Reply):
    """The list of the one served model."""

    object: Literal["list"]
    data: list[Model]


class Patch(Reply):
    """A patch, how its seed came into the cache, and where in a text it stands."""

    object: Literal["patch"]
    name: str
    version: str
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    num_virtual_tokens: Count
    active: bool
    seed_route: str
    pinned: bool
    place: str
    chat_template: Annotated[str, Field(description="Digest of the template that it was made with.")]
    other_template: Annotated[str, Field(description="Digest of the model's own where it is another one, by word.")]
    tokenizer_probe: Annotated[bool, Field(description="Whether the model's tokenizer was asked.")]
    signatures: Annotated[list[str], Field(description="Ids of the keys that signed it; the store says who they are.")]
    canary: Annotated[int, Field(ge=0, description="Prompts that prove that it acts.")]


class Patches(Reply):
    """The active patches, which act side by side, or none; the fingerprint names what they are together."""

    object: Literal["list"]
    data: list[Patch]
    system_fingerprint: str


class Health(Reply):
    """Whether the server can answer."""

    status: Literal["loading", "ok", "stopping", "failed"]
    patches: NotRequired[list[str]]
    notes: NotRequired[list[str]]
