"""The canary: does a loaded patch do on this device what it did on the full-precision model?

A seed in a wrong order, for another rope scaling, or silently dropped gives fluent text and no error. So a patch carries, for a
few short prompts, the next-token logits of the full-precision model with and without it. A runtime measures the same logits and
compares the *effect*, patched less bare: quantization shifts both alike, so most of its error cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InactivePatchError, InputError
from edgepatch.seeds.anchoring import LEAST_TURN, Anchoring
from edgepatch.tensors import Canary, CanaryPrompt

NUM_LOGITS = 64
PROMPT_LENGTHS = (1, 2, 3)
"""Tokens of each prompt; the first is evaluated after every swap, so it is as short as a prompt can be."""

TOLERANCES = (
    (("F32", "F16", "fp16"), 0.02),
    (("BF16",), 0.05),
    (("Q8",), 0.08),
    (("int8",), 0.1),
    (("Q6",), 0.1),
    (("Q5",), 0.15),
    (("Q3", "Q2", "IQ3", "IQ2", "IQ1", "TQ"), 0.45),
)
"""Start of the weights' type -> deviation allowed."""

FOUR_BIT_TOLERANCE = 0.3
CACHE_TOLERANCES = {"f32": 0.0, "f16": 0.0, "bf16": 0.03, "q8_0": 0.03}
QUANTIZED_CACHE_TOLERANCE = 0.15
DECODED_FACTOR = 1.5
"""A seed that the quantized model computed itself carries that model's error as well; its layout cannot be wrong."""

LARGEST_TOLERANCE = 0.5
"""Below the least that another patch's seed deviates by. Measured on random models, the hardest case: right stored seeds deviate by at most 0.002 at F16, 0.025 at Q8_0, 0.05 at Q6_K, 0.26 at
4 bits, 0.35 at Q3_K_M (two first prompts); another patch's seed by 0.53 or more, a missing one by 1. On the trained lab model Q4_0 stays below 0.12. A cache in Q4_0 adds the most on
a deep model: 0.17 on SmolLM2 (30 layers) at F16, which is refused: take a finer cache there.

A deep model blurs more at eight bits than the small ones that the bounds were first set on: the detox patch of SmolLM2 deviates by 0.065 at
Q8_0 and by 0.084 on ONNX int8, where 0.06 was allowed and a right patch refused. 0.12 at Q8_0 would miss Gemma's embeddings in another scale. On its most telling prompt, another patch of the same model
deviates by 0.51 or more there, keys in a wrong order by 1.09, exchanged layers by 1.15. ONNX int4 made of a Q4_1 file reaches 0.35 (another patch:
0.50); it stays refused, for 0.3 is what a part of a composed patch is proven by.
"""


LEAST_EFFECT = 0.1
"""Of a prompt, as a share of the effect on the prompt where it is largest. On the lab model 4 bits move the effect by 1 % of the largest."""


NUM_CANDIDATES, NUM_PART_LOGITS = 96, 16
"""Prompts of which each part of a composed patch takes the one that proves it best, and logits of it: few, for parts have much in common. Of
four parts on the lab model the least provable had 0.22 of the effect on 64 logits of the best of 32 prompts, and 0.47 on these. Right ones
deviate by at most 0.14 there at Q4_0, and by 0.22 with twelve random parts on a random model, where each that is missing gives 0.58 or more."""

CLEAR_SHARE, LEAST_SHARE = 0.7, 0.3
"""Of the whole patch's effect: what a device measures where this part is missing. Four bits are allowed 0.3, so a smaller share would prove
nothing there; where it is clear, the strongest effect is taken, for it is the one that quantization blurs least."""


def canary_prompts(vocab_size: int, count: int = len(PROMPT_LENGTHS)) -> tuple[tuple[int, ...], ...]:
    """The same token ids for every patch of a vocabulary, so that a device measures the bare model once.

    Spread over the vocabulary by a golden-ratio step; which tokens they are does not matter to attention.

    Args:
        vocab_size: V.
        count: how many prompts.
    """
    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(count)]
    ids = [int(vocab_size * ((0.5 + i * 0.6180339887498949) % 1.0)) for i in range(sum(lengths))]
    starts = np.cumsum([0, *lengths])
    return tuple(tuple(ids[a:b]) for a, b in pairwise(starts))


