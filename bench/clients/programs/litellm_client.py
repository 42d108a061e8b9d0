"""``litellm``: completion, streams, tools, structured output and responses."""

from __future__ import annotations

import json

import litellm
from cases import KEY, MODEL, QUESTION, TOWNS, URL, WEATHER, Answer, Cases, require

litellm.telemetry = False
ASKED = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "timeout": 120}
MESSAGES = [{"role": "user", "content": QUESTION}]


def completion() -> None:
    reply = litellm.completion(**ASKED, messages=MESSAGES, max_tokens=16)
    require(reply.choices[0].message.content, "no text")
    turns = [*MESSAGES, reply.choices[0].message.model_dump(), {"role": "user", "content": "And of France?"}]
    litellm.completion(**ASKED, messages=turns, max_tokens=4)


def stream() -> None:
    chunks = litellm.completion(**ASKED, messages=MESSAGES, max_tokens=16, stream=True)
    require("".join(chunk.choices[0].delta.content or "" for chunk in chunks), "no text")


def tools() -> None:
    asked = {**ASKED, "tools": [{"type": "function", "function": WEATHER}], "max_tokens": 60}
    reply = litellm.completion(**asked, messages=MESSAGES, tool_choice="required")
    call = reply.choices[0].message.tool_calls[0]
    require(json.loads(call.function.arguments)["town"] in TOWNS, "no call")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    litellm.completion(**asked, messages=[*MESSAGES, reply.choices[0].message, result], tool_choice="none")


def structured() -> None:
    reply = litellm.completion(**ASKED, messages=MESSAGES, response_format=Answer, max_tokens=60)
    require(Answer.model_validate_json(reply.choices[0].message.content), "not parsed")


def responses() -> None:
    reply = litellm.responses(**ASKED, input=QUESTION, max_output_tokens=16)
    require(reply.output[0].content[0].text, "no text")


cases = Cases("litellm")
for check in (completion, stream, tools, structured, responses):
    cases.run(check.__name__, check)
