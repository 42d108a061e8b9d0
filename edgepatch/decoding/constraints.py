"""Replies that keep to a grammar: JSON, a JSON schema, a regular expression or a GBNF grammar, enforced token by token.

``Constraint`` is the plain value that a caller gives; ``ConstraintEngine`` knows one model's vocabulary and turns constraints into
matchers, which the llguidance library drives. A matcher says before each draw which tokens can go on.

A definition is a program of whoever sends it: twenty characters can ask for minutes of computing and gigabytes. So a child compiles it first,
with limits of time and memory, and what it cannot do there is refused; the library's own limits bound each step that follows.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.json_schemas import closed
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.processes.kept import KeptChild

ConstraintKind = Literal["json_schema", "json_object", "grammar", "regex", "lark"]
KINDS: tuple[str, ...] = get_args(ConstraintKind)

MAX_DEFINITION = 64 * 1024
"""Characters of a definition: llguidance bounds its own work, but not the text that it is given."""

# At most so much between the parts of JSON: a model that likes blanks would else never come to the end.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ ]|\n[ ]{0,16}"}

KEPT_MATCHERS = 8
COMPILE_DEADLINE_S = 5.0
"""Of computing time in a child, so that a busy machine refuses nothing. Schemas take 0.2 s; a chain of 2,000 rules, the longest that a
definition holds, takes 2.9 s of a core that others share, and what is made to cost takes minutes."""

QUICK_DEADLINE_S = 0.5
"""What most need no more than. Who has others waiting asks with this one first, so that nobody waits behind what takes long."""

COMPILE_MEMORY_BYTES = 256 * 2**20
LIMITS = {"max_lexer_states": 20_000, "max_grammar_size": 100_000}
"""Of llguidance, below its own: a state takes up to 2 kB, and 8 compiled constraints are kept."""

KEPT_REFUSALS = 64
HINT = "simplify it: fewer alternatives and repetitions, no large multipleOf, no long patterns beside each other"

_children = {
    deadline_s: KeptChild("edgepatch.decoding.constraints:compile_here", COMPILE_MEMORY_BYTES)
    for deadline_s in (QUICK_DEADLINE_S, COMPILE_DEADLINE_S)
}
"""Seconds of computing -> the child that has them: who waits for one waits for none of the other's work."""


@dataclass(frozen=True)
class Constraint:
    """What a reply must look like.

    Attributes:
        kind: "json_schema", "json_object" (any JSON object), "grammar" (GBNF, as llama.cpp writes it), "regex" (Rust's
            syntax, matched against the whole reply) or "lark" (llguidance's own syntax, in which special tokens have a place).
        definition: the schema, grammar or expression; empty for "json_object".

    Raises:
        InputError: the kind is unknown, or the definition is empty, too long or, as a schema, no JSON object.
    """

    kind: ConstraintKind
    definition: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"constraint: kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if not isinstance(self.definition, str):
            raise InputError(f"constraint: definition: expected text, found {type(self.definition).__name__}")
        if len(self.definition) > MAX_DEFINITION:
            raise InputError(
                f"constraint: a definition of {len(self.definition)} characters, at most {MAX_DEFINITION} are read"
            )
        if any("\ud800" <= character <= "\udfff" for character in self.definition):
            raise InputError("constraint: definition: expected valid Unicode, found half a surrogate pair")
        if bool(self.definition.strip()) == (self.kind == "json_object"):
            expected = "no definition" if self.kind == "json_object" else "a definition"
            raise InputError(f"constraint: {self.kind} takes {expected}")
        if self.kind == "json_schema":
            _require_schema(self.definition)


