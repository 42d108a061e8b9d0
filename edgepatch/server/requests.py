"""From a request's bytes to what shall be generated. Every check of a request that needs no model is made here."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgepatch.decoding.constraints import Constraint
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.files.strict_json import finite
from edgepatch.server.model import ServedModel
from edgepatch.server.refusals import Refusal
from edgepatch.server.reply_formats import PLAIN_TEXT, ReplyFormat, with_format
from edgepatch.server.schemas.limits import EMPTY_VALUES, INT32, MAX_PROMPTS
from edgepatch.text.limits import TooLongError
from edgepatch.text.messages import texts_in
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions, NoPlaceForToolsError

if TYPE_CHECKING:
    from edgepatch.server.schemas.requests import ChatCompletionRequest, SampledRequest

COMPLETION_TOKENS = 16
"""OpenAI's default for ``/v1/completions``."""

MAX_DEPTH = 64
"""Of a body: far below what makes the programs behind us run out of stack."""

MAX_DIGITS = 20
"""Of a whole number: the largest that any field takes has 19."""

SURROGATES = re.compile("[\ud800-\udfff]")

CHAT_SLACK = 4
"""So many times as long as what fits may a conversation be before its template has written it."""

MAX_BATCH_CHARACTERS = 4 * 2**20
"""Of the texts of all prompts in a request."""

SAME_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that ``Sampling`` has under the same name."""


@dataclass(frozen=True)
class Order:
    """What a request asks for.

    Attributes:
        model: the name that the client used.
        prompts: texts, token ids or conversations, one a prompt.
        sampling: ``max_new_tokens`` is cut to what the context holds; ``None`` generates nothing.
        num_choices: continuations of each prompt.
        tools: OpenAI's tool objects, or ``None``.
        options: how a conversation is written.
        forced: names of the functions of which exactly one must be called; empty where none must.
        most_calls: that a reply may have; ``None`` for any number.
        format: what a reply may hold beside text, once the model's template has been asked.
        spelled: texts of special tokens that mark parts of the reply, by id.
        is_streamed: answer in server-sent events.
        with_usage: end the stream with a chunk of token counts.
        num_logprobs: likeliest tokens to report, ``None`` for no logprobs.
        echo: put the prompt in front of the reply.
    """

    model: str
    prompts: tuple[Any, ...]
    sampling: Sampling | None
    num_choices: int
    tools: list[dict[str, Any]] | None
    is_streamed: bool
    with_usage: bool
    num_logprobs: int | None
    echo: bool = False
    options: ChatOptions = PLAIN_CHAT
    forced: tuple[str, ...] = ()
    most_calls: int | None = None
    format: ReplyFormat = PLAIN_TEXT
    spelled: Mapping[int, str] = field(default_factory=dict)

    @property
    def needs_vocabulary(self) -> bool:
        """Whether the reply names tokens one by one."""
        return self.num_logprobs is not None or (self.echo and not isinstance(self.prompts[0], str))

    @property
    def is_chat(self) -> bool:
        """Whether the one prompt is a conversation."""
        return isinstance(self.prompts[0], list) and isinstance(self.prompts[0][0], dict)

    @cached_property
    def _texts(self) -> list[str]:
        """All text of each prompt."""
        return ["".join(texts_in([prompt, self.tools])) for prompt in self.prompts]

    @cached_property
    def num_characters(self) -> int:
        """Of all texts."""
        return sum(map(len, self._texts))

    def require_fit(self, model: ServedModel) -> None:
        """Refuses what cannot fit by its size alone, before anything works on it.

        Raises:
            Refusal: a prompt is longer than the context whatever its tokens are, or all together are too long.
            InputError: a text holds halves of characters.
        """
        # A template may leave parts of a conversation out, such as thoughts of earlier turns.
        slack = CHAT_SLACK if self.is_chat else 1
        try:
            for text in self._texts:
                model.text_bound.require_fit(text, model.context_length, slack)
        except TooLongError as error:
            raise self._too_long(str(error)) from None
        if len(self._texts) > 1 and self.num_characters > MAX_BATCH_CHARACTERS:
            raise self._too_long(
                f"expected at most {MAX_BATCH_CHARACTERS} characters in all prompts, found {self.num_characters}"
            )

    def read(self, model: ServedModel, end: float) -> tuple[Order, list[list[int]]]:
        """The order with all that the model's template says of its reply, and the token ids of each prompt; as ``tokenize``."""
        tokens = self.tokenize(model, end)
        return (with_format(self, model) if self.is_chat else self), tokens

    def tokenize(self, model: ServedModel, end: float) -> list[list[int]]:
        """Token ids of each prompt.

        Args:
            model: what is served.
            end: when nobody waits for the answer any more, by ``time.monotonic``.

        Raises:
            Refusal: a prompt is longer than the context, or the time is over.
            InputError: a prompt is empty, or the model cannot read it.
        """
        tokens = []
        for prompt in self.prompts:
            if time.monotonic() > end:
                raise Refusal(504, "the prompts could not be read in time", code="request_timeout")
            try:
                ids = model.tokens(prompt, self.tools, self.options)
            except TooLongError as error:
                raise self._too_long(str(error)) from None
            except NoPlaceForToolsError as error:
                raise Refusal(400, f"{error}; {error.hint}", "tools", "tools_not_supported") from None
            if len(ids) > model.context_length:
                raise self._too_long(f"expected a prompt of at most {model.context_length} tokens, found {len(ids)}")
            tokens.append(ids)
        return tokens

    def _too_long(self, message: str) -> Refusal:
        return Refusal(
            400, f"{message}; shorten it", "messages" if self.is_chat else "prompt", "context_length_exceeded"
        )


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a request's body holds.

    Raises:
        Refusal: the body is no JSON object, or one that no two programs read alike.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=finite,
            object_pairs_hook=_with_plain_names,
        )
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if _is_deep(value, MAX_DEPTH):
        raise Refusal(
            400, f"the body: expected at most {MAX_DEPTH} levels, found more deeply nested ones", code="invalid_json"
        )
    if not isinstance(value, dict):
        raise Refusal(400, f"the body: expected a JSON object, found {type(value).__name__}", code="invalid_json")
    return value


