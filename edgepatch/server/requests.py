"""From a request's bytes to what shall be generated. Every check of a request that needs no model is made here."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgepatch.decoding.constraints import Constraint
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.server.model import ServedModel
from edgepatch.server.refusals import Refusal
from edgepatch.server.replies.formats import PLAIN_TEXT, ReplyFormat, with_format
from edgepatch.server.schemas.limits import INT32, MAX_PROMPTS
from edgepatch.text.limits import TooLongError
from edgepatch.text.messages import texts_in
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions, NoPlaceForToolsError

if TYPE_CHECKING:
    from edgepatch.server.schemas.requests import ChoicesRequest, SampledRequest

COMPLETION_TOKENS = 16
"""OpenAI's default for ``/v1/completions``."""

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
        prompt_field: the request's field that holds the prompts.
        repeated: fields of the request that its reply repeats.
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
    prompt_field: str = "prompt"
    repeated: Mapping[str, Any] = field(default_factory=dict)

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
        return Refusal(400, f"{message}; shorten it", self.prompt_field, "context_length_exceeded")


def refuse(field: str, message: str) -> Refusal:
    """The refusal of a field that cannot be used."""
    return Refusal(400, f"{field}: {message}", field, "invalid_value")


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
        raise refuse("max_tokens", "expected at least 1 without echo, found 0")
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = (prompt,) if is_one else tuple(prompt)
    return order_of(
        request,
        prompts,
        max_new_tokens=max_new_tokens,
        num_logprobs=request.logprobs,
        constraint=choices_constraint(request),
        num_choices=request.n or 1,
        echo=bool(request.echo),
    )


def order_of(
    request: SampledRequest,
    prompts: tuple[Any, ...],
    *,
    max_new_tokens: int,
    num_logprobs: int | None,
    constraint: Constraint | None,
    num_choices: int = 1,
    **more: Any,
) -> Order:
    """The order of a request.

    Args:
        request: settings of the draw and of the stream.
        prompts: texts, token ids or conversations.
        max_new_tokens: the most that it wants.
        num_logprobs: likeliest tokens to report.
        constraint: what the reply must look like.
        num_choices: continuations of each prompt.
        **more: further attributes of the order.

    Raises:
        Refusal: a setting cannot be used.
    """
    sampling = _sampling(request, max_new_tokens, num_logprobs, constraint) if max_new_tokens else None
    options = request.stream_options
    if options is not None and not request.stream:
        raise refuse("stream_options", "expected stream true beside it, found it false or missing")
    if num_choices * len(prompts) > MAX_PROMPTS:
        actual = f"{len(prompts)} prompts with n {num_choices}"
        raise refuse("prompt", f"expected at most {MAX_PROMPTS} choices in all, found {actual}")
    with_usage = options is not None and bool(options.include_usage)
    values = {"tools": None, **more, "is_streamed": bool(request.stream), "with_usage": with_usage}
    return Order(request.model, prompts, sampling, num_choices, num_logprobs=num_logprobs, **values)


def _sampling(
    request: SampledRequest, max_new_tokens: int, num_logprobs: int | None, constraint: Constraint | None
) -> Sampling:
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
            constraint=constraint,
            **{name: value for name, value in settings.items() if value is not None},
        )
    except InputError as error:
        raise Refusal(400, str(error), code="invalid_value") from error


def choices_constraint(request: ChoicesRequest) -> Constraint | None:
    """What the reply must look like, by ``response_format`` or ``grammar``; as ``constraint_of``."""
    reply = request.response_format
    if reply is None or reply.type == "text":
        return constraint_of(request, "", None)
    schema = reply.json_schema.definition if reply.type == "json_schema" else reply.definition
    return constraint_of(request, "response_format", schema)


def constraint_of(request: SampledRequest, json_field: str, schema: dict[str, Any] | None) -> Constraint | None:
    """What the reply must look like.

    Args:
        request: which may bring a grammar.
        json_field: the field that asks for JSON; empty where none does.
        schema: of that JSON; ``None`` for any object.

    Raises:
        Refusal: there are two constraints, or one of them cannot be used.
    """
    if json_field and request.grammar is not None:
        raise refuse("grammar", f"expected it alone, found it beside {json_field}")
    try:
        if request.grammar is not None:
            return Constraint("grammar", request.grammar)
        if not json_field:
            return None
        if schema is None:
            return Constraint("json_object")
        return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
    except InputError as error:
        raise Refusal(400, str(error), code="invalid_value") from error


def choices(order: Order, tokens: Sequence[list[int]]) -> list[tuple[list[int], Sampling | None]]:
    """Prompt and sampling of each choice in order of its index; the choices of one prompt differ in their random seed."""
    return [(ids, _of_choice(order.sampling, i)) for ids in tokens for i in range(order.num_choices)]


def _of_choice(sampling: Sampling | None, index: int) -> Sampling | None:
    if sampling is None or sampling.rng_seed is None:
        return sampling
    return replace(sampling, rng_seed=sampling.rng_seed + index)
