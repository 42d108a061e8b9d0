"""``instructor``: structured output in the modes that an OpenAI server takes."""

from __future__ import annotations

import instructor
import openai
from cases import MODEL, QUESTION, TOWNS, Answer, Cases, require

MESSAGES = [{"role": "user", "content": QUESTION}]


def extract(mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(timeout=120), mode=mode)
    limit = {"max_output_tokens" if mode.name.startswith("RESPONSES") else "max_tokens": 80}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=Answer, max_retries=0, **limit
    )
    require(answer.town in TOWNS, f"not parsed: {answer}")


def partial() -> None:
    client = instructor.from_openai(openai.OpenAI(timeout=120))
    parts = client.chat.completions.create_partial(
        model=MODEL, messages=MESSAGES, response_model=Answer, max_tokens=80, max_retries=0
    )
    require(list(parts)[-1].town in TOWNS, "not parsed")


cases = Cases("instructor")
for name in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"):
    cases.run(name.lower(), lambda name=name: extract(instructor.Mode[name]))
cases.run("partial", partial)
