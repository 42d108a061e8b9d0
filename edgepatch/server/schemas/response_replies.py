"""What replies of ``/v1/responses`` hold, for the OpenAPI document and the type checker; as ``schemas.replies``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired

from edgepatch.server.schemas.replies import ChatTokenLogprob, Count, Fingerprint, Reply

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Reply):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[None], Field(max_length=0)]
    logprobs: list[ChatTokenLogprob]


class ReasoningText(Reply):
    """The text of a thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Reply):
    """What the model says."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Reply):
    """What the model thinks."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: Annotated[list[None], Field(max_length=0)]
    content: list[ReasoningText]


class OutputCall(Reply):
    """A function that the model calls."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: Annotated[str, Field(description="A JSON object as text.")]


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(Reply):
    """Of the tokens of the input, those that were not evaluated again, and the others."""

    cached_tokens: Count
    cache_write_tokens: Count


class OutputTokensDetails(Reply):
    """Of the tokens of the reply, those up to the end of its thoughts."""

    reasoning_tokens: Count


class ResponseUsage(Reply):
    """Tokens that were read and generated."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseError(Reply):
    """Why a reply came to no end."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(Reply):
    """Why a reply is cut."""

    reason: Literal["max_output_tokens"]


class RepeatedReasoning(Reply):
    """How the model was asked to think."""

    effort: str | None
    summary: None


class RepeatedText(Reply):
    """What the text was asked to be like."""

    format: dict[str, Any]


class DescribedTool(Reply):
    """A function that was offered."""

    type: Literal["function"]
    name: str
    description: NotRequired[str]
    parameters: dict[str, Any] | None
    strict: bool | None


class Response(Reply):
    """A reply of ``/v1/responses``; what its request said is repeated in it."""

    id: str
    object: Literal["response"]
    created_at: Count
    completed_at: Count | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    system_fingerprint: Fingerprint
    output: list[OutputItem]
    previous_response_id: None
    store: Literal[False]
    temperature: float | None
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: RepeatedReasoning
    text: RepeatedText
    tool_choice: str | dict[str, Any]
    tools: list[DescribedTool]
    top_logprobs: int | None
    user: str | None


class ResponseEvent(Reply):
    """An event of a streamed reply of ``/v1/responses``; which fields it has follows from its type."""

    type: str
    sequence_number: Count
    response: NotRequired[Response]
    output_index: NotRequired[Count]
    item: NotRequired[OutputItem]
    item_id: NotRequired[str]
    content_index: NotRequired[Count]
    part: NotRequired[OutputText | ReasoningText]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[ChatTokenLogprob]]
    name: NotRequired[str]
    arguments: NotRequired[str]
    code: NotRequired[str]
    message: NotRequired[str]
    param: NotRequired[str | None]
