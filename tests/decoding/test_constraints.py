"""Constraints on a random model, the hardest case: it has no wish to write JSON."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.decoding.constraints import MAX_DEFINITION, Constraint, ConstraintEngine
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.runtimes import load_runtime

PROMPT = "The quick brown fox"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog", "é🙂"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}


def valid(value):
    return (
        {"name", "kind", "age"} <= set(value) <= {"name", "kind", "age", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and value["kind"] in ("cat", "dog", "é🙂")
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value.get("tags", [])) <= 3
        and all(type(tag) is bool for tag in value.get("tags", []))
    )


@pytest.fixture(scope="module")
def runtime(tiny_folder, tiny_patch):
    with load_runtime(tiny_folder, tiny_patch) as loaded:
        yield loaded


def test_a_schema_holds_in_every_draw(runtime):
    sampling = Sampling(200, rng_seed=1, constraint=Constraint("json_schema", json.dumps(SCHEMA)))
    texts = runtime.generate_many(PROMPT, sampling, 50)
    assert all(valid(json.loads(text)) for text in texts)
    assert len(set(texts)) > 40
    free = runtime.generate_many(PROMPT, replace(sampling, max_new_tokens=20, constraint=None), 3)
    assert not any(text.lstrip().startswith("{") for text in free), "without the constraint the model writes no JSON"


def test_llama_cpp_keeps_to_the_same_constraints(tiny_ggufs, tiny_patch, runtime):
    """Token for token what PyTorch draws: the mask comes from the library's own vocabulary."""
    options = {"kv_type": "f32", "flash_attention": False, "num_threads": 1}
    with load_runtime(tiny_ggufs["F32"], tiny_patch, **options) as other:
        for constraint in (Constraint("json_schema", json.dumps(SCHEMA)), Constraint("regex", "(é|🙂|[a-z ]){5,9}")):
            sampling = Sampling(200, rng_seed=2, constraint=constraint)
            assert other.generate_many(PROMPT, sampling, 4) == runtime.generate_many(PROMPT, sampling, 4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1, "min_p": 0.5}])
def test_a_complete_constraint_ends_the_reply(runtime, options):
    sampling = Sampling(40, rng_seed=3, constraint=Constraint("regex", "[a-c]{3}é(x|yz)"), **options)
    pieces = list(runtime.stream(PROMPT, sampling))
    assert re.fullmatch("[a-c]{3}é(x|yz)", "".join(p.text for p in pieces))
    assert [p.finish_reason for p in pieces] == [""] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1].token_id not in runtime.end_token_ids, "no token is spent on the end"


def test_a_model_may_end_where_the_constraint_may(runtime):
    sampling = Sampling(
        60, rng_seed=1, constraint=Constraint("regex", "a{2,}"), logit_bias=dict.fromkeys(runtime.end_token_ids, 20)
    )
    pieces = list(runtime.stream(PROMPT, sampling))
    assert re.fullmatch("a{2,}", "".join(p.text for p in pieces))
    assert pieces[-1].finish_reason == "stop" and pieces[-1].token_id in runtime.end_token_ids


def test_a_grammar_in_llama_cpp_notation(runtime):
    grammar = 'root ::= item ("," ws item)*\nitem ::= [0-9]{2} | "none"\nws ::= " "?'
    form = r"(\d\d|none)(, ?(\d\d|none))*"
    for seed in range(5):
        sampling = Sampling(12, rng_seed=seed, constraint=Constraint("grammar", grammar))
        pieces = list(runtime.stream(PROMPT, sampling))
        text = "".join(p.text for p in pieces)
        assert re.fullmatch(form, text) or pieces[-1].finish_reason == "length"
    endless = Sampling(12, rng_seed=1, constraint=Constraint("grammar", 'root ::= ("ab" | "cd")* "!" [z]'))
    pieces = list(runtime.stream(PROMPT, replace(endless, logit_bias=dict.fromkeys(runtime.encode("!"), -100))))
    text = "".join(p.text for p in pieces)
    assert (len(pieces), pieces[-1].finish_reason) == (12, "length")
    assert re.fullmatch("[abcd]*", text) and text


def test_any_json_object(runtime):
    texts = runtime.generate_many(PROMPT, Sampling(100, rng_seed=1, constraint=Constraint("json_object")), 10)
    complete = [text for text in texts if text.rstrip().endswith("}")]
    assert all(text.lstrip().startswith("{") for text in texts)
    whole = [text for text in complete if _parses(text)]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)


