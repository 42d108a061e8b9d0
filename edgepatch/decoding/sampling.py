"""Sampling from logits, in numpy: one rule for every runtime, so that runs are paired on the same random numbers.

A token is drawn by adding a Gumbel number to each log-probability and taking the largest sum (``edgepatch.decoding.noise``): two
runtimes whose logits differ by little draw the same token with the same random seed.

The order of operations, each left out unless asked for, by a request or by the defaults of a model (``edgepatch.decoding.defaults``): ``logit_bias`` is added; tokens of prompt and reply are weakened by
``repetition_penalty`` (as Transformers and llama.cpp do it, over the whole context), those of the reply alone by
``presence_penalty`` and ``frequency_penalty`` (as OpenAI defines them); what the constraint rules out is removed; then temperature,
top-k, min-p and top-p, where each probability is one of what the steps before have left. Temperature comes before the cuts, as in
Transformers and OpenAI's service; llama.cpp's own default chain puts it last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.constraints import Constraint, ConstraintMatcher
from edgepatch.decoding.noise import Noise, exponentials
from edgepatch.errors import EdgepatchError, InputError

LEAST_TEMPERATURE = 1e-4
"""What is lower draws the likeliest token, as 0 does: nothing else is left at it."""

LEAST_PENALTY = 0.01
"""Of ``repetition_penalty``: below it a factor only overflows."""

CANDIDATES = 1024
"""So many likeliest tokens are sorted first; the whole vocabulary only where they hold less than top-p."""

BLOCK = 2**17
"""So many weights, of one row or several, are computed at once: they stay in the processor's cache."""

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
INTEGERS = ("max_new_tokens", "top_k", "rng_seed", "num_logprobs")
BANNED = -math.inf


LARGEST_LOGIT = 1e300
"""What penalties may make of one: infinite logits have no softmax."""


