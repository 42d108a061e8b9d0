"""Requests to ``/v1/chat/completions``, and what all requests with a conversation have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepatch.server.requests import Order, choices_constraint, order_of, refuse
from edgepatch.server.schemas.limits import EMPTY_VALUES, INT32
from edgepatch.text.templates import ChatOptions

if TYPE_CHECKING:
    from edgepatch.server.schemas.requests import ChatCompletionRequest, SampledRequest


@dataclass(frozen=True)
class ToolChoice:
    """What a request says of calls.

    Attributes:
        word: "auto", "none" or "required".
        names: the functions that it is about; ``None`` for all.
        field: where they are named.
    """

    word: str = "auto"
    names: tuple[str, ...] | None = None
    field: str = "tool_choice"

    def among(self, offered: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
        """The functions that the model sees, and those of which it must call one.

        Raises:
            Refusal: there are none, or one is not offered.
        """
        names = offered if self.names is None else self.names
        if self.word == "none":
            return (), ()
        if not offered and (self.word == "required" or self.names):
            raise refuse("tool_choice", "expected tools beside it, found none")
        unknown = next((name for name in names if name not in offered), None)
        if unknown is not None:
            raise refuse(self.field, f"expected one of {', '.join(offered)}, found {unknown!r}")
        return (offered, tuple(names)) if self.word == "required" else (names, ())


def parse_chat(values: dict[str, Any]) -> Order:
    """A request to ``/v1/chat/completions``.

    Raises:
        Refusal: a field is unknown or cannot be used, named with what was expected.
    """
    from edgepatch.server.schemas import requests, validation

    request = validation.checked(requests.ChatCompletionRequest, values)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise refuse("max_completion_tokens", "expected the same value as max_tokens, or one of them alone")
    if request.top_logprobs and not request.logprobs:
        raise refuse("top_logprobs", "expected logprobs true beside it, found it false or missing")
    return chat_order(
        request,
        # Templates write conversations and tools in the order of the client's own fields.
        [_message(message) for message in values["messages"]],
        [_tool(tool) for tool in values.get("tools") or ()],
        _choice(request.tool_choice),
        max_new_tokens=limits.pop() if limits else INT32,
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        constraint=choices_constraint(request),
        num_choices=request.n or 1,
        options=_chat_options(request),
        is_parallel=request.parallel_tool_calls is not False,
    )


def chat_order(
    request: SampledRequest,
    messages: list[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    choice: ToolChoice,
    is_parallel: bool,
    **more: Any,
) -> Order:
    """The order of a conversation.

    Args:
        request: what it asks for beside that.
        messages: as chat templates know them.
        tools: OpenAI's tool objects.
        choice: what it says of calls.
        is_parallel: a reply may have several.
        **more: further arguments of ``_order``.
    """
    seen, forced = choice.among([tool["function"]["name"] for tool in tools])
    return order_of(
        request,
        (messages,),
        tools=[tool for tool in tools if tool["function"]["name"] in seen] or None,
        forced=forced,
        most_calls=None if is_parallel else 1,
        **{"prompt_field": "messages", **more},
    )


def _choice(choice: Any) -> ToolChoice:
    if choice is None or isinstance(choice, str):
        return ToolChoice(choice or "auto")
    if choice.type == "function":
        return ToolChoice("required", (choice.function.name,), "tool_choice.function.name")
    allowed = choice.allowed_tools
    names = tuple(tool.function.name for tool in allowed.tools)
    return ToolChoice(allowed.mode, names, "tool_choice.allowed_tools.tools")


def _chat_options(request: ChatCompletionRequest) -> ChatOptions:
    values = request.chat_template_kwargs.model_dump(exclude_none=True) if request.chat_template_kwargs else {}
    for name in ("enable_thinking", "reasoning_effort"):
        value = getattr(request, name)
        if value is not None and values.setdefault(name, value) != value:
            raise refuse(name, f"expected {values[name]!r} as in chat_template_kwargs, found {value!r}")
    continues = bool(request.continue_final_message)
    if request.add_generation_prompt is not None and request.add_generation_prompt == continues:
        expected = (
            "false beside continue_final_message" if continues else "true, or continue_final_message beside false"
        )
        raise refuse("add_generation_prompt", f"expected {expected}, found {request.add_generation_prompt}".lower())
    return ChatOptions(values, continues)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's newer word for the system role is put as chat templates know it; fields without a value are left out."""
    fields = {name: value for name, value in message.items() if name == "content" or value not in EMPTY_VALUES}
    return {**fields, "role": "system"} if fields["role"] == "developer" else fields


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: v for name, v in tool["function"].items() if v is not None}}
