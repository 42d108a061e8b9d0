"""``openai``: chat, streams, parsing, tools and back, responses, completions."""

from __future__ import annotations

import asyncio
import json

import openai
from cases import MODEL, QUESTION, TOWNS, WEATHER, Answer, Cases, get_weather, require

client = openai.OpenAI(timeout=120)
MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT_TOOL = {"type": "function", "function": WEATHER}
TOOL = {"type": "function", **WEATHER, "strict": True}


def chat() -> None:
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, temperature=0)
    require(reply.choices[0].message.content, "no text")
    require(not reply.system_fingerprint.endswith("bare"), "not patched")
    turns = [*MESSAGES, reply.choices[0].message.model_dump(), {"role": "user", "content": "And of France?"}]
    again = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=8)
    require(again.usage.prompt_tokens_details.cached_tokens > 0, "the second turn was read anew")


def stream() -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    require("".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole, "another text")


def stream_helper() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Answer, max_tokens=60
    ) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    require({"content.delta", "content.done"} <= kinds, f"events {kinds}")
    require(final.choices[0].message.parsed.town in TOWNS, "not parsed")
    turns = [*MESSAGES, final.choices[0].message, *MESSAGES]
    client.chat.completions.create(model=MODEL, messages=turns, max_tokens=4)


def parse() -> None:
    reply = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Answer, max_tokens=60)
    require(reply.choices[0].message.parsed.town in TOWNS, "not parsed")


def tools() -> None:
    asked = {"model": MODEL, "tools": [CHAT_TOOL], "max_tokens": 60}
    reply = client.chat.completions.create(messages=MESSAGES, **asked, tool_choice="required")
    message = reply.choices[0].message
    call = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": get_weather(**json.loads(call.function.arguments))}
    last = client.chat.completions.create(messages=[*MESSAGES, message, result], **asked, tool_choice="none")
    require(last.choices[0].message.content, "no text after the result")


def asynchronous() -> None:
    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(timeout=240) as several:
            asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
            replies = await asyncio.gather(*(several.chat.completions.create(**asked) for _ in range(6)))
        return [reply.choices[0].message.content for reply in replies]

    require(len(set(asyncio.run(everyone()))) == 1, "equal requests differ")


def responses() -> None:
    first = client.responses.create(model=MODEL, input=QUESTION, instructions="Be short.", max_output_tokens=16)
    require(first.output_text, "no text")
    turns = [*MESSAGES, *first.output, {"role": "user", "content": "And of France?"}]
    require(client.responses.create(model=MODEL, input=turns, max_output_tokens=8).status, "no status")


def responses_stream() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, text_format=Answer, max_output_tokens=60) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    require(kinds[0] == "response.created" and kinds[-1] == "response.completed", f"events {kinds}")
    require(final.output_parsed.town in TOWNS, "not parsed")


def responses_parse() -> None:
    reply = client.responses.parse(model=MODEL, input=QUESTION, text_format=Answer, max_output_tokens=60)
    require(reply.output_parsed.town in TOWNS, "not parsed")


def responses_tools() -> None:
    asked = {"model": MODEL, "tools": [TOOL], "max_output_tokens": 60}
    reply = client.responses.create(input=QUESTION, **asked, tool_choice="required")
    (call,) = reply.output
    output = get_weather(**json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    last = client.responses.create(input=[*MESSAGES, call, result], **asked, tool_choice="none")
    require(last.output_text, "no text after the result")


def completions() -> None:
    reply = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=1, echo=True, logprobs=1)
    require(len(reply.choices[0].logprobs.token_logprobs) > 3, "no log-probabilities")


def embeddings() -> None:
    try:
        client.embeddings.create(model=MODEL, input=QUESTION)
    except openai.NotFoundError as error:
        require("embeddings" in error.message, error.message)
    else:
        raise AssertionError("no 404")


cases = Cases("openai")
for check in (
    chat,
    stream,
    stream_helper,
    parse,
    tools,
    asynchronous,
    responses,
    responses_stream,
    responses_parse,
    responses_tools,
    completions,
    embeddings,
):
    cases.run(check.__name__, check)