def long_prompt(vocab_size: int, anchoring: Anchoring) -> tuple[int, ...]:
    """Token ids behind which only a seed that moves has its effect: longer than two blocks, or a later turn of a conversation."""
    length = 2 * anchoring.block + 2 if anchoring.block else 4 * LEAST_TURN
    ids = [int(vocab_size * ((0.25 + i * 0.6180339887498949) % 1.0)) for i in range(length)]
    if not anchoring.block:
        ids[-2] = anchoring.turn_tokens[0]
    return tuple(ids)


Logits = Callable[[Sequence[int]], NDArray[Any]]
"""Token ids of a prompt -> (V,) logits after it."""


def make_canary(
    vocab_size: int,
    bare: Logits,
    patched: Logits,
    anchoring: Anchoring | None = None,
    without_part: Mapping[str, Logits] = MappingProxyType({}),
    texts: Sequence[tuple[int, ...]] = (),
) -> Canary:
    """A canary from the full-precision model.

    A prompt on which the patch does next to nothing is left out: what quantization does to it would drown the effect.

    Args:
        vocab_size: V.
        bare: without the patch.
        patched: with the patch.
        anchoring: of the patch; where its seed moves, a long prompt proves that it does.
        without_part: name of each part of a composed patch -> with all parts but this one. Each part gets a prompt and logits that it moves
            itself, so that a patch whose part is missing fails.
        texts: token ids of texts that a part may act on more than on tokens by chance; asked where those prove it too little.

    Raises:
        InputError: beside the others a part does so little that nothing could prove it.
    """
    prompts = [*canary_prompts(vocab_size), *([long_prompt(vocab_size, anchoring)] if anchoring else [])]
    candidates = (canary_prompts(vocab_size, NUM_CANDIDATES), tuple(texts))

    @cache
    def effect(tokens: tuple[int, ...]) -> _Effect:
        return _Effect(_centred(bare(tokens)), _centred(patched(tokens)))

    measured = [_prompt(tokens, effect(tokens)) for tokens in prompts]
    usual = max(length for length, _ in measured)
    kept = [prompt for length, prompt in measured if prompt is not None and length >= LEAST_EFFECT * usual]

    def proof(name: str, others: Logits) -> CanaryPrompt:
        effects = dict[tuple[int, ...], _Effect]()
        for choices in candidates:
            effects |= {tokens: effect(tokens).beyond(_centred(others(tokens))) for tokens in choices}
            share, prompt = _best_proof(effects, usual)
            if prompt is not None and share >= LEAST_SHARE:
                return prompt
        raise InputError(
            f"canary: {name}: expected a part with {LEAST_SHARE:g} of the whole patch's effect or more, found {share:.2f} at best",
            hint="beside the others it does too little to be proven: train them together, or leave it out",
        )

    return Canary((*kept, *(proof(name, others) for name, others in without_part.items())))


class _Effect:
    """What a patch, or a part of it, does to a prompt's logits.

    Args:
        before, after: (V,) logits without and with the patch, less their means.
        others: (V,) logits with all parts but one, less their mean: the effect is that of this part. ``None`` for the whole patch.
    """

    def __init__(
        self, before: NDArray[np.float64], after: NDArray[np.float64], others: NDArray[np.float64] | None = None
    ) -> None:
        self.before, self.after = before, after
        self.part = after - (before if others is None else others)
        both = np.abs(self.part * (after - before))  # what the part moves must be moved by the whole, or it drowns
        count = NUM_LOGITS if others is None else NUM_PART_LOGITS
        self.ids = np.sort(np.argsort(-both, kind="stable")[:count])

    def beyond(self, others: NDArray[np.float64]) -> _Effect:
        """That of the part that ``others`` are without."""
        return _Effect(self.before, self.after, others)

    @property
    def share(self) -> float:
        """Of the whole effect: the deviation that a device measures where the part is missing."""
        part, whole = (float(np.linalg.norm(centred(e, self.ids))) for e in (self.part, self.after - self.before))
        return float(part / max(whole, 1e-12))


