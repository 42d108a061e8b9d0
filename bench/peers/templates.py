"""The peer's chat templates: conversations render as in Transformers, and calls are read as each template writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepatch.bench.peers.rows import Row
from edgepatch.errors import InputError
from edgepatch.text.end_tokens import END_NAMES
from edgepatch.text.templates import PLAIN_CHAT, ChatTemplate
from edgepatch.text.thoughts import split_thought
from edgepatch.text.tool_calls import parse_tool_calls

OWN_ENDS = (
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_sentence>",
    "<|message_sep|>",
    "<seed:eos>",
    "<sep>",
    "<|hy_eos|>",
    "<|eot|>",
)
"""End tokens that only these models' files name."""

NOT_READ = {
    "MiniMax-M3": "its values are trees of tags, each named after its own key: such calls stay the text that the model wrote",
}
"""Templates whose calls are not read, and why."""

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where."},
        "days": {"type": "integer", "description": "How many."},
        "metric": {"type": "boolean", "description": "In metric units."},
        "options": {"type": "object", "description": "More."},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}},
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    },
]
ARGUMENTS = {"city": 'Rome "old" \u00e9', "days": 3, "metric": True, "options": {"a": [1, "b"]}}
USER = {"role": "user", "content": "Weather?"}
SAID = {"role": "assistant", "content": "It rains."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "Be kind."}, USER],
    "three turns": [USER, SAID, {"role": "user", "content": "And now?"}],
}


def rows(root: Path) -> Iterator[Row]:
    """One row a template and conversation, and one for its calls.

    Args:
        root: of llama.cpp's sources.
    """
    for file in sorted((root / "models" / "templates").glob("*.jinja")):
        source = file.read_text(encoding="utf-8")
        template = ChatTemplate(source, bos="<s>", eos="</s>", ends=(*sorted(END_NAMES), *OWN_ENDS))
        for name, messages in CONVERSATIONS.items():
            yield _conversation(f"{file.stem}, {name}", template, messages)
        row = _calls(f"{file.stem}, calls", template)
        is_known = row.verdict == "fail" and file.stem in NOT_READ
        yield Row("templates", row.test, "refused", NOT_READ[file.stem]) if is_known else row


def _conversation(test: str, template: ChatTemplate, messages: list[dict[str, Any]]) -> Row:
    expected, refusal = _as_transformers(template.default, messages)
    try:
        actual = template.write(messages, None, PLAIN_CHAT)
    except InputError as error:
        if refusal:
            return Row("templates", test, "refused", f"the template itself refuses it: {str(error)[:200]}")
        return Row("templates", test, "fail", str(error)[:300])
    if refusal or actual == expected:
        return Row("templates", test, "pass", "taken, though the template alone refuses it" if refusal else "")
    if not template.traits(False).takes_system and messages[0]["role"] == "system":
        return Row("templates", test, "pass", "the system's text stands in front of the user's, as llama.cpp puts it")
    return Row("templates", test, "fail", f"expected {expected[:120]!r}, found {actual[:120]!r}")


def _as_transformers(source: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled = _compile_jinja_template(source)
        text = compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        return str(text), ""
    except Exception as error:  # a template refuses in any way
        return "", str(error)


def _calls(test: str, template: ChatTemplate) -> Row:
    """Writes calls as the template does, and reads them back as a reply."""
    try:
        traits = template.traits(True)
    except InputError as error:
        return Row("templates", test, "refused", str(error)[:300])
    if traits.call_style is None:
        place = "tools" if not traits.tools_name else "calls"
        return Row(
            "templates", test, "refused", f"the template has no place for {place}: a request with them is told so"
        )
    tried = []
    for calls in ([("get_weather", ARGUMENTS)], [("get_weather", ARGUMENTS), ("now", {})]):
        try:
            reply = _written(template, calls)
        except InputError as error:
            tried.append(f"refused: {error}")
            continue
        _, said = split_thought(reply, traits.thought or ("\0", "\0"), False, True)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
        _, read = parse_tool_calls(said, schemas, template.call_forms)
        tried.append(
            "" if read == [{"name": n, "arguments": a} for n, a in calls] else f"{said[:160]!r} read as {read}"
        )
    wrong = next((reason for reason in tried if reason and not reason.startswith("refused")), "")
    if wrong:
        return Row("templates", test, "fail", wrong[:400])
    if "" not in tried:
        return Row("templates", test, "refused", tried[0][:300])
    return Row("templates", test, "pass", f"one call a turn; {tried[1][9:200]}" if tried[1] else "")


def _written(template: ChatTemplate, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What a model would write: the assistant's turn without its opening and without what ends it."""
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"abcdefgh{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }
    results = [
        {"role": "tool", "tool_call_id": f"abcdefgh{i}", "name": name, "content": f"Result {i}."}
        for i, (name, _) in enumerate(calls)
    ]
    tools = TOOLS if template.traits(True).tools_name else None
    opening = template.write([USER], tools, PLAIN_CHAT)
    # The turn is not the last one here, so every template writes it as it stands in a conversation; the result shows where it ends.
    text = template.write([USER, turn, *results], tools, PLAIN_CHAT)
    same = next((i for i, (a, b) in enumerate(zip(text, opening, strict=False)) if a != b), len(opening))
    same = max(text.rfind("<", 0, same), 0) if text.rfind("<", 0, same) > text.rfind(">", 0, same) else same
    said = text[same:]
    ends = (said.find(end, 1) for end in (*template.ends, template.bos))
    return said[: min((place for place in ends if place > 0), default=len(said))].partition("Result 0.")[0]
