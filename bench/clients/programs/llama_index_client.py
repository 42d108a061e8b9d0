"""``llama-index-llms-openai-like``: OpenAILike with chats, streams, tools and structured output."""

from __future__ import annotations

from cases import KEY, MODEL, QUESTION, TOWNS, URL, Answer, Cases, get_weather, require
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

options = {"model": MODEL, "api_base": URL, "api_key": KEY, "max_tokens": 60, "timeout": 120}
model = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True)


def chat() -> None:
    require(model.chat([ChatMessage(role="user", content=QUESTION)]).message.content, "no text")


def stream() -> None:
    parts = list(model.stream_chat([ChatMessage(role="user", content=QUESTION)]))
    require(parts[-1].message.content, "no text")


def complete() -> None:
    require(OpenAILike(**options).complete("Once upon a time").text, "no text")


def tools() -> None:
    tool = FunctionTool.from_defaults(get_weather)
    reply = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    (call,) = model.get_tool_calls_from_response(reply)
    require(call.tool_kwargs["town"] in TOWNS, f"no call: {call}")


def structured() -> None:
    answer = model.structured_predict(Answer, PromptTemplate("{question}"), question=QUESTION)
    require(answer.town in TOWNS, f"not parsed: {answer}")


def structured_by_schema() -> None:
    shaped = OpenAILike(**options, is_chat_model=True, should_use_structured_outputs=True)
    answer = shaped.structured_predict(Answer, PromptTemplate("{question}"), question=QUESTION)
    require(answer.town in TOWNS, f"not parsed: {answer}")


cases = Cases("llama-index-llms-openai-like")
for check in (chat, stream, complete, tools, structured, structured_by_schema):
    cases.run(check.__name__, check)