def _best_proof(effects: Mapping[tuple[int, ...], _Effect], usual: float) -> tuple[float, CanaryPrompt | None]:
    """(share of the whole effect, prompt) that tell best whether a part is there.

    Args:
        effects: prompt -> the part's.
        usual: length of the whole patch's effect on an ordinary prompt; the allowed error is a share of it.
    """
    error = FOUR_BIT_TOLERANCE * usual * (NUM_PART_LOGITS / NUM_LOGITS) ** 0.5

    def margin(tokens: tuple[int, ...]) -> float:
        """The error counts twice: a patch without the part must be beyond it, and one with the part within."""
        length = max(_prompt(tokens, effects[tokens])[0], 1e-12)
        return float(min(effects[tokens].share, CLEAR_SHARE) - 2 * error / length)

    best = max(effects, key=margin)
    return effects[best].share, _prompt(best, effects[best])[1]


def _centred(logits: NDArray[Any]) -> NDArray[np.float64]:
    """(V,) less their mean."""
    exact = np.asarray(logits, dtype=np.float64)
    return np.asarray(exact - exact.mean())


def _prompt(tokens: tuple[int, ...], effect: _Effect) -> tuple[float, CanaryPrompt | None]:
    """(length of the whole effect on the logits that are moved most, prompt with these); no prompt where nothing moves."""
    rounded = [
        tuple(round(float(x), 4) for x in centred(logits, effect.ids)) for logits in (effect.before, effect.after)
    ]
    length = float(np.linalg.norm(np.subtract(rounded[0], rounded[1])))
    return length, CanaryPrompt(tokens, tuple(int(i) for i in effect.ids), *rounded) if length else None


def centred(logits: NDArray[Any], ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) logits of ``ids`` less their mean: a constant added to all logits changes no probability."""
    chosen = np.asarray(logits, dtype=np.float64)[np.asarray(ids)]
    return np.asarray(chosen - chosen.mean())


def deviation(prompt: CanaryPrompt, bare: NDArray[Any], patched: NDArray[Any]) -> float:
    """How far the patch's effect on this device is from its effect on the full-precision model.

    Args:
        prompt: what is expected.
        bare: (V,) logits of this device without the patch.
        patched: (V,) with the patch.

    Returns:
        Length of the difference over the length of the expected effect: 0 for the same effect, 1 for none.
    """
    expected = np.asarray(prompt.patched) - np.asarray(prompt.bare)
    actual = centred(patched, prompt.token_ids) - centred(bare, prompt.token_ids)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def tolerance(quantization: str, kv_type: str = "f32", is_decoded: bool = False) -> float:
    """The largest deviation that quantized weights, a quantized cache and the seed's route explain.

    Args:
        quantization: type of the weights, as the runtimes name it.
        kv_type: type of the cache.
        is_decoded: whether this very model computed the seed.
    """
    weights = next((allowed for starts, allowed in TOLERANCES if quantization.startswith(starts)), FOUR_BIT_TOLERANCE)
    allowed = weights + CACHE_TOLERANCES.get(kv_type, QUANTIZED_CACHE_TOLERANCE)
    return min(allowed * (DECODED_FACTOR if is_decoded else 1.0), LARGEST_TOLERANCE)


def require_active(prompt: CanaryPrompt, bare: NDArray[Any], patched: NDArray[Any], allowed: float) -> None:
    """Refuses to go on with a patch that does not do what it should.

    Raises:
        InactivePatchError: the deviation is beyond ``allowed``, or not a number.
    """
    distance = deviation(prompt, bare, patched)
    if not distance <= allowed:  # NaN fails too
        raise InactivePatchError(
            f"canary: the patch's effect on this model deviates by {distance:.2f} from that at full precision, allowed is {allowed:.2f}"
            " (0 is the same effect, 1 is none)",
            hint="the seed is not what the patch's maker measured: check model file and runtime version, convert the seed again",
        )