def _parses(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_stop_string_and_a_constraint_together(runtime):
    sampling = Sampling(60, rng_seed=1, constraint=Constraint("regex", "[ab]{8}-[cd]{8}"), stop=("-",))
    pieces = list(runtime.stream(PROMPT, sampling))
    assert re.fullmatch("[ab]{8}", "".join(p.text for p in pieces)) and pieces[-1].finish_reason == "stop"


def test_a_dead_end_is_an_error(runtime):
    for constraint in (Constraint("grammar", "root ::= root"), Constraint("regex", "[a-z]+")):
        ban = {i: float("-inf") for i in range(runtime.spec.vocab_size)} if constraint.kind == "regex" else {}
        with pytest.raises(EdgepatchError):
            runtime.generate(PROMPT, Sampling(10, rng_seed=1, constraint=constraint, logit_bias=ban))
    assert runtime.generate(PROMPT, Sampling(3, rng_seed=1))


@pytest.mark.parametrize(
    ("kind", "definition", "message"),
    [
        ("xml", "a", "expected one of json_schema"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[]", "is an object, found list"),
        ("json_schema", "[" * 20000, "not JSON"),
        ("json_schema", "", "takes a definition"),
        ("json_object", "{}", "takes no definition"),
        ("regex", "a" * (MAX_DEFINITION + 1), "at most"),
        ("grammar", b"root", "expected text"),
    ],
)
def test_definitions_are_checked_when_given(kind, definition, message):
    with pytest.raises(InputError, match=message):
        Constraint(kind, definition)


@pytest.mark.parametrize(
    ("kind", "definition", "message"),
    [
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("json_schema", '{"not": {"type": "string"}}', "not"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "json_schema"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", "root ::= missing", "missing"),
        ("grammar", "root := x", "Expected ::="),
        ("grammar", "root ::= " + "(" * 5000, "recursion"),
        ("grammar", 'start: "lark"', "Expected"),
    ],
)
def test_what_the_library_cannot_read_is_named(runtime, kind, definition, message):
    with pytest.raises(InputError, match=message):
        runtime.generate(PROMPT, Sampling(3, constraint=Constraint(kind, definition)))


def test_a_constraint_cannot_be_ignored_at_its_end():
    with pytest.raises(InputError, match="ignore_end_tokens"):
        Sampling(ignore_end_tokens=True, constraint=Constraint("json_object"))


def test_the_engine_is_built_once(runtime):
    sampling = Sampling(5, rng_seed=1, constraint=Constraint("regex", "[a-z]+"))
    runtime.generate(PROMPT, sampling)
    engine = runtime.replies._engine
    runtime.generate_many(PROMPT, replace(sampling, constraint=Constraint("regex", "[0-9]+")), 2)
    assert engine is not None and runtime.replies._engine is engine


@pytest.mark.parametrize("ends", [frozenset(), frozenset({256}), frozenset({256, 257, 300})])
def test_vocabularies_with_no_one_and_several_ends(ends):
    engine = ConstraintEngine([*(bytes([i]) for i in range(256)), b"", b"<end>", b"ab"], 301, ends)
    matcher = engine.matcher(Constraint("regex", "(ab|c)+"))
    assert matcher.allowed().shape == (301,)
    assert set(np.flatnonzero(matcher.allowed())) == {ord("a"), ord("c"), 258}
    matcher.accept(258)
    assert set(np.flatnonzero(matcher.allowed())) == {ord("a"), ord("c"), 258} | ends, "special tokens have no text"
    other = engine.matcher(Constraint("regex", "(ab|c)+"))
    assert set(np.flatnonzero(other.allowed())) == {ord("a"), ord("c"), 258}, "replies do not share their state"


COSTLY = {
    "a large multiple": Constraint("json_schema", '{"type": "integer", "multipleOf": 999983}'),
    "patterns beside each other": Constraint(
        "json_schema", json.dumps({"allOf": [{"type": "string", "pattern": f"^.*{c}.{{24}}$"} for c in "abcdefgh"]})
    ),
    "a long grammar": Constraint(
        "grammar",
        "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1} a{i + 1} | [a-z]*\n" for i in range(2000)) + "a2000 ::= []",
    ),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_what_costs_too_much_is_refused_in_a_child(runtime, kind):
    """Its computing time and memory are the child's; asked again, the refusal is remembered."""
    engine = runtime.replies.engine(runtime.end_token_ids)
    before = time.process_time()
    for _ in range(2):
        with pytest.raises(InputError, match="constraint"):
            engine.compile(COSTLY[kind])
    assert time.process_time() - before < 1
    assert engine.compile(Constraint("json_schema", json.dumps(SCHEMA)))
