"""The chat template of a model as conversations meet it: which of several, what it wants of messages, and what it must have shown.

A template may drop what it has no place for. Nothing is lost without a word here: tools, calls and results that do not appear in the
rendered text are errors.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from edgepatch.errors import InputError
from edgepatch.text.call_forms import GENERAL, PYTHONIC, CallForm
from edgepatch.text.chat_templates import examine, render

VALUE_NAMES: Mapping[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "clear_thinking": bool,
    "reasoning_effort": str,
    "thinking_budget": int,
}
"""Variables that a request may give to a template -> their types. None of them holds text of its own."""

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
EMPTY_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is written.

    Attributes:
        values: variables of the template, of ``VALUE_NAMES``.
        continues_last: the last message, the assistant's, is not closed: the reply continues it.

    Raises:
        InputError: a value is unknown or of another type.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    continues_last: bool = False

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            kind = VALUE_NAMES.get(name)
            if kind is None:
                raise InputError(f"template value {name!r:.60}: expected one of {', '.join(VALUE_NAMES)}")
            fits = type(value) is kind and (kind is not str or value in EFFORTS)
            if not fits:
                expected = f"one of {', '.join(EFFORTS)}" if kind is str else kind.__name__
                raise InputError(f"template value {name}: expected {expected}, found {value!r:.60}")


PLAIN_CHAT = ChatOptions()


@dataclass(frozen=True)
class Traits:
    """What a template wants and writes.

    Attributes:
        takes_system: messages of the system; else they go in front of the user's text.
        tools_name: the variable in which it takes tools; "" where it has no place for them.
        fills_tools: it fails on a tool without description and parameters.
        call_style: how it wants calls: short ids, arguments as text, null content; ``None`` where it has no place for them.
        call_forms: how it writes them.
        thought: the markers around thoughts, or ``None``.
    """

    takes_system: bool
    tools_name: str
    fills_tools: bool
    call_style: Mapping[str, bool] | None
    call_forms: tuple[CallForm, ...]
    thought: tuple[str, str] | None


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template, or its several by name.

    Attributes:
        default: the source of the one in general use; "" where there is none.
        tool_use: of the one for conversations with tools; "" where that is the default.
        bos: the text of BOS.
        eos: the text of EOS.
        ends: the texts of all tokens that end a reply.
        is_replaced: somebody gave another one than the model's own.
    """

    default: str
    tool_use: str = ""
    bos: str = ""
    eos: str = ""
    ends: tuple[str, ...] = ()
    is_replaced: bool = False

    def replaced(self, source: str) -> ChatTemplate:
        """Another template in place of the model's own; its use is named in every reply's fingerprint.

        Raises:
            InputError: it is empty.
        """
        if not source.strip():
            raise InputError("chat template: expected a Jinja template, found an empty text", hint="check the file")
        return replace(self, default=source, tool_use="", is_replaced=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the default template, or "" where there is none."""
        return _digest(self.default)

    @property
    def tools_digest(self) -> str:
        """SHA-256 of the template that is for conversations with tools alone, or "" where there is none."""
        return _digest(self.tool_use)

    @cached_property
    def for_tools(self) -> str:
        """The source that conversations with tools are written with."""
        return self.tool_use or self.default

    def traits(self, with_tools: bool) -> Traits:
        """What the template wants, found once by rendering probes.

        Raises:
            InputError: it is broken, or needs more than it may have.
        """
        source = self.for_tools if with_tools else self.default
        return self._traits_of(source)

    def _traits_of(self, source: str) -> Traits:
        values = examine(source, self.bos, self.eos, self.ends)
        forms = tuple(CallForm.of(form) for form in values["call_forms"])
        thought = tuple(values["thought"]) if values["thought"] else None
        return Traits(**{**values, "call_forms": forms, "thought": thought})

    @property
    def call_forms(self) -> tuple[CallForm, ...]:
        """How the model may write calls: as its template does first, then as many models do."""
        forms = self.traits(True).call_forms if self.default else ()
        return tuple(dict.fromkeys((*forms, PYTHONIC, *GENERAL)))

    def opens_thought(self, options: ChatOptions, with_tools: bool) -> bool:
        """Whether the opening of the assistant's turn has opened a thought, too."""
        thought = self.traits(with_tools).thought if self.default else None
        if thought is None or options.continues_last:
            return False
        source = self.for_tools if with_tools else self.default
        text = render(source, [{"role": "user", "content": "?"}], self.bos, self.eos, None, options.values)
        opened = text.rfind(thought[0].strip())
        return opened >= 0 and thought[1] not in text[opened:] and not text[opened + len(thought[0].strip()) :].strip()

    def write(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, options: ChatOptions
    ) -> str:
        """The text of a conversation, up to where the reply begins.

        Args:
            messages: plain ones.
            tools: plain ones, or ``None``.
            options: how it is written.

        Raises:
            InputError: there is no template, it refuses the messages, or it would lose tools, calls or results.
        """
        if not self.default:
            raise InputError(
                "the model has no chat template",
                hint="give one with --chat-template, or pass plain text or token ids instead of messages",
            )
        has_calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        with_tools = bool(tools) or has_calls
        is_plain = not with_tools and all(message["role"] != "system" for message in messages)
        source = self.for_tools if with_tools else self.default
        traits = None if is_plain else self._traits_of(source)
        messages, tools = list(messages), list(tools) if tools else None
        if traits is not None:
            messages, tools = _adapted(messages, tools, traits)
        text = self._render(source, messages, tools, traits, options)
        if has_calls:
            self._require_shown(source, messages, tools, traits, options)
        return text

    def _render(
        self, source: str, messages: list[dict[str, Any]], tools: Any, traits: Traits | None, options: ChatOptions
    ) -> str:
        values = dict(options.values)
        if tools and traits is not None and traits.tools_name != "tools":
            values, tools = {**values, traits.tools_name: [tool["function"] for tool in tools]}, None
        if not options.continues_last:
            return render(source, messages, self.bos, self.eos, tools, values)
        if not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            raise InputError("continue_final_message: expected a last message of the assistant with text alone")
        end = secrets.token_hex(16)
        last = {**messages[-1], "content": (messages[-1]["content"] or "") + end}
        text, mark, _ = render(
            source, [*messages[:-1], last], self.bos, self.eos, tools, values, opens_turn=False
        ).rpartition(end)
        if not mark:
            raise InputError("the model's chat template does not write the last message, so it cannot be continued")
        return text

    def _require_shown(
        self, source: str, messages: Any, tools: Any, traits: Traits | None, options: ChatOptions
    ) -> None:
        """Writes the conversation once more, with a mark on each call and each result, to see that none is lost."""
        marks: dict[str, str] = {}

        def marked(text: str, what: str) -> str:
            mark = secrets.token_hex(8)
            marks[mark] = what
            return text + mark

        probes = []
        for number, message in enumerate(messages):
            probe = dict(message)
            if message["role"] == "tool":
                probe["content"] = marked(message["content"], f"message {number}, the result of a tool")
            if message.get("tool_calls"):
                probe["tool_calls"] = [
                    {
                        **call,
                        "function": {
                            **call["function"],
                            "name": marked(
                                call["function"]["name"],
                                f"message {number}: the call of {call['function']['name']!r:.80}",
                            ),
                        },
                    }
                    for call in message["tool_calls"]
                ]
            probes.append(probe)
        text = self._render(source, probes, tools, traits, options)
        lost = next((what for mark, what in marks.items() if mark not in text), None)
        if lost is not None:
            raise InputError(
                f"{lost}, does not appear in what the model's chat template writes",
                hint="leave it out, or use a model whose template has a place for it",
            )


def _adapted(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, traits: Traits
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as a template wants them.

    Raises:
        InputError: it has no place for tools.
    """
    if tools and not traits.tools_name:
        raise NoPlaceForToolsError(
            "tools: the model's chat template has no place for tools, so it would not see them",
            hint="leave them out, or use a model that was trained to call tools",
        )
    if tools and traits.fills_tools:
        tools = [_filled(tool) for tool in tools]
    if not traits.takes_system:
        messages = _without_system(messages)
    return [_as_wanted(message, traits.call_style) for message in messages], tools


class NoPlaceForToolsError(InputError):
    """Tools were offered to a model whose template does not show them."""


def _filled(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields that OpenAI's interface lets clients leave out."""
    function = {"description": "", "parameters": EMPTY_PARAMETERS, **tool["function"]}
    parameters = function["parameters"]
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if isinstance(properties, dict):
        described = {
            name: {"description": "", **value} if isinstance(value, dict) else value
            for name, value in properties.items()
        }
        function["parameters"] = {**parameters, "properties": described}
    return {**tool, "function": function}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the system says is put in front of the next text of the user, as llama.cpp does."""
    kept: list[dict[str, Any]] = []
    said: list[str] = []
    for message in messages:
        if message["role"] == "system":
            said.append(message["content"])
        elif message["role"] == "user" and said:
            kept.append({**message, "content": "\n\n".join([*said, message["content"]])})
            said = []
        else:
            kept.append(message)
    return [*kept, {"role": "user", "content": "\n\n".join(said)}] if said else kept


def _as_wanted(message: dict[str, Any], style: Mapping[str, bool] | None) -> dict[str, Any]:
    if style is None:
        return message
    if style["has_short_ids"] and "tool_call_id" in message:
        message = {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    if not message.get("tool_calls"):
        return message
    content = None if style["content_is_null"] and not message["content"] else message["content"]
    return {
        **message,
        "content": content,
        "tool_calls": [_call_as_wanted(call, style) for call in message["tool_calls"]],
    }


def _call_as_wanted(call: dict[str, Any], style: Mapping[str, bool]) -> dict[str, Any]:
    function = call["function"]
    if style["arguments_as_text"]:
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    identifier = {"id": _short_id(call["id"])} if style["has_short_ids"] and "id" in call else {}
    return {**call, **identifier, "function": function}


def _short_id(identifier: str) -> str:
    """Nine letters and digits, the same for the same id."""
    if len(identifier) == 9 and identifier.isascii() and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() if source else ""
