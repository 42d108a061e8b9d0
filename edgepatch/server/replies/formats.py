"""What the reply to a conversation may hold beside text, as the model's own template has it: thoughts and calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from edgepatch.decoding.constraints import Constraint
from edgepatch.server.replies.forced_calls import after_thought, force_call
from edgepatch.text.call_forms import CallForm
from edgepatch.text.templates import ChatOptions
from edgepatch.text.thoughts import CHANNELS

if TYPE_CHECKING:
    from edgepatch.server.model import ServedModel

CHANNEL_MARKERS = "<|start|><|channel|><|constrain|><|message|><|end|>"
JSON_KINDS = ("json_schema", "json_object")


@dataclass(frozen=True)
class ReplyFormat:
    """What a reply may hold.

    Attributes:
        thought: the markers around thoughts; ``None`` where the model has none.
        is_thinking: the prompt has opened a thought.
        tools: name -> JSON Schema of the arguments, of those that were offered.
        forms: how calls may be written.
        most_calls: how many are handed on; ``None`` for all.
    """

    thought: tuple[str, str] | None = None
    is_thinking: bool = False
    tools: Mapping[str, Any] = field(default_factory=dict)
    forms: tuple[CallForm, ...] = ()
    most_calls: int | None = None

    @property
    def markers(self) -> list[str]:
        """Texts that calls begin with."""
        return [form.marker for form in self.forms if form.marker]

    @property
    def bare_openings(self) -> list[str]:
        """What a reply begins with that is a call as a whole."""
        bare = [form.kind for form in self.forms if not form.marker]
        return (["{"] if "json" in bare else []) + (list(self.tools) if "name_json" in bare else [])


PLAIN_TEXT = ReplyFormat()


class Conversation(Protocol):
    """What is read of an order here."""

    @property
    def sampling(self) -> Any:
        """How to draw, or ``None``."""

    @property
    def tools(self) -> Any:
        """OpenAI's tool objects, or ``None``."""

    @property
    def options(self) -> ChatOptions:
        """How the conversation is written."""

    @property
    def forced(self) -> tuple[str, ...]:
        """Functions of which one must be called."""

    @property
    def most_calls(self) -> int | None:
        """Calls that a reply may have."""


Ordered = TypeVar("Ordered", bound=Conversation)


def with_format(order: Ordered, model: ServedModel) -> Ordered:
    """The order of a conversation with the format of its reply, and what its constraint becomes there.

    Raises:
        InputError: the model's template cannot be examined, or a tool's schema cannot be forced.
    """
    template = model.chat_template
    thought = template.traits(bool(order.tools)).thought
    is_thinking = template.opens_thought(order.options, bool(order.tools))
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in order.tools or ()}
    forms = template.call_forms if schemas else ()
    reply = ReplyFormat(thought, is_thinking, schemas, forms, 1 if order.forced else order.most_calls)
    texts = "\n".join(
        [*(thought or ()), *(form.texts for form in forms), CHANNEL_MARKERS if thought == CHANNELS else ""]
    )
    spelled = {i: name for name, i in model.special_tokens.items() if name in texts and i not in model.end_token_ids}
    formatted = replace(cast(Any, order), format=reply, spelled=spelled, sampling=_sampling(order, reply, model))
    return cast(Ordered, formatted)


def _sampling(order: Conversation, reply: ReplyFormat, model: ServedModel) -> Any:
    sampling = order.sampling
    if sampling is None:
        return None
    constraint, end = sampling.constraint, reply.thought[1] if reply.thought and reply.is_thinking else ""
    if order.forced:
        functions = {name: reply.tools[name] for name in order.forced}
        return replace(sampling, constraint=force_call(functions, reply.forms, model.special_tokens, end))
    if constraint is not None and constraint.kind in JSON_KINDS:
        return replace(sampling, constraint=_json_behind_thought(constraint, reply, model, end))
    return sampling


def _json_behind_thought(constraint: Constraint, reply: ReplyFormat, model: ServedModel, end: str) -> Constraint:
    lead = "<|channel|>final<|message|>" if reply.thought == CHANNELS else ""
    if not end and not lead:
        return constraint
    return after_thought(constraint.definition or '{"type": "object"}', model.special_tokens, end, lead)