def _require_schema(definition: str) -> None:
    try:
        schema = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise InputError(f"constraint: the JSON schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InputError(f"constraint: a JSON schema is an object, found {type(schema).__name__}")


class ConstraintMatcher:
    """How far one reply has come in its constraint.

    Args:
        matcher: llguidance's, of this reply alone.
        vocab_size: V.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """(V,) true for each token that can come next, end tokens included where the reply may end.

        Raises:
            InputError: the constraint grew too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Goes on by a token that ``allowed`` holds."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the reply satisfies the constraint and nothing can be added to it."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the constraint cannot be followed: {_short(self._matcher.get_error())}", hint=HINT)


class CompiledConstraint:
    """A constraint over the vocabulary of one model, for any number of replies.

    Args:
        matcher: llguidance's, at its start.
        vocab_size: V.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def matcher(self) -> ConstraintMatcher:
        """A matcher for one reply."""
        return ConstraintMatcher(self._matcher.deep_copy(), self._vocab_size)


class SlowConstraintError(Exception):
    """A constraint that takes longer than ``QUICK_DEADLINE_S``; it may still compile within ``COMPILE_DEADLINE_S``."""


class ConstraintEngine:
    """Constraints over the vocabulary of one model; building it reads every token, so a runtime keeps one.

    Args:
        token_bytes: at most V byte strings, empty for tokens that have no text: they are allowed nowhere.
        vocab_size: V.
        end_token_ids: the tokens that end a reply.

    Raises:
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int, end_token_ids: frozenset[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise MissingExtraError("llguidance", "gguf") from None
        self._vocab_size = vocab_size
        # A model without an end token gets one that it cannot draw, because the library wants one.
        ends = sorted(end_token_ids) or [vocab_size]
        tokens = [b"" if i in end_token_ids else text for i, text in enumerate(token_bytes)]
        tokens += [b""] * (max(vocab_size, ends[-1] + 1) - len(tokens))
        vocabulary = _Vocabulary(tokens, ends[0])
        plain = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), n_vocab=len(tokens), eos_token=ends, slices=[]
        )
        vocabulary.tokenize = plain.greedy_tokenize
        self._tokenizer = plain.with_slices(llguidance.LLTokenizer.general_slices())
        self._kept: OrderedDict[Constraint, CompiledConstraint] = OrderedDict()
        self._refused: OrderedDict[Constraint, InputError] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> ConstraintMatcher:
        """A matcher for one reply; errors as in ``compile``."""
        return self.compile(constraint).matcher()

    def compile(self, constraint: Constraint, is_quick: bool = False) -> CompiledConstraint:
        """Compiles a constraint, or finds it among the latest; any thread may call it.

        Args:
            constraint: what a reply must look like.
            is_quick: whether to give up after ``QUICK_DEADLINE_S``.

        Raises:
            InputError: the library cannot read the definition, does not know a part of it, or needs more time or memory for it
                than a request may have.
            SlowConstraintError: it takes longer than something quick may.
        """
        if (found := self.find(constraint)) is not None:
            return found
        try:
            _require_affordable(constraint, QUICK_DEADLINE_S if is_quick else COMPILE_DEADLINE_S)
            compiled = CompiledConstraint(_compiled(constraint, self._tokenizer), self._vocab_size)
        except InputError as error:
            with self._lock:
                _remember(self._refused, constraint, error, KEPT_REFUSALS)
            raise
        with self._lock:
            _remember(self._kept, constraint, compiled, KEPT_MATCHERS)
        return compiled

    def find(self, constraint: Constraint) -> CompiledConstraint | None:
        """A constraint among the latest, which nobody has to wait for.

        Raises:
            InputError: it was refused lately.
        """
        with self._lock:
            if constraint in self._refused:
                raise self._refused[constraint]
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
            return self._kept.get(constraint)


def _remember(kept: OrderedDict[Constraint, Any], constraint: Constraint, value: Any, most: int) -> None:
    kept[constraint] = value
    if len(kept) > most:
        kept.popitem(last=False)


def _compiled(constraint: Constraint, tokenizer: Any) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    try:
        matcher = LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
    except Exception as error:  # the converters to the library's own syntax raise Exception itself
        raise InputError(f"constraint: {constraint.kind}: {_short(str(error))}") from None
    if matcher.is_error():
        raise InputError(f"constraint: {constraint.kind}: {_short(matcher.get_error())}")
    return matcher


def _require_affordable(constraint: Constraint, deadline_s: float) -> None:
    """Refuses what a child cannot compile within its time and memory."""
    outcome = _children[deadline_s].ask({"kind": constraint.kind, "definition": constraint.definition}, deadline_s)
    if outcome.error is not None:
        raise outcome.error
    if outcome.is_late and deadline_s < COMPILE_DEADLINE_S:
        raise SlowConstraintError
    if outcome.failure:
        raise InputError(
            f"constraint: {constraint.kind}: expected one that compiles within {COMPILE_DEADLINE_S:g} s and "
            f"{COMPILE_MEMORY_BYTES // 2**20} MB, found one whose compilation {outcome.failure}",
            hint=HINT,
        )


# In the child.


def compile_here(request: dict[str, str]) -> None:
    """Compiles a constraint over the 256 bytes and takes its first step, without limits of time and memory of its own.

    Args:
        request: "kind" and "definition" of a constraint.

    Raises:
        InputError: it cannot be compiled.
    """
    kind: Any = request["kind"]
    matcher = _compiled(Constraint(kind, request["definition"]), _byte_tokenizer())
    ConstraintMatcher(matcher, 256).allowed()


@cache
def _byte_tokenizer() -> Any:
    import llguidance

    vocabulary = _Vocabulary([bytes([byte]) for byte in range(256)] + [b""], 256)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), n_vocab=257, eos_token=[256], slices=[])
    vocabulary.tokenize = tokenizer.greedy_tokenize
    return tokenizer


# The library's own syntax.


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own syntax."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if constraint.kind == "regex":
        return str(LLMatcher.grammar_from_regex(constraint.definition))
    if constraint.kind == "grammar":
        return str(LLMatcher.grammar_from_lark(gbnf_to_lark(constraint.definition)))
    if constraint.kind == "lark":
        return constraint.definition
    schema = json.dumps(closed(json.loads(constraint.definition or '{"type": "object"}')), ensure_ascii=False)
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS))


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


class _Vocabulary:
    """What llguidance asks of a tokenizer. Where the constraint leaves one text only, it allows that text's longest tokens."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], eos_token_id: int) -> None:
        self.tokens, self.eos_token_id = tokens, eos_token_id
        self.tokenize: Callable[[str], list[int]] = lambda text: []

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenize(text.decode("utf-8"))  # the library asks for whole characters only
