"""Requests to ``/v1/responses``: items become the messages that chat templates know, and all else is an order of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgepatch.decoding.constraints import Constraint
from edgepatch.server.conversations import ToolChoice, chat_order
from edgepatch.server.requests import Order, constraint_of, refuse
from edgepatch.server.schemas.limits import INT32
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions

if TYPE_CHECKING:
    from edgepatch.server.schemas.requests import RefusalPart
    from edgepatch.server.schemas.response_requests import Item, MessagePart, ResponseRequest

REPEATED = ("instructions", "max_output_tokens", "max_tool_calls", "metadata", "user", "top_logprobs")
"""Fields that a reply repeats as they are."""


def parse_response(values: dict[str, Any]) -> Order:
    """A request to ``/v1/responses``.

    Raises:
        Refusal: a field is unknown or cannot be used, named with what was expected.
    """
    from edgepatch.server.schemas import response_requests, validation

    request = validation.checked(response_requests.ResponseRequest, values)
    includes_logprobs = response_requests.INCLUDED_LOGPROBS in (request.include or ())
    effort = request.reasoning.effort if request.reasoning else None
    return chat_order(
        request,
        _with_instructions(request.instructions, _messages(request.input)),
        # A template writes a tool's fields in the client's own order.
        [_tool(tool) for tool in values.get("tools") or ()],
        _choice(request.tool_choice),
        max_new_tokens=INT32 if request.max_output_tokens is None else request.max_output_tokens,
        num_logprobs=request.top_logprobs or (0 if includes_logprobs else None),
        constraint=_constraint(request),
        options=ChatOptions({"reasoning_effort": effort}) if effort else PLAIN_CHAT,
        is_parallel=request.parallel_tool_calls is not False,
        prompt_field="input",
        repeated=_repeated(request, values),
    )


def _messages(items: str | Sequence[Item]) -> list[dict[str, Any]]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for item in items:
        message = _message(item)
        if messages and _continues(messages[-1], message):
            _join(messages[-1], message)
        elif len(message) > 1:
            messages.append(message)
    if not messages:
        raise refuse("input", "expected a message, a call or a result, found nothing but thoughts without a text")
    return [{"content": "", **message} for message in messages]


def _continues(last: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether both are one turn of the model, which is up to three kinds of items in this order: thoughts, a text, calls."""
    is_turn = last["role"] == message["role"] == "assistant"
    return is_turn and ("tool_calls" in message or not {"content", "tool_calls"} & set(last))


def _join(last: dict[str, Any], message: dict[str, Any]) -> None:
    for name, value in message.items():
        if name != "role":
            last[name] = last[name] + value if name in last else value


def _message(item: Item) -> dict[str, Any]:
    """The message that an item is, or a part of it."""
    if item.type == "function_call_output":
        name = {"name": item.name} if item.name else {}
        return {"role": "tool", **name, "tool_call_id": item.call_id, "content": _content(item.output)}
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if item.type == "reasoning":
        thoughts = "".join(part.text for part in item.content or ())
        return {"role": "assistant", **({"reasoning_content": thoughts} if thoughts else {})}
    return {"role": "system" if item.role == "developer" else item.role, "content": _content(item.content)}


def _content(content: str | Sequence[MessagePart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if part.type == "refusal" else part.text for part in content)


def _with_instructions(instructions: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """They are no message of their own where the conversation begins with one of the system: templates take one."""
    if not instructions:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    first = {"role": "system", "content": f"{instructions}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: v for n, v in tool.items() if n in names and v is not None}}


def _choice(choice: Any) -> ToolChoice:
    if choice is None or isinstance(choice, str):
        return ToolChoice(choice or "auto")
    if choice.type == "function":
        return ToolChoice("required", (choice.name,), "tool_choice.name")
    return ToolChoice(choice.mode, tuple(tool.name for tool in choice.tools), "tool_choice.tools")


def _constraint(request: ResponseRequest) -> Constraint | None:
    form = request.text.format if request.text else None
    if form is None or form.type == "text":
        return constraint_of(request, "", None)
    return constraint_of(request, "text.format", form.definition)


def _repeated(request: ResponseRequest, values: dict[str, Any]) -> dict[str, Any]:
    """What a reply says of its request."""
    text, effort = values.get("text") or {}, request.reasoning.effort if request.reasoning else None
    return {
        **{name: getattr(request, name) for name in REPEATED},
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "reasoning": {"effort": effort, "summary": None},
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": values.get("tool_choice") or "auto",
        "tools": [_described(tool) for tool in values.get("tools") or ()],
    }


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "parameters": None, "strict": None, **_tool(tool)["function"]}
