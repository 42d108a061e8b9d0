"""Calls of tools in replies: the two forms, and everything that is not quite one."""

import json

import pytest

from edgepatch.text.tool_calls import MAX_CALLS, MAX_TEXT, parse_tool_calls

CALL = '{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}'
PARSED = {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}


def block(body):
    return f"<tool_call>\n{body}\n</tool_call>"


def test_blocks_with_text_around_them():
    assert parse_tool_calls(block(CALL)) == ("", [PARSED])
    two = f"Let me see.\n{block(CALL)}\n{block(CALL)}\n"
    assert parse_tool_calls(two) == ("Let me see.", [PARSED, PARSED])


def test_bare_json():
    llama = CALL.replace("arguments", "parameters")
    for text in (llama, f"\n {llama}\n", "<|python_tag|>" + llama, llama.replace("{", '{"type": "function", ', 1)):
        assert parse_tool_calls(text) == ("", [PARSED])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "{}",
        "[]",
        "null",
        "{",
        CALL + " and more",
        "See: " + CALL,
        '{"name": "f"}',
        '{"name": "", "arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {}, "parameters": {}}',
        '{"name": "f", "arguments": {}, "x": 1}',
        '{"name": "f", "name": "g", "arguments": {}}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"type": "text", "name": "f", "arguments": {}}',
        '{"name": "f", "arguments": ' + '{"a":' * 100_000,
        "<tool_call>" + CALL,
        CALL + "</tool_call>",
        block(""),
        block("{"),
        block(CALL) + block("{"),
        block(CALL) + "<tool_call>",
        "<tool_call>" + block(CALL),
        block(f"[{CALL}]"),
        block(CALL) * (MAX_CALLS + 1),
        block(CALL) + " " * MAX_TEXT,
    ],
)
def test_anything_else_is_text(text):
    assert parse_tool_calls(text) == (text, [])


def test_only_offered_tools_are_called():
    assert parse_tool_calls(CALL, {"weather"}) == ("", [PARSED])
    answer = json.dumps({"name": "Ada", "parameters": {}})
    assert parse_tool_calls(answer, {"weather"}) == (answer, [])
    assert parse_tool_calls(block(CALL) + block(CALL.replace("weather", "rm")), {"weather"})[1] == []