def _is_deep(value: object, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_is_deep(entry, left - 1) for entry in inner if isinstance(entry, (dict, list)))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"expected whole numbers of at most {MAX_DIGITS} digits, found {len(text)}")
    return int(text)


def _with_plain_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field appears twice")
    if any(SURROGATES.search(name) for name in values):
        raise ValueError("the name of a field holds half a surrogate pair")
    return values


def _refuse(field: str, message: str) -> Refusal:
    return Refusal(400, f"{field}: {message}", field, "invalid_value")


def parse_chat(values: dict[str, Any]) -> Order:
    """A request to ``/v1/chat/completions``.

    Raises:
        Refusal: a field is unknown or cannot be used, named with what was expected.
    """
    from edgepatch.server.schemas import requests, validation

    request = validation.checked(requests.ChatCompletionRequest, values)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise _refuse("max_completion_tokens", "expected the same value as max_tokens, or one of them alone")
    if request.top_logprobs is not None and not request.logprobs:
        raise _refuse("top_logprobs", "expected logprobs true beside it, found it false or missing")
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    # Templates write conversations and tools in the order of the client's own fields.
    messages = [_message(message) for message in values["messages"]]
    tools = [_tool(tool) for tool in values.get("tools") or ()]
    names = [tool["function"]["name"] for tool in tools]
    chosen, forced = _choice(request.tool_choice, names)
    return _order(
        request,
        (messages,),
        limits.pop() if limits else INT32,
        num_logprobs,
        tools=[tool for tool in tools if tool["function"]["name"] in chosen] or None,
        options=_chat_options(request),
        forced=forced,
        most_calls=1 if request.parallel_tool_calls is False else None,
    )


