"""The published OpenAPI document is true: schemathesis makes requests from it, good and bad ones, and reads the replies."""

import functools
import json
import re
from collections import Counter

import jsonschema_rs
import pydantic
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from edgepatch.runtimes import load_runtime
from edgepatch.server.app import routes
from edgepatch.server.refusals import Refusal
from edgepatch.server.schemas import openapi
from edgepatch.server.schemas.limits import MAX_BIASES
from edgepatch.server.schemas.requests import ChatCompletionRequest, CompletionRequest
from edgepatch.server.schemas.response_requests import ResponseRequest
from edgepatch.server.schemas.validation import checked
from kit.amounts import examples
from kit.serving import KEY, MODEL, running

EXAMPLES = examples(16, 40)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
GETS = ("/health", "/openapi.json", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/patches")


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_patch):
    with running(lambda: load_runtime(tiny_folder, tiny_patch, num_sequences=4)) as running_server:
        yield running_server


def operation(path):
    return next(iter(schemathesis.openapi.from_dict(openapi.document()).include(path=path).get_all_operations())).ok()


def send_examples(server, path, mode, count, extra_checks=(), prepare=lambda body: body):
    """Statuses of the replies to requests made from the document, each of which is checked against it."""
    statuses = Counter()
    quiet = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=count, phases=[Phase.generate], **quiet)
    @given(case=operation(path).as_strategy(generation_mode=mode))
    def send(case):
        case.body = prepare(case.body)
        reply = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        case.validate_response(reply, checks=[*CHECKS, *extra_checks])
        statuses[reply.status_code] += 1

    send()
    return statuses


def served(body):
    """The request, for a few tokens of the model that is served; it takes the same way through the server."""
    if isinstance(body, dict):
        limits = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        limit = limits[2] if "input" in body else limits[1] if body.get(limits[1]) else limits[0]
        return {**{name: value for name, value in body.items() if name not in limits}, "model": MODEL, limit: 3}
    return body


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_the_document_allows(server, path):
    statuses = send_examples(server, path, GenerationMode.POSITIVE, EXAMPLES, prepare=served)
    assert set(statuses) <= {200, 400}
    assert statuses[200] >= EXAMPLES // 10, statuses


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_the_document_forbids(server, path):
    statuses = send_examples(server, path, GenerationMode.NEGATIVE, EXAMPLES, [checks.negative_data_rejection])
    assert set(statuses) <= {400, 401, 404, 415}, statuses
    assert statuses[400] >= EXAMPLES // 4, statuses


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read(server, path):
    statuses = send_examples(server, path, GenerationMode.POSITIVE, 5)
    assert set(statuses) <= ({404, 405} if "{" in path else {200})


def test_the_document_is_served_without_a_key_and_names_no_place_in_the_cache(server):
    with server.client(headers={"Authorization": ""}) as http:
        document = http.get("/openapi.json").json()
    assert document == openapi.document()
    assert document["openapi"].startswith("3.1")
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponseRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        assert len(fields) > 15
        assert not [f for f in fields if re.search("slot|cache|keep|discard|kv|position|patch", f)]


def test_the_document_is_openapi_and_describes_the_paths_that_there_are(server):
    document = openapi.document()
    OPENAPI_31_VALIDATOR.validate(document)
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    answered = {
        (route.path.replace(":path", ""), method) for route in routes(server.service) for method in route.methods
    }
    assert described == answered - {(path, "HEAD") for path, _ in answered}
    schemas = document["components"]["schemas"]
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert referred <= set(schemas)
    for name, schema in schemas.items():
        validator(name)  # raises where it is no schema
        assert schema["additionalProperties"] in (False, {"enum": [None, "", [], {}]}), name


@functools.cache
def validator(name):
    """Of a schema of the document that stands alone."""
    return jsonschema_rs.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions()})


@functools.cache
def definitions():
    return openapi.json_schemas("#/$defs/{model}")


CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
CHAT_VALUES = [
    CHAT,
    {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stop": None},
    {"model": "m", "messages": [{"role": "user", "content": []}]},
    {"model": "m", "messages": [{"role": "assistant", "content": None, "tool_calls": None}], "n": 1.0},
    {"model": "m", "messages": [{"role": "assistant", "refusal": "no"}]},
    {"model": "m", "messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
    {"model": "m", "messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
    {"model": "m", "messages": [{"role": "assistant", "content": []}]},
    {"model": "m", "messages": [{"role": "tool", "content": "x"}]},
    {"model": "m", "messages": [{"role": "tool", "content": "x", "tool_call_id": "c", "tool_calls": []}]},
    {"model": "m", "messages": [{"role": "developer", "content": "x", "name": None}]},
    {"model": "m", "messages": [{"role": ["user"], "content": "x"}]},
    {**CHAT, "temperature": True},
    {**CHAT, "temperature": "1"},
    {**CHAT, "temperature": 2},
    {**CHAT, "n": "1"},
    {**CHAT, "n": 1.5},
    {**CHAT, "seed": 2**63},
    {**CHAT, "stream": 1},
    {**CHAT, "top_p": 0},
    {**CHAT, "stop": ["a"] * 17},
    {**CHAT, "stop": []},
    {**CHAT, "stop": ""},
    {**CHAT, "logit_bias": {"1": 1}},
    {**CHAT, "logit_bias": {"1": 1, "-1": 1}},
    {**CHAT, "logit_bias": {"1": "1"}},
    {**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]},
    {**CHAT, "tools": [{"type": "function", "function": {"name": "a", "parameters": {"any": [1]}}}]},
    {**CHAT, "tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
    {**CHAT, "response_format": {"type": "json_schema"}},
    {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
    {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "definition": {}}}},
    {**CHAT, "response_format": {"type": "text", "json_schema": {}}},
    {**CHAT, "tool_choice": None},
    {**CHAT, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    {**CHAT, "functions": []},
    {**CHAT, "functions": [1]},
    {**CHAT, "unknown": None},
    {**CHAT, "unknown": 0},
    {"model": "m", "messages": {}},
    {"model": "", "messages": []},
    {},
    [],
]
INPUTS = [
    "",
    "x",
    None,
    [],
    [{"role": "user", "content": "x"}],
    [{"type": None, "role": "user", "content": "x"}],
    [{"type": "", "role": "user", "content": "x"}],
    [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]}],
    [{"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]}],
    [{"type": "message", "role": "tool", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": None}],
    [{"type": "function_call", "name": "f", "arguments": "{}"}],
    [{"type": "function_call_output", "call_id": "c", "output": "x"}],
    [{"type": "function_call_output", "call_id": "c", "output": []}],
    [{"type": "reasoning", "summary": [], "content": None}],
    [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}],
    [{"type": "reasoning", "encrypted_content": "x"}],
    [{"type": "item_reference", "id": "x"}],
]
PROMPTS = [
    "",
    "x",
    [],
    ["x"],
    ["x", ""],
    ["x", 1],
    [1, 2.0],
    [1, -1],
    [2**31],
    [[1], [2]],
    [[]],
    [[1], ["x"]],
    None,
    {},
]


@pytest.mark.parametrize("value", CHAT_VALUES, ids=json.dumps)
def test_what_is_taken_is_what_the_document_allows(value):
    assert is_taken(ChatCompletionRequest, value) == validator("ChatCompletionRequest").is_valid(value)


@pytest.mark.parametrize("prompt", PROMPTS, ids=json.dumps)
def test_prompts_that_are_taken_are_those_that_the_document_allows(prompt):
    value = {"model": "m", "prompt": prompt}
    assert is_taken(CompletionRequest, value) == validator("CompletionRequest").is_valid(value)


@pytest.mark.parametrize("value", INPUTS, ids=json.dumps)
def test_items_that_are_taken_are_those_that_the_document_allows(value):
    request = {"model": "m", "input": value}
    assert is_taken(ResponseRequest, request) == validator("ResponseRequest").is_valid(request)


def is_taken(model, value):
    try:
        checked(model, value)
    except Refusal:
        return False
    return True


MANY = 20_000


@pytest.mark.parametrize(
    ("model", "value", "param"),
    [
        (ChatCompletionRequest, {**CHAT, **{f"x{i}": 0 for i in range(MANY)}}, "x0"),
        (ChatCompletionRequest, {**CHAT, "logit_bias": {f"x{i}": "" for i in range(MANY)}}, "logit_bias"),
        (ChatCompletionRequest, {**CHAT, "logit_bias": {f"x{i}": "" for i in range(MAX_BIASES)}}, "logit_bias.x0"),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "x"}] * 4096}, "messages.0.role"),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "user", "content": [{}] * 1024}] * 20}, None),
        (ChatCompletionRequest, {**CHAT, "messages": [{f"x{i}": 0 for i in range(MANY)}] * 2}, "messages.0.role"),
        (CompletionRequest, {"model": "m", "prompt": [0, *["x"] * MANY]}, "prompt.1"),
        (CompletionRequest, {"model": "m", "prompt": [["x"] * MANY] * 64}, "prompt.0.0"),
    ],
)
def test_a_request_that_is_wrong_throughout_is_no_more_work(model, value, param):
    """Whatever a client sends, problems are not gathered by the thousand, and the first one is named."""
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate(value)
    assert caught.value.error_count() <= 2 * MAX_BIASES
    with pytest.raises(Refusal) as refused:
        checked(model, value)
    assert refused.value.param == (param or "messages.0.content.0.type")


PARAMETERS = "tools.0.function.parameters"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"\ud800": 1}, "\\ud800"),
        ({"x" * 10_000: 1}, "x" * 60 + "..."),
        ({"user": "\ud800"}, "user"),
        ({"tool_choice": "\ud800"}, "tool_choice"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "\udc00": 1}]}, "messages.0.\\udc00"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}]}, PARAMETERS),
        ({"response_format": {"type": "json_object", "schema": {"a": ["\ud800"]}}}, "response_format.schema"),
        ({"response_format": {"type": "\ud800"}}, "response_format.type"),
    ],
)
def test_names_and_values_of_any_kind_are_named(server, fields, param):
    with server.client() as http:
        body = json.dumps({**CHAT, **fields})
        reply = http.post(POSTS[0], content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_streamed_chunks_are_of_their_schema(server):
    body = {"model": MODEL, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    chat = {**body, "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    text = {**body, "prompt": "x", "logprobs": 2, "echo": True}
    for path, request, name in (POSTS[0], chat, "ChatCompletionChunk"), (POSTS[1], text, "CompletionChunk"):
        with server.client() as http:
            events = [line.removeprefix("data: ") for line in http.post(path, json=request).text.splitlines() if line]
        assert events[-1] == "[DONE]" and len(events) > 4
        for event in events[:-1]:
            validator(name).validate(json.loads(event))


def test_events_of_responses_are_of_their_schema(server):
    body = {"model": MODEL, "max_output_tokens": 5, "input": "x", "top_logprobs": 2}
    with server.client() as http:
        validator("Response").validate(http.post(POSTS[2], json=body).json())
        lines = http.post(POSTS[2], json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [f"event: {event['type']}" for event in events] == [line for line in lines if line.startswith("event: ")]
    assert len(events) > 8
    for event in events:
        validator("ResponseEvent").validate(event)
