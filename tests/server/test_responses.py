"""``/v1/responses`` through the real ``openai`` client: the same generations as chat completions, as items and events."""

import json

import openai
import pytest
from pydantic import BaseModel

from edgepatch.runtimes import load_runtime
from kit.serving import KEY, MODEL, TOOLS_TEMPLATE, running

TEXT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": TEXT}]
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"enum": ["Ulm", "Rome"]}},
        "required": ["town"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = r'"<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"town\": \"Ulm\"}}\n</tool_call>"'
THINKING = TOOLS_TEMPLATE.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'").replace(
    "message['content']", "(message['content'].split('</think>')[-1])"
)


@pytest.fixture(scope="module")
def serve(tiny_folder, tiny_patch):
    def connect(template=None):
        options = {"chat_template": template} if template else {"num_sequences": 3}
        return running(lambda: load_runtime(tiny_folder, tiny_patch, **options))

    return connect


def connected(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(serve):
    with serve() as server, connected(server) as openai_client:
        yield openai_client


@pytest.fixture(scope="module")
def tooled(serve):
    """A client of a model whose template has a place for tools."""
    with serve(TOOLS_TEMPLATE) as server, connected(server) as openai_client:
        yield openai_client


def ask(client, **fields):
    return client.responses.create(
        **{"model": MODEL, "input": TEXT, "max_output_tokens": 12, "temperature": 0} | fields
    )


def chat(client, **fields):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | fields
    )


def test_a_response_is_the_chat_completion(client):
    said, reply = chat(client), ask(client)
    assert reply.output_text == said.choices[0].message.content
    assert reply.system_fingerprint == said.system_fingerprint
    assert (reply.object, reply.store, reply.id[:5]) == ("response", False, "resp_")
    (item,) = reply.output
    assert (item.type, item.role, item.id[:4]) == ("message", "assistant", "msg_")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (
        said.usage.prompt_tokens,
        said.usage.completion_tokens,
    )
    assert reply.usage.total_tokens == said.usage.total_tokens
    is_cut = said.choices[0].finish_reason == "length"
    assert reply.status == item.status == ("incomplete" if is_cut else "completed")
    assert (reply.incomplete_details.reason if is_cut else reply.incomplete_details) == (
        "max_output_tokens" if is_cut else None
    )


