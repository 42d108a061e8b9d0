"""The endpoints that generate: they queue an order, gather its events, and reply at once or in a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from edgepatch.decoding.constraints import CompiledConstraint
from edgepatch.decoding.replies import Piece
from edgepatch.errors import EdgepatchError
from edgepatch.server import requests
from edgepatch.server.bodies import parse_json
from edgepatch.server.generations import Event, Finished, Generation, Scored
from edgepatch.server.model import ServedModel
from edgepatch.server.refusals import Refusal, refusal_of
from edgepatch.server.replies.choices import Choice, TokenLogprob, score
from edgepatch.server.replies.completions import CompletionWriter
from edgepatch.server.replies.writer import ReplyWriter
from edgepatch.server.requests import Order
from edgepatch.server.service import Service

T = TypeVar("T")
TOKENS = "edgepatch.tokens"
"""Key of a scope: how many tokens of each kind a request has cost so far."""

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies pass the pieces on as they come
]


class GenerationEndpoint:
    """An ASGI application for one path.

    Args:
        service: settings, scheduler, metrics.
        parse: reads the request.
        writer: writes the reply.
    """

    def __init__(
        self,
        service: Service,
        parse: Callable[[dict[str, Any]], Order],
        writer: Callable[[Order, ServedModel], ReplyWriter],
    ) -> None:
        self._service, self._parse, self._writer = service, parse, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        model = self._service.require_model()
        body = await read_body(Request(scope, receive), self._service)
        order = await asyncio.to_thread(lambda: self._parse(parse_json(body)))  # a large one takes a while
        if order.model != model.name:
            raise Refusal(
                404, f"model: expected {model.name!r}, found {order.model[:100]!r}", "model", "model_not_found"
            )
        tally = scope.setdefault(TOKENS, {})
        await _unless_gone(receive, self._serve(order, model, send, start, tally))

    async def _serve(self, order: Order, model: ServedModel, send: Send, start: float, tally: dict[str, int]) -> None:
        order, tokens = await self._read(order, model, start)
        compiled = await self._compile(order, start)
        run = OrderRun(self._service, order, model, tokens, start, compiled)
        try:
            await (self._stream if order.is_streamed else self._reply)(run, self._writer(order, model), send)
        finally:
            tally["prompt_tokens"] = sum(map(len, tokens))
            tally["completion_tokens"] = sum(choice.num_tokens for choice in run.choices)
            run.cancel()

    async def _read(self, order: Order, model: ServedModel, start: float) -> tuple[Order, list[list[int]]]:
        """The order as the model's template has it, and token ids of each prompt, made beside the thread that owns the model, within the time that the request has."""
        scheduler, end = self._service.scheduler, start + self._service.settings.request_timeout_s
        scheduler.require_serving()
        order.require_fit(model)
        try:
            if order.needs_vocabulary:
                await _in_time(asyncio.wrap_future(scheduler.call(model.read_vocabulary)), end)
            reading = self._service.text_threads.submit(order.num_characters, lambda: order.read(model, end))
            return await _in_time(asyncio.wrap_future(reading), end)
        except asyncio.TimeoutError:
            limit_s = self._service.settings.request_timeout_s
            raise Refusal(504, f"the prompt was not read after {limit_s:g} seconds", code="request_timeout") from None
        except EdgepatchError:
            scheduler.require_serving()  # a model that has just been closed is no fault of the request's
            raise

    async def _compile(self, order: Order, start: float) -> CompiledConstraint | None:
        """The constraint of an order, compiled beside the thread that owns the model: a client's program holds up no other reply."""
        constraint = order.sampling.constraint if order.sampling is not None else None
        if constraint is None:
            return None
        scheduler, end = self._service.scheduler, start + self._service.settings.request_timeout_s
        try:
            engine = await _in_time(
                asyncio.wrap_future(scheduler.call(lambda session: session.replies.engine(session.end_token_ids))), end
            )
            return await self._service.constraint_threads.compile(
                engine, constraint, lambda work: _in_time(asyncio.wrap_future(work), end)
            )
        except asyncio.TimeoutError:
            limit_s = self._service.settings.request_timeout_s
            raise Refusal(
                504, f"the constraint was not compiled after {limit_s:g} seconds", code="request_timeout"
            ) from None

    async def _reply(self, run: OrderRun, writer: ReplyWriter, send: Send) -> None:
        async for _ in run.pieces():
            pass
        await run.score_prompts(writer)
        await JSONResponse(writer.reply(run.choices))({"type": "http"}, _nothing, send)

    async def _stream(self, run: OrderRun, writer: ReplyWriter, send: Send) -> None:
        pieces = run.pieces()
        first = await anext(pieces, None)  # an error up to here still becomes a status
        await run.score_prompts(writer)
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            await _send_part(send, writer.head(run.choices))
            if first is not None:
                await _send_part(send, writer.part(*first))
            async for piece in pieces:
                await _send_part(send, writer.part(*piece))
            await _send_part(send, writer.tail(run.choices))
        except Exception as error:
            self._service.note_error(error)
            await _send_part(send, writer.failure(refusal_of(error)))
        await send({"type": "http.response.body", "body": b""})