def _choice(choice: Any, names: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """The tools that the model sees, and those of which it must call one."""
    if choice is None or choice in ("auto", "none"):
        return (() if choice == "none" else names), ()
    if not names:
        raise _refuse("tool_choice", "expected tools beside it, found none")
    if choice == "required":
        return names, tuple(names)
    name = choice.function.name
    if name not in names:
        raise _refuse("tool_choice.function.name", f"expected one of {', '.join(names)}, found {name!r}")
    return names, (name,)


def _chat_options(request: ChatCompletionRequest) -> ChatOptions:
    values = request.chat_template_kwargs.model_dump(exclude_none=True) if request.chat_template_kwargs else {}
    for name in ("enable_thinking", "reasoning_effort"):
        value = getattr(request, name)
        if value is not None and values.setdefault(name, value) != value:
            raise _refuse(name, f"expected {values[name]!r} as in chat_template_kwargs, found {value!r}")
    continues = bool(request.continue_final_message)
    if request.add_generation_prompt is not None and request.add_generation_prompt == continues:
        expected = (
            "false beside continue_final_message" if continues else "true, or continue_final_message beside false"
        )
        raise _refuse("add_generation_prompt", f"expected {expected}, found {request.add_generation_prompt}".lower())
    return ChatOptions(values, continues)


def parse_completion(values: dict[str, Any]) -> Order:
    """A request to ``/v1/completions``.

    Raises:
        Refusal: a field is unknown or cannot be used, named with what was expected.
    """
    from edgepatch.server.schemas import requests, validation

    request = validation.checked(requests.CompletionRequest, values)
    prompt, max_new_tokens = request.prompt, request.max_tokens
    if max_new_tokens is None:
        max_new_tokens = COMPLETION_TOKENS
    max_new_tokens = INT32 if max_new_tokens < 0 else max_new_tokens
    if not max_new_tokens and not request.echo:
        raise _refuse("max_tokens", "expected at least 1 without echo, found 0")
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = (prompt,) if is_one else tuple(prompt)
    return _order(request, prompts, max_new_tokens, request.logprobs, echo=bool(request.echo))


def _order(
    request: SampledRequest, prompts: tuple[Any, ...], max_new_tokens: int, num_logprobs: int | None, **more: Any
) -> Order:
    sampling = _sampling(request, max_new_tokens, num_logprobs) if max_new_tokens else None
    num_choices, options = request.n or 1, request.stream_options
    if options is not None and not request.stream:
        raise _refuse("stream_options", "expected stream true beside it, found it false or missing")
    if num_choices * len(prompts) > MAX_PROMPTS:
        actual = f"{len(prompts)} prompts with n {num_choices}"
        raise _refuse("prompt", f"expected at most {MAX_PROMPTS} choices in all, found {actual}")
    with_usage = options is not None and bool(options.include_usage)
    values = {"tools": None, **more, "is_streamed": bool(request.stream), "with_usage": with_usage}
    return Order(request.model, prompts, sampling, num_choices, num_logprobs=num_logprobs, **values)


def _sampling(request: SampledRequest, max_new_tokens: int, num_logprobs: int | None) -> Sampling:
    # A draw that is not asked to be repeatable gets a seed too: it tells the choices of one request apart.
    rng_seed = secrets.randbits(64) if request.seed is None or request.seed < 0 else request.seed
    stop = request.stop or ()
    settings = {name: getattr(request, name) for name in SAME_NAMES}
    if settings["top_p"] == 0:  # nothing but the likeliest token
        settings |= {"temperature": 0.0, "top_p": 1.0}
    if settings["top_k"] == -1:
        settings["top_k"] = 0
    try:
        return Sampling(
            max_new_tokens=max_new_tokens,
            rng_seed=rng_seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            num_logprobs=num_logprobs,
            constraint=_constraint(request),
            **{name: value for name, value in settings.items() if value is not None},
        )
    except InputError as error:
        raise Refusal(400, str(error), code="invalid_value") from error


def _constraint(request: SampledRequest) -> Constraint | None:
    reply = request.response_format
    if reply is not None and reply.type != "text" and request.grammar is not None:
        raise _refuse("grammar", f"expected it alone, found it beside response_format {reply.type}")
    if request.grammar is not None:
        return Constraint("grammar", request.grammar)
    if reply is not None and reply.type == "json_schema":
        return Constraint("json_schema", json.dumps(reply.json_schema.definition, ensure_ascii=False))
    if reply is None or reply.type != "json_object":
        return None
    schema = reply.definition
    return (
        Constraint("json_object")
        if schema is None
        else Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's newer word for the system role is put as chat templates know it; fields without a value are left out."""
    fields = {name: value for name, value in message.items() if name == "content" or value not in EMPTY_VALUES}
    return {**fields, "role": "system"} if fields["role"] == "developer" else fields


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: v for name, v in tool["function"].items() if v is not None}}


def choices(order: Order, tokens: Sequence[list[int]]) -> list[tuple[list[int], Sampling | None]]:
    """Prompt and sampling of each choice in order of its index; the choices of one prompt differ in their random seed."""
    return [(ids, _of_choice(order.sampling, i)) for ids in tokens for i in range(order.num_choices)]


def _of_choice(sampling: Sampling | None, index: int) -> Sampling | None:
    if sampling is None or sampling.rng_seed is None:
        return sampling
    return replace(sampling, rng_seed=sampling.rng_seed + index)