class DrawRule(NamedTuple):
    """What shapes the distribution that a token is drawn from; each value here changes nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    ``None`` for temperature, top-p, top-k, min-p or repetition penalty leaves it to the model: a session fills in its defaults.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the most likely token.
        top_p: the smallest set of likeliest tokens that holds this probability is kept.
        top_k: only the k likeliest tokens are kept; 0 keeps all.
        rng_seed: makes the draw repeatable; ``None`` draws afresh.
        ignore_end_tokens: go on behind the model's end token, for timing a fixed number of tokens.
        min_p: only tokens with at least this share of the likeliest token's probability are kept.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and reply; 1 is none.
        presence_penalty: taken off the logits of tokens in the reply, -2 to 2.
        frequency_penalty: taken off them once for each time they occur in it, -2 to 2.
        logit_bias: token id -> -100 to 100, added to its logit; minus infinity bans it.
        stop: the reply ends before the first of these texts.
        num_logprobs: log-probabilities of the drawn token and of so many likeliest ones, at most 20; ``None`` for none at all.
        constraint: what the reply must look like.

    Raises:
        InputError: naming the value that is out of range.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    rng_seed: int | None = None
    ignore_end_tokens: bool = False
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self._require_types()
        rule = self.rule
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= rule.temperature <= 100, "0 to 100"),
            "top_p": (0 < rule.top_p <= 1, "above 0, at most 1"),
            "top_k": (rule.top_k >= 0, "0 or more"),
            "rng_seed": (self.rng_seed is None or self.rng_seed >= 0, "0 or more"),
            "min_p": (0 <= rule.min_p <= 1, "0 to 1"),
            "repetition_penalty": (LEAST_PENALTY <= rule.repetition_penalty <= 100, f"{LEAST_PENALTY} to 100"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "num_logprobs": (
                self.num_logprobs is None or 0 <= self.num_logprobs <= MAX_LOGPROBS,
                f"0 to {MAX_LOGPROBS}",
            ),
            "stop": (
                len(self.stop) <= MAX_STOPS and all(0 < len(text) <= MAX_STOP_LENGTH for text in self.stop),
                f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters",
            ),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise InputError(
                    f"sampling: {name} = {getattr(self, name)!r:.200} is out of range: expected {expected}"
                )
        if self.constraint is not None and self.ignore_end_tokens:
            raise InputError(
                "sampling: ignore_end_tokens goes on where the constraint ends", hint="leave one of them out"
            )

    def _require_types(self) -> None:
        for f in fields(self):
            value, name = getattr(self, f.name), f.name
            if name in INTEGERS:
                fits = _is_integer(value) or (value is None and f.default is None)
            elif name in DrawRule._fields or isinstance(f.default, float):
                fits = _is_number(value) or (value is None and f.default is None)
            elif name == "stop":
                fits = isinstance(value, (tuple, list)) and all(isinstance(text, str) for text in value)
            elif name == "logit_bias":
                fits = isinstance(value, Mapping) and all(_is_bias(token, bias) for token, bias in value.items())
            else:
                fits = isinstance(value, bool) if name == "ignore_end_tokens" else isinstance(value, Constraint | None)
            if not fits:
                raise InputError(f"sampling: {name} = {value!r:.200} cannot be used, expected {f.type}")
        if 0 < (self.temperature or 0) < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @cached_property
    def rule(self) -> DrawRule:
        """What shapes the distribution; what is left to the model is left out."""
        values = {name: getattr(self, name) for name in DrawRule._fields}
        return DrawRule(**{name: value for name, value in values.items() if value is not None})

    def filled(self, defaults: Sampling) -> Sampling:
        """The same with what was left to the model taken from ``defaults``."""
        open_names = [name for name in DrawRule._fields if getattr(self, name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in open_names}) if open_names else self

    @classmethod
    def plain(cls, max_new_tokens: int = 128, **settings: Any) -> Sampling:
        """Draws from the model's distribution as it is, but for the settings given: what measurements take, whatever a model's makers advise.

        Raises:
            InputError: naming the value that is out of range.
        """
        return cls(max_new_tokens, **DrawRule()._asdict() | settings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampling:
        """Settings by name.

        Raises:
            InputError: a name is unknown or a value out of range.
        """
        names = {f.name for f in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in names)
        if unknown:
            raise InputError(f"sampling: unknown: {', '.join(unknown)}", hint=f"known: {', '.join(sorted(names))}")
        return cls(**values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_bias(token: object, bias: Any) -> bool:
    return _is_integer(token) and _is_number(bias) and (-100 <= bias <= 100 or bias == BANNED)


@dataclass(frozen=True)
class Draw:
    """A drawn token.

    Attributes:
        token_id: its id.
        logprob: its log-probability as the model itself gives it, before any setting; ``None`` unless asked for.
        top_logprobs: (token id, log-probability) of the likeliest tokens, falling.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Draws the tokens of one reply.

    Args:
        sampling: the settings.
        prompt: token ids that the reply continues.
        vocab_size: V.
        matcher: of this reply, where ``sampling`` has a constraint.

    Raises:
        InputError: ``logit_bias`` names a token outside the vocabulary.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, matcher: ConstraintMatcher | None = None
    ) -> None:
        wrong = next((t for t in sampling.logit_bias if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise InputError(f"sampling: logit_bias: token id {wrong} is outside the vocabulary of {vocab_size}")
        self._sampling, self._matcher = sampling, matcher
        penalizes = sampling.rule.repetition_penalty != 1
        self._noise, self._step = Noise(sampling.rng_seed), 0
        self._bias = _as_arrays(sampling.logit_bias)
        self._seen = set(prompt) if penalizes else set()
        self._counts: dict[int, float] = {}
        changed = (sampling.logit_bias, penalizes, sampling.presence_penalty, sampling.frequency_penalty)
        self._adjusts = matcher is not None or any(changed)

    def draw(self, logits: NDArray[Any]) -> Draw:
        """Draws the next token, which then counts as part of the reply.

        Args:
            logits: (V,) float32; left as they are.

        Raises:
            InputError: bans and constraint together leave no token.
            EdgepatchError: the logits hold NaN or infinity, or the constraint cannot be followed.
        """
        return draw_rows([self], [self.prepare(logits)], [logits])[0]

    def prepare(self, logits: NDArray[Any]) -> NDArray[Any]:
        """(V,) what is drawn from: the logits with bias, penalties and constraint applied.

        Raises:
            InputError: bans and constraint together leave no token.
            EdgepatchError: the logits hold NaN or infinity, or the constraint cannot be followed.
        """
        _require_finite(float(logits.max()))
        return self._adjust(logits) if self._adjusts else logits

    def accept(self, token: int) -> bool:
        """Takes a drawn token that ends nothing into the constraint; true when the reply is complete by it."""
        if self._matcher is None:
            return False
        self._matcher.accept(token)
        return self._matcher.is_complete

    def _adjust(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """(V,) with bias, penalties and constraint applied."""
        s, adjusted = self._sampling, logits.astype(np.float64)
        ids, bias = self._bias
        adjusted[ids] += bias
        penalty = s.rule.repetition_penalty
        if penalty != 1:
            ids = np.fromiter(self._seen, np.int64)
            values = adjusted[ids]
            with np.errstate(over="ignore"):  # a penalty next to nothing makes a logit as large as it can be
                penalized = np.where(values < 0, values * penalty, values / penalty)
            adjusted[ids] = np.clip(penalized, -LARGEST_LOGIT, LARGEST_LOGIT)
        ids, counts = _as_arrays(self._counts)
        adjusted[ids] -= s.presence_penalty + s.frequency_penalty * counts
        if self._matcher is not None:
            adjusted[~self._matcher.allowed()] = BANNED
        if adjusted.max() == BANNED:
            raise InputError(
                "no token is left to draw: logit_bias and constraint rule out the whole vocabulary", hint="ban fewer"
            )
        if not math.isfinite(adjusted.max()):
            raise InputError(
                "sampling: the settings make logits that are no numbers", hint="use penalties nearer to 1 or 0"
            )
        return adjusted

    def _take(self, token: int, logits: NDArray[Any]) -> Draw:
        """Counts a token as part of the reply."""
        self._step += 1
        if self._adjusts:
            self._seen.add(token)
            self._counts[token] = self._counts.get(token, 0) + 1
        count = self._sampling.num_logprobs
        if count is None:
            return Draw(token)
        logprobs = logits.astype(np.float64) - float(logits.max())
        logprobs -= np.log(np.exp(logprobs).sum())
        top = np.argpartition(-logprobs, count)[:count] if count < len(logprobs) else np.arange(len(logprobs))
        top = top[np.lexsort((top, -logprobs[top]))]
        return Draw(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def draw_rows(
    samplers: Sequence[TokenSampler], prepared: Sequence[NDArray[Any]], logits: Sequence[NDArray[Any]]
) -> list[Draw]:
    """Draws the next token of B replies at once, each as its sampler alone would.

    Args:
        samplers: B.
        prepared: B times (V,), what each sampler's ``prepare`` has made of its logits.
        logits: B times (V,) float32 as the model gives them.
    """
    tokens = draw_tokens(prepared, [s._sampling for s in samplers], [s._noise.key(s._step) for s in samplers])
    return [sampler._take(token, row) for sampler, token, row in zip(samplers, tokens, logits, strict=True)]


def _as_arrays(values: Mapping[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.fromiter(values.keys(), np.int64, len(values)), np.fromiter(values.values(), np.float64, len(values))


def _require_finite(best: float) -> None:
    if not math.isfinite(best):
        kind = "NaN" if math.isnan(best) else "infinite"
        raise EdgepatchError(
            f"the model gave {kind} logits", hint="check the model file; a damaged file or patch does this"
        )


def draw_token(logits: NDArray[Any], sampling: Sampling, key: int) -> int:
    """Draws one token id.

    Args:
        logits: (V,) float32 or float64; a token at minus infinity is never drawn.
        sampling: temperature, then top-k, min-p and top-p; its other settings are ``TokenSampler``'s.
        key: of ``Noise.key``.

    Raises:
        EdgepatchError: the logits hold NaN or infinity: the model or the patch is damaged.
    """
    _require_finite(float(logits.max()))
    return draw_tokens([logits], [sampling], [key])[0]


def draw_tokens(rows: Sequence[NDArray[Any]], samplings: Sequence[Sampling], keys: Sequence[int]) -> list[int]:
    """Draws one token of each row, the same ones as ``draw_token`` row by row.

    Args:
        rows: B times (V,) float32 or float64, none with NaN or infinity but minus infinity.
        samplings: B, as ``draw_token`` takes them.
        keys: B, of ``Noise.key``.
    """
    tokens, rules = [int(row.argmax()) for row in rows], [sampling.rule for sampling in samplings]
    warm = [i for i, rule in enumerate(rules) if rule.temperature]
    size = max(1, BLOCK // len(rows[0])) if warm else 1
    for start in range(0, len(warm), size):
        block = warm[start : start + size]
        weights = _weights([rows[i] for i in block], [tokens[i] for i in block], [rules[i] for i in block])
        ids = _kept(weights, [rules[i] for i in block])
        for i, weight, kept, numbers in zip(
            block, weights, ids, exponentials([keys[i] for i in block], ids), strict=True
        ):
            tokens[i] = int(kept[(weight[kept] / numbers).argmax()])
    return tokens


def _weights(rows: Sequence[NDArray[Any]], best: Sequence[int], rules: Sequence[DrawRule]) -> NDArray[np.float64]:
    """(B, V) multiples of the probabilities, each row's highest 1."""
    weights = np.empty((len(rows), len(rows[0])))
    for weight, row, token in zip(weights, rows, best, strict=True):
        np.subtract(row, row[token], out=weight, dtype=np.float64)
    weights /= np.array([[rule.temperature] for rule in rules])
    np.exp(weights, out=weights)
    if any(rule.min_p for rule in rules):
        weights[weights < [[rule.min_p] for rule in rules]] = 0.0
    return weights


def _kept(weights: NDArray[np.float64], rules: Sequence[DrawRule]) -> list[NDArray[np.int64]]:
    """The token ids that top-k and top-p leave of each of (B, V) rows, rising."""
    everything = np.arange(weights.shape[1])
    ids = [everything] * len(rules)
    cut = [i for i, rule in enumerate(rules) if rule.top_k or rule.top_p < 1]
    heads = _heads(weights[cut]) if cut else weights[:0]
    for i, head in zip(cut, heads, strict=True):
        ids[i] = _likeliest(weights[i], head, rules[i])
    return ids


def _heads(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, C) highest weights of each row, falling; sorting all V costs more than the draw."""
    rest = max(0, weights.shape[1] - CANDIDATES)
    heads = np.partition(weights, rest, axis=1)[:, rest:] if rest else weights
    return np.sort(heads, axis=1)[:, ::-1]


def _likeliest(weights: NDArray[np.float64], head: NDArray[np.float64], rule: DrawRule) -> NDArray[np.int64]:
    """The token ids that top-k and top-p leave, rising.

    Args:
        weights: (V,) multiples of the probabilities.
        head: (C,) the highest, falling.
        rule: top-k and top-p.
    """
    cumulative, mass = np.cumsum(head), float(weights.sum())
    if _is_cut_off(cumulative, mass, rule) and len(head) < len(weights):
        head = np.sort(weights)[::-1]
        cumulative = np.cumsum(head)
    if rule.top_k:
        head, cumulative = head[: rule.top_k], cumulative[: rule.top_k]
        mass = float(cumulative[-1])
    count = min(int(cumulative.searchsorted(rule.top_p * mass)) + 1, int(np.count_nonzero(head)))
    ids = (weights >= head[count - 1]).nonzero()[0]
    equals = (weights[ids] == head[count - 1]).nonzero()[0]
    return np.delete(ids, equals[len(equals) - (len(ids) - count) :])  # among equals the lowest ids come first


def _is_cut_off(cumulative: NDArray[np.float64], mass: float, rule: DrawRule) -> bool:
    """Whether top-k or top-p may keep more than the head."""
    if rule.top_k:
        return rule.top_k > len(cumulative)
    return bool(cumulative[-1] < rule.top_p * mass)
