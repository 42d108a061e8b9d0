"""What a template wants is found by probes, and nothing of a conversation is lost without a word."""

from __future__ import annotations

import json
import re

import pytest

from edgepatch.errors import InputError
from edgepatch.text.templates import ChatOptions, ChatTemplate, NoPlaceForToolsError
from edgepatch.text.tool_calls import parse_tool_calls

USER, SYSTEM = {"role": "user", "content": "Weather?"}, {"role": "system", "content": "Be kind."}
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
ARGUMENTS = {"town": 'Ulm "old"', "days": 3}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TURN = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}

HEAD = "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<|{{ m.role }}|>"
TAIL = "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"


def template(calls: str, content: str = "{{ m.content }}", **more) -> ChatTemplate:
    return ChatTemplate(HEAD + content + calls + TAIL, bos="<s>", eos="</s>", ends=("</s>",), **more)


HERMES = (
    EACH + '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
FORMS = {
    "hermes": HERMES,
    "one bare object": EACH + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}',
    "a list": "{% if m.tool_calls %}[CALLS]["
    + EACH
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ c.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]{% endif %}',
    "a list of names": "{% if m.tool_calls %}<|tools|>["
    + EACH
    + '{"{{ f.name }}": {{ f.arguments | tojson }}}{{ "" if loop.last else ", " }}{% endfor %}]<|/tools|>{% endif %}',
    "lines": "{% if m.tool_calls %}<calls>\n"
    + EACH
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n{% endfor %}</calls>{% endif %}',
    "name and JSON": EACH + "[CALL]{{ f.name }}[ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}{% endfor %}",
    "sections": "{% if m.tool_calls %}<|calls|>"
    + EACH
    + "<|call|>functions.{{ f.name }}:{{ loop.index0 }}<|args|>{{ f.arguments | tojson }}<|end_call|>{% endfor %}<|end_calls|>{% endif %}",
    "pairs": EACH
    + "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>\n{% endfor %}",
    "keys and values": EACH
    + "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>{% endfor %}",
    "python": "{% if m.tool_calls %}<|call|>["
    + EACH
    + "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}){{ '' if loop.last else ', ' }}{% endfor %}]<|/call|>{% endif %}",
    "braces": EACH
    + "<|call>call:{{ f.name }}{{ '{' }}{% for k, v in f.arguments.items() %}{{ k }}:{% if v is string %}<|\"|>{{ v }}<|\"|>{% else %}{{ v }}{% endif %}{{ '' if loop.last else ',' }}{% endfor %}{{ '}' }}<call|>{% endfor %}",
    "text arguments": EACH + '{{ "<call>" + f.name + "\n" + f.arguments + "</call>" }}{% endfor %}',
}


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_read_as_the_template_writes_them(name):
    chat = template(FORMS[name])
    calls = [CALL] if name == "one bare object" else [CALL, {**CALL, "id": "call_2"}]
    turn = {**TURN, "tool_calls": calls}
    results = [{**RESULT, "tool_call_id": call["id"]} for call in calls]
    text = chat.write([USER, turn, *results], [TOOL], ChatOptions())
    reply = re.search(r"<\|assistant\|>(.*?)</s>", text, re.DOTALL)[1]
    said, read = parse_tool_calls(reply, {"weather": SCHEMA}, chat.call_forms)
    assert (said, read) == ("", [{"name": "weather", "arguments": ARGUMENTS}] * len(calls)), reply
    broken = reply.rstrip()[:-1]
    assert parse_tool_calls("Text. " + broken, {"weather": SCHEMA}, chat.call_forms)[1] == []


def test_null_content_and_text_arguments_are_found_out():
    """As DeepSeek's distilled models have it."""
    chat = template("{% if m.content is none %}" + FORMS["text arguments"] + "{% else %}{{ m.content }}{% endif %}", "")
    assert chat.traits(True).call_style == {"has_short_ids": False, "arguments_as_text": True, "content_is_null": True}
    assert json.dumps(ARGUMENTS) in chat.write([USER, TURN, RESULT], [TOOL], ChatOptions())


