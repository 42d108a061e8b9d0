"""The server through the real ``openai`` client: replies, streams, concurrency, cancellation, errors."""

import asyncio
import codecs
import json
import math
import re
import time
from dataclasses import replace

import openai
import pytest

from edgepatch.decoding.sampling import Sampling
from edgepatch.patch.composition import compose_on_device
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import SoftPrompt
from kit.serving import KEY, MODEL, TOOLS_TEMPLATE, Paced, running

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def load(folder, patch, **options):
    return load_runtime(folder, patch, **options)


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_patch):
    with running(lambda: load(tiny_folder, tiny_patch, num_sequences=3)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as openai_client:
        yield openai_client


@pytest.fixture(scope="module")
def tooled(tiny_folder, tiny_patch):
    """A client of a model whose template has a place for tools."""
    with (
        running(lambda: load(tiny_folder, tiny_patch, chat_template=TOOLS_TEMPLATE)) as running_server,
        openai.OpenAI(base_url=f"{running_server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as openai_client,
    ):
        yield openai_client


@pytest.fixture(scope="module")
def runtime(tiny_folder, tiny_patch):
    with load(tiny_folder, tiny_patch) as loaded:
        yield loaded


def ask(client, **fields):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | fields
    )


def no_end(runtime):
    """The model cannot end by itself."""
    return {str(token): -100 for token in runtime.end_token_ids}


def test_several_patches_are_listed_each(tiny_folder, tiny_patch):
    from edgepatch.converters.hf import folders, seeds

    first = seeds.complete(tiny_patch, folders.load_model(tiny_folder))
    second = seeds.complete(
        replace(tiny_patch, name="other", kv_seed=None, soft_prompt=SoftPrompt(-tiny_patch.soft_prompt.embeddings[:6])),
        folders.load_model(tiny_folder),
    )
    with running(lambda: load(tiny_folder, [first, second])) as several, several.client() as http:
        listed, figures = http.get("/v1/patches").json(), http.get("/metrics").text
    assert sorted((patch["name"], patch["digest"], patch["num_virtual_tokens"]) for patch in listed["data"]) == [
        ("other", second.digest, 6),
        ("tiny", first.digest, 10),
    ]
    assert all(patch["active"] for patch in listed["data"])
    together = compose_on_device([first, second])
    assert listed["system_fingerprint"].endswith(f"+{together.digest[:12]}")
    assert f'patch_digest="{together.digest}"' in figures


def test_models_and_patches(client, server, tiny_patch):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "edgepatch"
    with server.client() as http:
        listed = http.get("/v1/patches").json()
    (entry,) = listed["data"]
    assert (entry["name"], entry["version"], entry["digest"]) == (
        tiny_patch.name,
        tiny_patch.version,
        tiny_patch.digest,
    )
    assert entry["active"] is True and entry["seed_route"] in ("stored", "decoded")


def test_chat_equals_the_runtime(client, runtime):
    reply = ask(client)
    assert reply.choices[0].message.content == runtime.chat(MESSAGES, Sampling(max_new_tokens=12, temperature=0))
    assert reply.system_fingerprint == runtime.system_fingerprint
    assert reply.usage.prompt_tokens == len(runtime.tokens(MESSAGES))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.choices[0].finish_reason in ("stop", "length")


def test_stream_equals_the_reply_and_ends_with_usage(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_second_turn_reuses_the_first(client):
    first = ask(client, messages=[{"role": "user", "content": "Reuse: one two three four five six seven"}])
    turns = [
        {"role": "user", "content": "Reuse: one two three four five six seven"},
        first.choices[0].message,
        {"role": "user", "content": "and again"},
    ]
    second = ask(client, messages=turns)
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens - 8
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens


def test_seed_makes_the_draw_repeatable_and_choices_differ(client):
    one, two = (ask(client, temperature=1.5, seed=7, n=4) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert one.usage.completion_tokens > 4
    assert ask(client, temperature=1.5, seed=100).choices[0].message.content not in texts


def test_streamed_choices_are_those_of_the_reply(client):
    whole = ask(client, temperature=1.5, seed=3, n=3)
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(client, temperature=1.5, seed=3, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


SETTINGS = {
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "repetition_penalty": 1.9,
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "logit_bias": {"100": 5.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_sampler(client, runtime, name):
    value = SETTINGS[name]
    fields = {"temperature": 1.5, "seed": 5, "max_tokens": 60}
    settings = {
        "temperature": 1.5,
        "rng_seed": 5,
        "max_new_tokens": 60,
        name: {100: 5.0} if name == "logit_bias" else value,
    }
    reply = ask(client, **fields, extra_body={name: value}).choices[0].message.content
    assert reply == runtime.chat(MESSAGES, Sampling(**settings))
    assert reply != ask(client, **fields).choices[0].message.content


def test_stop_ends_the_reply_before_it(client, runtime):
    plain = ask(client, max_tokens=40, logit_bias=no_end(runtime)).choices[0].message.content
    stop = plain[10:13]
    reply = ask(client, max_tokens=40, logit_bias=no_end(runtime), stop=[stop])
    assert reply.choices[0].message.content == plain[: plain.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_max_completion_tokens_is_max_tokens(client):
    assert ask(client, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens <= 3


def test_logprobs_are_those_of_the_model(client, runtime):
    reply = ask(client, max_tokens=6, logprobs=True, top_logprobs=4)
    tokens = runtime.tokens(MESSAGES)
    pieces = list(runtime.stream(MESSAGES, Sampling(max_new_tokens=6, temperature=0)))
    rows = runtime.logits([*tokens, *(piece.token_id for piece in pieces)])[len(tokens) - 1 :]
    content = reply.choices[0].logprobs.content
    assert len(content) >= 3
    for entry, piece, row in zip(content, pieces, rows, strict=False):
        logprobs = row - row.max()
        logprobs = logprobs - math.log(sum(math.exp(x) for x in logprobs))
        assert entry.logprob == pytest.approx(float(logprobs[piece.token_id]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            sorted(map(float, logprobs))[-4:][::-1], abs=1e-4
        )
    whole_characters = codecs.getincrementaldecoder("utf-8")("replace").decode(
        b"".join(bytes(entry.bytes) for entry in content)
    )
    assert whole_characters == reply.choices[0].message.content
    streamed = [c for chunk in ask(client, max_tokens=6, logprobs=True, stream=True) for c in chunk.choices]
    assert [e.logprob for c in streamed if c.logprobs for e in c.logprobs.content] == [
        entry.logprob for entry in content
    ]


def test_completions_of_text_ids_and_lists(client, runtime):
    def complete(prompt):
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)

    text = "The quick brown"
    ids = runtime.encode(text)
    expected = runtime.generate(text, Sampling(max_new_tokens=8, temperature=0))
    assert complete(text).choices[0].text == complete(ids).choices[0].text == expected
    other = runtime.generate("Patching", Sampling(max_new_tokens=8, temperature=0))
    both = complete([ids, runtime.encode("Patching")])
    assert [choice.text for choice in both.choices] == [expected, other]
    assert both.usage.prompt_tokens == len(ids) + len(runtime.encode("Patching"))
    chunks = client.completions.create(model=MODEL, prompt=text, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_lm_eval_asks_for_it(client, runtime, max_tokens):
    ids = runtime.encode("The quick brown fox jumps over")
    reply = client.completions.create(
        model=MODEL, prompt=[ids, ids[:4]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
    )
    rows = runtime.logits(ids)
    for choice, prompt in zip(reply.choices, (ids, ids[:4]), strict=True):
        logprobs = choice.logprobs.token_logprobs
        assert logprobs[0] is None and len(logprobs) == len(prompt) + max_tokens
        for token, row, logprob in zip(prompt[1:], rows, logprobs[1:], strict=False):
            values = row - row.max()
            assert logprob == pytest.approx(float(values[token]) - math.log(sum(math.exp(x) for x in values)), abs=1e-4)
        greedy = [max(top, key=top.get) for top in choice.logprobs.top_logprobs[1:]]
        assert len(greedy) == len(prompt) - 1 + max_tokens
        offsets, text = choice.logprobs.text_offset, choice.text
        assert offsets == sorted(offsets) and offsets[-1] <= len(text)
        places = zip(choice.logprobs.tokens, offsets, strict=True)
        assert all(text.startswith(token, place) for token, place in places if not re.match("bytes:|token_id:", token))
    assert reply.choices[0].text.startswith("The quick brown fox")


def test_response_format_and_grammar_hold(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    verdict = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
    reply = ask(client, max_tokens=60, response_format=verdict, temperature=1, seed=2)
    assert set(json.loads(reply.choices[0].message.content)) == {"ok"}
    streamed = ask(client, max_tokens=60, response_format=verdict, temperature=1, seed=2, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == reply.choices[0].message.content
    assert ask(client, response_format={"type": "json_object"}, max_tokens=4).choices[0].message.content.startswith("{")
    assert ask(client, extra_body={"grammar": 'root ::= "yes" | "no"'}).choices[0].message.content in ("yes", "no")
    assert (
        ask(client, response_format={"type": "text"}).choices[0].message.content
        == ask(client).choices[0].message.content
    )


CALL = (
    'root ::= "<tool_call>\\n{\\"name\\": \\"get_weather\\", \\"arguments\\": {\\"town\\": \\"Ulm\\"}}\\n</tool_call>"'
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_becomes_one(tooled, stream):
    """The grammar makes the random model speak as a model that was trained on tools does."""
    asked = ask(tooled, tools=[TOOL], tool_choice="auto", max_tokens=200, extra_body={"grammar": CALL}, stream=stream)
    if stream:
        deltas = [chunk.choices[0] for chunk in asked]
        (call,) = [call for choice in deltas for call in choice.delta.tool_calls or []]
        finish = deltas[-1].finish_reason
        assert call.index == 0
    else:
        (call,) = asked.choices[0].message.tool_calls
        finish = asked.choices[0].finish_reason
        assert asked.choices[0].message.content is None
        again = [*MESSAGES, asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        said = ask(tooled, messages=again, tools=[TOOL])
        assert call.id and said.usage.prompt_tokens > asked.usage.prompt_tokens
        assert said.system_fingerprint.split("-")[1] == "template"
    assert finish == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"town": "Ulm"})


NAMED = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {"mode": "required", "tools": [NAMED]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED, {"type": "allowed_tools", "allowed_tools": ALLOWED}])
def test_a_forced_call_is_exactly_one_that_fits_its_schema(tooled, choice, stream):
    schema = {**TOOL["function"]["parameters"], "properties": {"town": {"enum": ["Ulm", "Rome"]}}}
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": schema | {"additionalProperties": False}},
    }
    asked = {"tools": [tool], "tool_choice": choice, "max_tokens": 200, "temperature": 1, "seed": 3}
    reply = ask(tooled, **asked, parallel_tool_calls=False, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    messages = [c.delta if stream else c.message for c in choices]
    (call,) = [call for message in messages for call in message.tool_calls or []]
    assert choices[-1].finish_reason == "tool_calls" and not any(message.content for message in messages)
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["town"] in ("Ulm", "Rome")
    assert re.fullmatch("[A-Za-z0-9]{9}", call.id)


def test_a_forced_call_names_nothing_beyond_its_schema(tooled):
    """As clients' libraries write schemas: with definitions apart, and without a word of further properties."""
    town = {"type": "object", "properties": {"name": {"enum": ["Ulm"]}}, "required": ["name"]}
    schema = {"properties": {"to": {"$ref": "#/$defs/T"}}, "required": ["to"], "$defs": {"T": town}}
    tool = {"type": "function", "function": {"name": "go", "parameters": schema}}
    reply = ask(tooled, tools=[tool], tool_choice="required", max_tokens=200, temperature=1)
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"to": {"name": "Ulm"}}


def test_a_reply_is_taken_as_the_next_turn(client):
    said = ask(client).choices[0].message.model_dump()
    assert said["refusal"] is None and "annotations" in said
    clients = {
        "reasoning_details": [],
        "provider_specific_fields": {"x": 1},
        "parsed": {"a": 1},
        "thinking_blocks": None,
    }
    again = [
        *MESSAGES,
        said | clients,
        {"role": "user", "content": [{"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}]},
    ]
    assert ask(client, messages=again).choices[0].message.content is not None
    empty = {
        "role": "assistant",
        "content": None,
        "tool_calls": [],
        "function_call": None,
        "audio": None,
        "refusal": "",
    }
    assert ask(client, messages=[*MESSAGES, empty, MESSAGES[-1]]).usage.prompt_tokens > 0
    assert ask(client, messages=[*MESSAGES, {**empty, "content": []}, MESSAGES[-1]]).usage.prompt_tokens > 0


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "I will not."},
        {"content": "", "refusal": "I will not.", "id": "msg_1", "reasoning_details": [{"text": "a"}]},
        {"content": [{"type": "refusal", "refusal": "I will not."}]},
        {"content": [{"type": "text", "text": "I will "}, {"type": "refusal", "refusal": "not."}]},
    ],
)
def test_a_refusal_that_comes_back_is_what_the_model_said(client, said):
    def counted(turn):
        return ask(client, messages=[*MESSAGES, turn, MESSAGES[-1]]).usage.prompt_tokens

    as_text = {"role": "assistant", "content": "I will not."}
    assert counted({"role": "assistant", **said}) == counted(as_text) > counted({**as_text, "content": ""})


def test_fields_that_change_nothing_change_nothing(client):
    plain = ask(client).choices[0].message.content
    harmless = {
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "top_logprobs": 0,
        "functions": [],
        "prediction": None,
        "a field of another service": None,
        "another": {},
    }
    more = {"verbosity": "low", "safety_identifier": "x", "modalities": ["text"], "enable_thinking": False}
    assert ask(client, extra_body=harmless | more).choices[0].message.content == plain
    assert ask(client, temperature=1, top_p=0, extra_body={"top_k": -1}).choices[0].message.content == plain
    assert ask(client, max_tokens=-1, extra_body={"grammar": 'root ::= "yes"'}).choices[0].message.content == "yes"
    twice = [ask(client, temperature=2, seed=-1, max_tokens=30).choices[0].message.content for _ in range(2)]
    assert twice[0] != twice[1]
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    reply = ask(client, max_tokens=60, response_format={"type": "json_object", "schema": schema})
    assert json.loads(reply.choices[0].message.content) == {"a": 1}


def test_every_generated_token_has_a_logprob_the_end_too(client, runtime):
    """lm-eval leaves the last entry out, whatever it is."""
    end = min(runtime.end_token_ids)
    body = {"model": MODEL, "max_tokens": 1, "temperature": 0, "logit_bias": {str(end): 100}}
    ids = runtime.encode("The quick brown fox")
    reply = client.completions.create(prompt=[ids], echo=True, logprobs=1, **body)
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens == 1
    assert len(reply.choices[0].logprobs.token_logprobs) == len(ids) + 1
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, **body)
    assert len(chat.choices[0].logprobs.content) == 1 and chat.choices[0].logprobs.content[0].bytes == []


def test_a_stop_that_is_one_special_token_stops_there(client, runtime):
    name, token = next((n, i) for n, i in runtime.special_tokens.items() if i not in runtime.end_token_ids)
    reply = ask(client, logit_bias={str(token): 100}, stop=[name], max_tokens=5)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("stop", 1)


def test_tools_that_the_model_would_not_see_are_refused(client):
    for asked in ({}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
            ask(client, tools=[TOOL], **asked)
        assert (caught.value.param, caught.value.code) == ("tools", "tools_not_supported")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(openai.BadRequestError, match="does not appear"):
        ask(client, messages=[*MESSAGES, turn, {"role": "tool", "tool_call_id": "1", "content": "rain"}])


def test_without_a_call_tools_change_nothing_in_the_shape(client):
    reply = ask(client, tools=[TOOL], tool_choice="none")
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content == ask(client).choices[0].message.content


def test_concurrent_requests_give_what_each_gives_alone(client, server):
    prompts = [f"Number {i}: the fox and the dog" for i in range(8)]
    alone = [ask(client, messages=[{"role": "user", "content": p}]).choices[0].message.content for p in prompts]
    assert len(set(alone)) > 1

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as asynchronous:
            return await asyncio.gather(
                *(ask(asynchronous, messages=[{"role": "user", "content": p}]) for p in prompts)
            )

    together = [reply.choices[0].message.content for reply in asyncio.run(everyone())]
    assert together == alone


def long_stream(client, runtime, seed=1):
    """A stream that does not end by itself within the test."""
    return ask(client, max_tokens=400, stream=True, temperature=1, seed=seed, logit_bias=no_end(runtime))


@pytest.fixture
def slow(tiny_folder, tiny_patch):
    """A server whose endless replies take eight seconds."""
    with running(lambda: Paced(load(tiny_folder, tiny_patch))) as running_server:
        yield running_server


def test_a_cancelled_stream_frees_its_sequence_at_once(slow, runtime):
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key=KEY, max_retries=0) as client:
        stream = long_stream(client, runtime)
        for _ in range(3):
            next(iter(stream))
        assert slow.service.scheduler.num_running == 1
        stream.close()
        slow.wait_until_idle()
        counts = slow.counts()
        assert (counts["generations_cancelled"], counts["generations_finished"]) == (1, 0)
        assert ask(client).choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"extra_body": {"n_keep": 0}}, "n_keep", "unknown field"),
        ({"extra_body": {"n_discard": -1}}, "n_discard", "unknown field"),
        ({"extra_body": {"id_slot": 0}}, "id_slot", "unknown field"),
        ({"extra_body": {"cache_prompt": False}}, "cache_prompt", "unknown field"),
        ({"extra_body": {"kv_seed": 1}}, "kv_seed", "unknown field"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'wizard'"),
        ({"messages": [{"role": "user", "content": "x", "slot": 1}]}, "messages.0.slot", "unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "text",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 2000}]},
            "messages",
            "expected a prompt of at most 502 tokens",
        ),
        ({"n": 9}, "n", "at most 8"),
        ({"temperature": 3}, "temperature", "at most 2"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": "required"}, "tool_choice", "found none"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "rm"}}},
            "tool_choice.function.name",
            "expected one of get_weather, found 'rm'",
        ),
        ({"extra_body": {"prompt_cache_key": "x"}}, "prompt_cache_key", "unknown field"),
        ({"extra_body": {"chat_template_kwargs": {"tools": "x"}}}, "chat_template_kwargs.tools", "unknown field"),
        ({"extra_body": {"continue_final_message": True}}, None, "a last message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages.0.audio", "unknown"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "functions", "expected null"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "expected"),
        ({"logit_bias": {"99999": 1}}, None, "99999"),
        ({"extra_body": {"grammar": "root ::= ("}}, None, "grammar"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "same value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_object'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_used_is_named(client, fields, param, words, stream):
    options = {} if "stream_options" in fields else {"stream": stream}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields, **options)
    assert caught.value.param == param
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_empty_prompts_are_refused(client):
    for prompt in ("", [], [[]], ["ok", ""]):
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.completions.create(model=MODEL, prompt=prompt)


def test_token_ids_outside_the_vocabulary_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model=MODEL, prompt=[1, 512])


def test_wrong_key_and_wrong_model(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="ep-another-key", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(stranger)
        assert KEY not in str(refused.value)


def test_the_context_filled_to_the_brim_ends_with_length(client, runtime):
    reply = ask(client, max_tokens=openai.omit, logit_bias=no_end(runtime))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == runtime.context_length + 1
    start = time.monotonic()
    assert ask(client).choices[0].message.content == runtime.chat(MESSAGES, Sampling(max_new_tokens=12, temperature=0))
    assert time.monotonic() - start < 30