class OrderRun:
    """The generations of one order, their events brought to the event loop.

    Args:
        service: settings, scheduler, metrics.
        order: what was asked for.
        model: what is served.
        tokens: each prompt.
        start: when the request came, by ``time.monotonic``.
        compiled: the constraint that it has.
    """

    def __init__(
        self,
        service: Service,
        order: Order,
        model: ServedModel,
        tokens: list[list[int]],
        start: float,
        compiled: CompiledConstraint | None = None,
    ) -> None:
        self._service, self._order, self._model, self._start = service, order, model, start
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._scores: dict[int, Scored] = {}
        plans = requests.choices(order, tokens)
        self.choices = [Choice(index, prompt) for index, (prompt, _) in enumerate(plans)]
        scored = order.echo and order.num_logprobs is not None
        self._account = service.logprob_budget.open()
        self._num_logprobs = 0 if order.num_logprobs is None else 1 + order.num_logprobs
        if scored:
            self._account.take(self._num_logprobs * sum(len(prompt) for prompt, _ in plans))
        named = order.num_logprobs or 0
        self._generations = [
            Generation(p, s, self._emitter(i), scored, compiled=compiled, num_logprobs=named, spelled=order.spelled)
            for i, (p, s) in enumerate(plans)
        ]

    def _emitter(self, index: int) -> Callable[[Event], None]:
        loop, put = asyncio.get_running_loop(), self._events.put_nowait

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(put, (index, event))

        return emit

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece, list[TokenLogprob]]]:
        """Queues the generations and gives their pieces as they come, until all are finished.

        Raises:
            Refusal: the queue is full, or the time is over.
            Exception: what a generation failed with.
        """
        self._service.scheduler.submit(self._generations)
        left, is_first = len(self._generations), True
        while left:
            index, event = await self._next()
            if isinstance(event, Finished):
                if event.error is not None:
                    raise event.error
                left -= 1
            elif isinstance(event, Scored):
                self._scores[index] = event
            else:
                logprobs = self.choices[index].add(event)
                if not isinstance(event, Piece):
                    continue
                self._account.take(self._num_logprobs)
                if is_first:
                    is_first = False
                    self._service.metrics.observe_first_token(time.monotonic() - self._start)
                yield self.choices[index], event, logprobs

    async def _next(self) -> tuple[int, Event]:
        limit_s = self._service.settings.request_timeout_s
        try:
            return await asyncio.wait_for(self._events.get(), max(self._start + limit_s - time.monotonic(), 0))
        except asyncio.TimeoutError:
            raise Refusal(
                504, f"the reply was not complete after {limit_s:g} seconds", code="request_timeout"
            ) from None

    async def score_prompts(self, writer: ReplyWriter) -> None:
        """Works out the logprobs of the prompts, off the event loop."""
        for index, scored in self._scores.items():
            assert isinstance(writer, CompletionWriter)  # chat requests have no echo
            prompt = self.choices[index].prompt
            writer.prompt_logprobs[index] = await asyncio.to_thread(score, prompt, scored)

    def cancel(self) -> None:
        """Frees the sequences of what is not finished, and what the reply held."""
        self._account.close()
        self._service.scheduler.cancel(self._generations)


async def _in_time(work: asyncio.Future[T], end: float) -> T:
    return await asyncio.wait_for(work, max(end - time.monotonic(), 0))


async def read_body(request: Request, service: Service) -> bytes:
    """The body of a JSON request.

    Raises:
        Refusal: it is of another type, too large, or takes too long to arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a foreign page cannot send without asking first
        raise Refusal(415, f"content type: expected application/json, found {kind[:100]!r}", code="wrong_content_type")
    limit = service.settings.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit, f"{announced[:20]} announced")
    try:
        return await asyncio.wait_for(_gather(request, limit), service.settings.body_timeout_s)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {service.settings.body_timeout_s:g} seconds"
        raise Refusal(408, message, code="request_timeout") from None
    except ClientDisconnect:
        raise Refusal(400, "the connection was closed before the body was complete", code="incomplete_body") from None


async def _gather(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_large(limit, "more")
    return bytes(body)


def _too_large(limit: int, size: str) -> Refusal:
    return Refusal(413, f"the body: expected at most {limit} bytes, found {size}", code="body_too_large")


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and drops it at once when the client closes the connection."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_part(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def _nothing() -> Any:
    raise ClientDisconnect