def test_ids_of_nine_characters_where_the_template_wants_them():
    check = "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{% endfor %}"
    text = template(check + HERMES + "{{ m.tool_call_id }}").write([USER, TURN, RESULT], [TOOL], ChatOptions())
    assert "call_1" not in text and re.search(r"rain[0-9a-f]{9}</s>", text)


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        ("{{ m.content }}", "message 1: the call of 'weather'"),
        ("{% if m.role != 'tool' %}{{ m.content }}" + HERMES + "{% endif %}", "message 2, the result of a tool"),
        (
            "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}",
            "message 1",
        ),
    ],
)
def test_a_call_or_a_result_that_is_not_written_is_an_error(source, lost):
    turn = {**TURN, "tool_calls": [CALL, {**CALL, "id": "call_2"}]}
    with pytest.raises(InputError, match="does not appear") as caught:
        template("", source).write([USER, turn, RESULT, {**RESULT, "tool_call_id": "call_2"}], [TOOL], ChatOptions())
    assert lost in str(caught.value)


def test_tools_that_a_template_does_not_show_are_refused():
    chat = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(NoPlaceForToolsError, match="no place for tools"):
        chat.write([USER], [TOOL], ChatOptions())
    assert chat.write([USER], None, ChatOptions()) == "Weather?"


def test_tools_without_description_or_parameters_are_filled_where_the_template_needs_them():
    needs = "{% for t in tools or [] %}{{ t.function.description + '!' }}{{ t.function.parameters | tojson }}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    bare = {"type": "function", "function": {"name": "weather"}}
    text = ChatTemplate(needs).write([USER], [bare], ChatOptions())
    assert text == '!{"type": "object", "properties": {}}weatherWeather?'
    shown = ChatTemplate("{{ tools | tojson }}").write([USER], [bare], ChatOptions())
    assert json.loads(shown) == [bare]  # a template that takes them as they are gets them as they are


def test_a_system_message_goes_in_front_of_the_user_where_it_is_refused():
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert ChatTemplate(refuses).write([SYSTEM, USER], None, ChatOptions()) == "<user>Be kind.\n\nWeather?"
    drops = refuses.replace("{{ raise_exception('no system') }}", "{% continue %}")
    assert ChatTemplate(drops).write([SYSTEM, USER], None, ChatOptions()) == "<user>Be kind.\n\nWeather?"


def test_with_tools_the_template_tool_use_is_taken():
    chat = ChatTemplate(
        "plain {{ messages[0].content }}", tool_use="tools {{ tools | tojson }}{{ messages[0].content }}"
    )
    assert chat.write([USER], None, ChatOptions()) == "plain Weather?"
    assert chat.write([USER], [TOOL], ChatOptions()).startswith("tools [")


def test_the_last_message_is_continued_exactly():
    chat = template("", "{{ m.content | trim }}")
    last = {"role": "assistant", "content": '{"a": '}
    assert chat.write([USER, last], None, ChatOptions(continues_last=True)).endswith('<|assistant|>{"a": ')
    assert chat.write([USER, last], None, ChatOptions()).endswith('<|assistant|>{"a":</s><|assistant|>')
    for messages in ([USER], [USER, TURN]):
        with pytest.raises(InputError, match="a last message of the assistant"):
            chat.write(messages, None, ChatOptions(continues_last=True))


def test_thoughts_that_the_prompt_opens_and_values_of_the_template():
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{% if add_generation_prompt %}<a>{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% else %}<think>\n{% endif %}{% endif %}"
    chat = ChatTemplate(source)
    assert chat.traits(False).thought == ("<think>", "</think>")
    assert chat.opens_thought(ChatOptions(), False)
    assert not chat.opens_thought(ChatOptions({"enable_thinking": False}), False)
    for values in (
        {"tools": []},
        {"enable_thinking": "no"},
        {"reasoning_effort": "<|im_end|>"},
        {"thinking_budget": True},
    ):
        with pytest.raises(InputError, match="template value"):
            ChatOptions(values)
