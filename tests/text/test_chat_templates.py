"""Chat templates of whoever made the model: what loops, doubles, nests or recurses is an error in words, soon, and harms no other."""

from __future__ import annotations

import threading
import time

import pytest

from edgepatch.errors import InputError
from edgepatch.text import chat_templates
from edgepatch.text.chat_templates import MAX_RENDERED_CHARACTERS, MAX_TEMPLATE_CHARACTERS, render_chat_template

USER = {"role": "user", "content": "Hello"}
DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubly recursive macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a list of lists, doubled": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
    "the same as JSON": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    "squares of squares": DOUBLE.replace("START", "9").replace("STEP", "ns.x * ns.x"),
    "powers": "{% set n = 9 + messages | length %}{{ (n ** n ** n) % 7 }}{{ n ** (n ** 8) }}",
    "made-up text": "{{ lipsum(n=100000000) }}",
}
LARGE = {
    "a text times a number": "{{ 'a' * 10 ** 10 }}",
    "a list times a number": "{{ ([1] * 10 ** 9) | length }}",
    "a text, doubled": DOUBLE.replace("START", "'abcdefgh'").replace("STEP", "ns.x ~ ns.x") + "{{ ns.x }}",
    "a text, added to itself": DOUBLE.replace("START", "'abcdefgh'").replace("STEP", "ns.x + ns.x") + "{{ ns.x }}",
    "join": "{{ range(99999) | join('a' * 100000) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "percent": "{{ '%9999999999d' % messages | length }}",
    "indent": "{{ messages[0].content | indent(10 ** 9, true) }}",
    "center": "{{ messages[0].content | center(10 ** 9) }}",
    "ljust": "{{ messages[0].content.ljust(10 ** 9) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
}
WRONG = {
    "a long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "nested parentheses": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "nested lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "nested loops": "{% for m in messages %}" * 3_000 + "{% endfor %}" * 3_000,
    "many signs": "{{ " + "-" * 90_000 + "1 }}",
    "a number of many digits": "{% set n = 10 %}{{ n ** 4999 }}",
    "a recursive loop": "{% set ns = namespace(l=[1]) %}{% for x in ns.l recursive %}{{ loop(ns.l) }}{% endfor %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end_is_ended(template, monkeypatch):
    monkeypatch.setattr(chat_templates, "RENDER_DEADLINE_S", 0.3)
    with pytest.raises(
        InputError, match=r"cannot be rendered: its process (used more than|did not answer)|MB of memory"
    ):
        render_chat_template(template, [USER], "", "")


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_fills_memory_is_refused(template):
    with pytest.raises(InputError, match=r"more than 512 MB of memory|writes more than|cannot be rendered"):
        render_chat_template(template, [USER], "", "")


@pytest.mark.parametrize("template", WRONG.values(), ids=WRONG)
def test_a_template_that_cannot_be_read_or_followed_is_refused(template):
    with pytest.raises(InputError, match="refuses these messages") as caught:
        render_chat_template(template, [USER], "", "")
    assert len(str(caught.value)) < 1200


def test_long_templates_and_long_texts_are_refused():
    with pytest.raises(InputError, match=f"at most {MAX_TEMPLATE_CHARACTERS} characters, found 1000001"):
        render_chat_template("a" * (MAX_TEMPLATE_CHARACTERS + 1), [USER], "", "")
    with pytest.raises(InputError, match=f"writes more than {MAX_RENDERED_CHARACTERS}"):
        render_chat_template("{% for i in range(99999) %}{{ messages[0].content * 50 }}{% endfor %}", [USER], "", "")


def test_what_is_no_json_is_refused():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for arguments, message in (({"x": object()}, "JSON"), ({"x": deep}, "at most 64 levels")):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        with pytest.raises(InputError, match=message):
            render_chat_template("{{ messages }}", [{"role": "assistant", "tool_calls": [call]}], "", "")


def test_an_evil_template_harms_no_other(monkeypatch):
    """Also where it was only prepared, and where others wait behind it."""
    monkeypatch.setattr(chat_templates, "RENDER_DEADLINE_S", 0.3)
    chat_templates.prepare_chat_template("{{ " + " ~ ".join(["'a' * 10 ** 8"] * 50) + " }}")
    texts: list[str] = []

    def render_good() -> None:
        texts.append(render_chat_template("{{ messages[0].content }}", [USER], "", ""))

    others = [threading.Thread(target=render_good) for _ in range(3)]
    for thread in others:
        thread.start()
    with pytest.raises(InputError):
        render_chat_template(ENDLESS["nested loops"], [USER], "", "")
    for thread in others:
        thread.join()
    assert texts == ["Hello"] * 3


def test_a_large_conversation_is_rendered_soon():
    messages = [{"role": "system", "content": "You are."}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": "hello wörld " * 85} for i in range(999)]
    function = {"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}] * 100
    template = "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    start = time.perf_counter()
    text = render_chat_template(template, messages, "", "", tools)
    assert time.perf_counter() - start < 3
    assert text.endswith("".join(f"<{m['role']}>{m['content']}" for m in messages)) and len(text) > 10**6
