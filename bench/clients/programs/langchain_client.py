"""``langchain-openai``: ChatOpenAI with streams, tools and structured output, by both interfaces."""

from __future__ import annotations

import json

from cases import MODEL, QUESTION, TOWNS, WEATHER_SCHEMA, Answer, Cases, get_weather, require
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=MODEL, max_tokens=60, timeout=120)


def invoke() -> None:
    require(model.invoke(QUESTION).content, "no text")


def stream() -> None:
    require("".join(chunk.content for chunk in model.stream(QUESTION)), "no text")


def tools() -> None:
    tooled = model.bind_tools([get_weather], tool_choice="any")
    messages = [HumanMessage(QUESTION)]
    messages.append(tooled.invoke(messages))
    (call,) = messages[-1].tool_calls
    messages.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
    require(model.bind_tools([get_weather]).invoke(messages).type == "ai", "no reply to the result")


def structured(method: str) -> None:
    answer = model.with_structured_output(Answer, method=method).invoke(f"{QUESTION} Answer in JSON.")
    require(answer.town in TOWNS, f"not parsed: {answer}")


def json_mode() -> None:
    bound = model.bind(response_format={"type": "json_object", "schema": WEATHER_SCHEMA})
    require(json.loads(bound.invoke(f"{QUESTION} Answer in JSON.").content)["town"] in TOWNS, "not parsed")


def responses() -> None:
    by_items = ChatOpenAI(model=MODEL, max_tokens=60, timeout=120, use_responses_api=True)
    require(by_items.invoke(QUESTION).content, "no text")
    require("".join(str(chunk.content) for chunk in by_items.stream(QUESTION)), "no text in the stream")
    answer = by_items.with_structured_output(Answer).invoke(QUESTION)
    require(answer.town in TOWNS, f"not parsed: {answer}")


cases = Cases("langchain-openai")
for check in (invoke, stream, tools, json_mode, responses):
    cases.run(check.__name__, check)
for way in ("function_calling", "json_schema"):
    cases.run(f"structured_{way}", lambda way=way: structured(way))
