"""``pydantic-ai-slim``: agents with text, tools and structured output, by both interfaces."""

from __future__ import annotations

from cases import MODEL, QUESTION, TOWNS, Answer, Cases, get_weather, require
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.settings import ModelSettings

settings = ModelSettings(max_tokens=80, timeout=120)
chat, items = OpenAIChatModel(MODEL), OpenAIResponsesModel(MODEL)


def text() -> None:
    first = Agent(chat, model_settings=settings).run_sync(QUESTION)
    again = Agent(chat, model_settings=settings).run_sync("And of France?", message_history=first.all_messages())
    require(first.output and again.output, "no text")


def structured_by_tool() -> None:
    require(Agent(chat, output_type=Answer, model_settings=settings).run_sync(QUESTION).output.town in TOWNS, "no town")


def structured_by_schema() -> None:
    agent = Agent(chat, output_type=NativeOutput(Answer), model_settings=settings)
    require(agent.run_sync(QUESTION).output.town in TOWNS, "no town")


def tools() -> None:
    agent = Agent(chat, tools=[get_weather], model_settings=settings)
    require(agent.run_sync(QUESTION).output, "no text")


def responses() -> None:
    require(Agent(items, model_settings=settings).run_sync(QUESTION).output, "no text")


def responses_structured() -> None:
    agent = Agent(items, output_type=Answer, model_settings=settings)
    require(agent.run_sync(QUESTION).output.town in TOWNS, "no town")


cases = Cases("pydantic-ai-slim")
for check in (text, structured_by_tool, structured_by_schema, tools, responses, responses_structured):
    cases.run(check.__name__, check)