def test_a_conversation_of_items_is_one_of_messages(client):
    first = ask(client)
    items = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": TEXT}, *first.output]
    items += [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And then?"}]}]
    messages = [
        {"role": "system", "content": "Be short."},
        *MESSAGES,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    said = chat(client, messages=messages)
    for fields in ({"input": items}, {"input": items[1:], "instructions": "Be short."}):
        reply = ask(client, **fields)
        assert (reply.output_text, reply.usage.input_tokens) == (
            said.choices[0].message.content,
            said.usage.prompt_tokens,
        )
    both = ask(client, input=items, instructions="Be kind.")
    joined = [{"role": "system", "content": "Be kind.\n\nBe short."}, *messages[1:]]
    assert both.usage.input_tokens == chat(client, messages=joined).usage.prompt_tokens
    assert both.instructions == "Be kind."


def test_events_come_in_order_and_make_the_reply(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    begin, end = ["created", "in_progress", "output_item.added", "content_part.added"], ["output_text.done"]
    end += ["content_part.done", "output_item.done", whole.status]
    assert kinds == [*begin, *["output_text.delta"] * deltas, *end]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == whole.output_text
    assert not events[0].response.output and events[0].response.usage is None
    final = events[-1].response
    assert final.output_text == whole.output_text and final.usage == whole.usage
    assert {e.response.system_fingerprint for e in events if hasattr(e, "response")} == {whole.system_fingerprint}
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {final.output[0].id}


def test_the_clients_own_stream_and_parser_read_it(client):
    class Verdict(BaseModel):
        safe: bool

    parsed = client.responses.parse(model=MODEL, input=TEXT, text_format=Verdict, max_output_tokens=60)
    assert isinstance(parsed.output_parsed.safe, bool)
    again = client.responses.parse(
        model=MODEL,
        input=[{"role": "user", "content": TEXT}, *parsed.output, {"role": "user", "content": "Sure?"}],
        text_format=Verdict,
        max_output_tokens=60,
    )
    assert isinstance(again.output_parsed.safe, bool)
    with client.responses.stream(model=MODEL, input=TEXT, text_format=Verdict, max_output_tokens=60) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed.safe, bool)
    free = ask(client, text={"format": {"type": "json_object"}, "verbosity": "low"}, max_output_tokens=4)
    assert free.output_text.startswith("{")


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
def test_a_tool_round_trip(tooled, choice):
    other = {"type": "function", "name": "get_time"}
    asked = {"tools": [TOOL] if choice == "required" else [TOOL, other], "max_output_tokens": 200, "temperature": 1}
    reply = ask(tooled, **asked, tool_choice=choice)
    (call,) = reply.output
    assert (call.type, call.name, call.status, reply.status) == (
        "function_call",
        "get_weather",
        "completed",
        "completed",
    )
    assert json.loads(call.arguments)["town"] in ("Ulm", "Rome") and call.call_id != call.id
    assert reply.tools[0].name == "get_weather" and reply.output_text == ""
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = ask(tooled, input=[*MESSAGES, call, result], tools=asked["tools"])
    assert again.output[0].type == "message" and again.usage.input_tokens > reply.usage.input_tokens


def test_a_call_behind_a_text_streams_as_two_items(tooled):
    grammar = f'root ::= "Let me look.\\n" {CALL}'
    asked = {"tools": [TOOL], "max_output_tokens": 200, "extra_body": {"grammar": grammar}}
    whole, events = ask(tooled, **asked), list(ask(tooled, **asked, stream=True))
    for reply in (whole, events[-1].response):
        message, call = reply.output
        assert message.content[0].text == "Let me look." and json.loads(call.arguments) == {"town": "Ulm"}
    kinds = [event.type for event in events]
    assert kinds.index("response.output_item.done") < kinds.index("response.function_call_arguments.delta")
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert arguments == call.arguments
    assert [e.output_index for e in events if e.type == "response.output_item.added"] == [0, 1]
    same = chat(
        tooled,
        tools=[{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}],
        max_tokens=200,
        extra_body={"grammar": grammar},
    )
    assert same.usage.prompt_tokens == whole.usage.input_tokens


def test_thoughts_are_items_of_their_own(serve):
    grammar = 'root ::= "hm, hm\\n</think>\\n\\nYes."'
    with serve(THINKING) as server, connected(server) as client:
        asked = {"max_output_tokens": 80, "extra_body": {"grammar": grammar}}
        whole, events = ask(client, **asked), list(ask(client, **asked, stream=True))
        for reply in (whole, events[-1].response):
            thought, message = reply.output
            assert "".join(part.text for part in thought.content).strip() == "hm, hm"
            assert message.content[0].text.strip() == "Yes."
            assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens
        assert "response.reasoning_text.delta" in {event.type for event in events}
        again = ask(client, input=[*MESSAGES, *whole.output, *MESSAGES])
        assert again.usage.input_tokens > whole.usage.input_tokens


def test_logprobs_are_those_of_the_message(client):
    said = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    included = ["message.output_text.logprobs"]
    whole = ask(client, include=included, top_logprobs=2).output[0].content[0].logprobs
    assert [entry.logprob for entry in whole] == [entry.logprob for entry in said]
    assert [len(entry.top_logprobs) for entry in whole] == [2] * len(whole)
    done = [e for e in ask(client, include=included, stream=True) if e.type == "response.output_text.done"]
    assert [entry.logprob for entry in done[0].logprobs] == [entry.logprob for entry in said]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not kept"),
        ({"conversation": "conv_1"}, "conversation", "not kept"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type", "not kept"),
        ({"background": True}, "background", "expected False"),
        ({"truncation": "auto"}, "truncation", "expected 'disabled'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "expected 'function', found 'web_search'"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "found 'mcp'"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "rm"}},
            "tool_choice.name",
            "expected one of get_weather, found 'rm'",
        ),
        ({"tool_choice": "required"}, "tool_choice", "found none"),
        ({"tools": [TOOL]}, "tools", "no place for tools"),
        ({"input": []}, "input", "empty"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input", "nothing but thoughts without a text"),
        ({"input": "word " * 2000}, "input", "expected a prompt of at most 502 tokens"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input.0.role", "'wizard'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "found 'input_image'",
        ),
        ({"input": [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}]}, None, "unknown field"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "'json_object'"),
        ({"extra_body": {"id_slot": 0}}, "id_slot", "unknown field"),
        ({"extra_body": {"prompt_cache_key": "x"}}, "prompt_cache_key", "unknown field"),
    ],
)
def test_what_cannot_be_used_is_named(client, fields, param, words, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields, stream=stream)
    assert caught.value.param == (param or "input.0.encrypted_content")
    assert words in caught.value.message


def test_what_clients_send_unasked_changes_nothing(client):
    nulls = dict.fromkeys(
        ("instructions", "previous_response_id", "conversation", "tools", "text", "reasoning", "top_logprobs", "prompt")
    )
    more = {
        "store": True,
        "truncation": "disabled",
        "service_tier": "auto",
        "metadata": {"a": "b"},
        "background": False,
    }
    more |= {"include": ["reasoning.encrypted_content"], "parallel_tool_calls": True, "tool_choice": "auto"}
    reply = ask(client, extra_body=nulls | more)
    assert reply.output_text == ask(client).output_text
    assert (reply.metadata, reply.store) == ({"a": "b"}, False)


def test_what_is_not_here_says_so(client):
    with pytest.raises(openai.NotFoundError, match="gives no embeddings") as caught:
        client.embeddings.create(model=MODEL, input="x")
    assert (caught.value.type, caught.value.code) == ("not_found_error", "not_found")
    with pytest.raises(openai.NotFoundError, match="not kept"):
        client.responses.retrieve("resp_1")
