"""The published OpenAPI document is true: schemathesis makes requests from it, good and bad ones, and reads the replies."""

import json
import re
from collections import Counter

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from edgepatch.runtimes import load_runtime
from edgepatch.server import openapi, schemas
from edgepatch.server.validation import first_problem
from kit.serving import KEY, MODEL, running

EXAMPLES = 40
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
POSTS = ("/v1/chat/completions", "/v1/completions")
GETS = ("/health", "/openapi.json", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/patches")


@pytest.fixture(scope="module")
def server(tiny_folder, tiny_patch):
    with running(lambda: load_runtime(tiny_folder, tiny_patch, num_sequences=4)) as found:
        yield found


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
        limit = {"max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens": 3}
        rest = {name: value for name, value in body.items() if name not in ("max_tokens", "max_completion_tokens")}
        return {**rest, "model": MODEL, **limit}
    return body


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_the_document_allows(server, path):
    statuses = send_examples(server, path, GenerationMode.POSITIVE, EXAMPLES, prepare=served)
    assert set(statuses) <= {200, 400}
    assert statuses[200] >= EXAMPLES // 10, statuses


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_the_document_forbids(server, path):
    statuses = send_examples(server, path, GenerationMode.NEGATIVE, 2 * EXAMPLES, [checks.negative_data_rejection])
    assert set(statuses) <= {400, 401, 404, 415}, statuses
    assert statuses[400] >= EXAMPLES // 2, statuses


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read(server, path):
    statuses = send_examples(server, path, GenerationMode.POSITIVE, 5)
    assert set(statuses) <= ({404, 405} if "{" in path else {200})


def test_the_document_is_served_without_a_key_and_names_no_place_in_the_cache(server):
    with server.client(headers={"Authorization": ""}) as http:
        document = http.get("/openapi.json").json()
    assert document == openapi.document()
    assert document["openapi"].startswith("3.1")
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        assert len(fields) > 15
        assert not [f for f in fields if re.search("slot|cache|keep|discard|kv|position|patch", f)]


VALUES = [
    {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stop": None},
    {"model": "m", "messages": [{"role": "assistant", "content": None, "tool_calls": None}], "n": 1.0},
    {"model": "m", "messages": [{"role": "tool", "content": "x"}]},
    {"model": "m", "messages": [{"role": "tool", "content": "x", "tool_call_id": "c", "tool_calls": []}]},
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": True},
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "top_p": 0},
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": ["a"] * 17},
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"1": 1, "-1": 1}},
    {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "a b"}}],
    },
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
    {"model": "m", "messages": {}},
    {"model": "", "messages": []},
    {},
    [],
]


@pytest.mark.parametrize("value", VALUES, ids=json.dumps)
def test_our_reading_of_the_schema_is_json_schemas(value):
    assert (first_problem(value, schemas.CHAT_REQUEST) is None) == jsonschema_rs.is_valid(schemas.CHAT_REQUEST, value)


def test_streamed_chunks_are_of_their_schema(server):
    body = {"model": MODEL, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    chat = {**body, "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    text = {**body, "prompt": "x", "logprobs": 2, "echo": True}
    for path, request, schema in (POSTS[0], chat, schemas.CHAT_CHUNK), (POSTS[1], text, schemas.COMPLETION_CHUNK):
        with server.client() as http:
            events = [line.removeprefix("data: ") for line in http.post(path, json=request).text.splitlines() if line]
        assert events[-1] == "[DONE]" and len(events) > 4
        for event in events[:-1]:
            jsonschema_rs.validate(schema, json.loads(event))
