"""Any runtime of ours, bare or patched, as a model of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

The patch's positions lie in front of all that lm-eval sees: where a prompt is too long, its start is cut off, and the patch stays.
Windows, truncation and stop strings are those of lm-eval's own Transformers model, so that scores compare with published ones.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session
from edgepatch.text.messages import Message

ROWS_AT_ONCE = 128
"""So many rows of V logits are held at once: a window of a real model has gigabytes of them."""

PROMPTS_AT_ONCE = 32
DEFAULT_MAX_NEW_TOKENS = 256
IGNORED_SETTINGS = ("do_sample", "until", "max_gen_toks")


class RuntimeModel(TemplateLM):  # type: ignore[misc]
    """A runtime as lm-eval's ``LM``.

    Args:
        runtime: bare or patched; exchanging its patch between two evaluations is allowed.
        progress: told of the requests that are done, of each kind.
        stage: what they are called there.
    """

    def __init__(self, runtime: Session, progress: Progress = silent, stage: str = "requests") -> None:
        super().__init__()
        self.runtime = runtime
        self._progress, self._stage = progress, stage
        self._lead = runtime.encode("")
        self._conversations: dict[str, tuple[list[Message], str]] = {}

    @property
    def eot_token_id(self) -> int:
        return min(self.runtime.end_token_ids)

    @property
    def prefix_token_id(self) -> int:
        return self._lead[0] if self._lead else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self.runtime.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.runtime.spec.tokenizer_digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.runtime.encode(string)
        return ids[len(self._lead) :] if add_special_tokens is False else ids

    # Conversations. lm-eval hands on what a chat template gives as a text; special tokens spelled in it would be read as such. So what
    # it gets is the conversation itself, in JSON, and the template comes last, in `Runtime.encode_chat`.

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        messages: list[Message] = [dict(message) for message in chat_history]
        opening = "" if add_generation_prompt else str(messages.pop()["content"])
        text = json.dumps([messages, opening], ensure_ascii=False)
        self._conversations[text] = (messages, opening)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""

    def _encode_context(self, context: str) -> list[int]:
        if context not in self._conversations:
            return self.tok_encode(context)
        messages, opening = self._conversations[context]
        return self.runtime.encode_chat(messages) + (
            self.tok_encode(opening, add_special_tokens=False) if opening else []
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context not in self._conversations:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        return self._encode_context(context), self.tok_encode(continuation, add_special_tokens=False)

    # Log-likelihoods.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        scores = []
        for done, (_names, context, continuation) in enumerate(requests, start=1):
            scores.append(self._score(context, continuation))
            self._progress(self._stage, done, len(requests))
        return scores

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of the continuation, and whether it is the most likely one; cut from the left where it is too long."""
        if not 1 <= len(continuation) <= self.max_length:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length}",
                hint="load the model with a longer context, or leave this task out",
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        start = len(tokens) - len(continuation)
        if start > 1:
            self.runtime.logits_of_last(tokens[:start])  # evaluates the context without keeping all of its logits
        total, greedy = 0.0, True
        for first in range(start, len(tokens), ROWS_AT_ONCE):
            targets = tokens[first : first + ROWS_AT_ONCE]
            rows = self.runtime.logits(tokens[: first + len(targets) - 1], count=len(targets)).astype(
                np.float64
            )  # (T, V)
            total += float((rows[np.arange(len(targets)), targets] - np.logaddexp.reduce(rows, axis=1)).sum())
            greedy = greedy and rows.argmax(axis=1).tolist() == targets
        return total, greedy

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        totals = []
        for done, request in enumerate(requests, start=1):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self._progress(self._stage, done, len(requests))
        return totals

    # Generation.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[sampling_of(request.args[1], rng_seed=number)].append(number)
        texts, done = [""] * len(requests), 0
        for sampling, numbers in groups.items():
            for first in range(0, len(numbers), PROMPTS_AT_ONCE):
                some = numbers[first : first + PROMPTS_AT_ONCE]
                prompts = [self._cut_prompt(requests[number].args[0], sampling.max_new_tokens) for number in some]
                for number, text in zip(some, self.runtime.generate_batch(prompts, sampling), strict=True):
                    texts[number] = text
                done += len(some)
                self._progress(self._stage, done, len(requests))
        return texts

    def _cut_prompt(self, context: str, max_new_tokens: int) -> list[int]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InputError(
                f"a task generates up to {max_new_tokens} tokens, the context holds {self.max_length}",
                hint="load the model with a longer context, or leave this task out",
            )
        return self._encode_context(context)[-room:]


def sampling_of(settings: dict[str, Any], rng_seed: int) -> Sampling:
    """What lm-eval's ``generation_kwargs`` mean.

    Args:
        settings: of a task.
        rng_seed: for tasks that sample; greedy ones leave it out, so that they can share a batch.

    Raises:
        InputError: a setting that no runtime of ours has, or a value out of range.
    """
    plain = normalize_gen_kwargs(settings, DEFAULT_MAX_NEW_TOKENS)
    until = plain.get("until") or []
    chosen = {"temperature": 0.0} | {name: value for name, value in plain.items() if name not in IGNORED_SETTINGS}
    unknown = sorted(chosen.keys() - {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
    if unknown:
        raise InputError(f"generation_kwargs: {unknown[0]} is not known", hint="take it out of the task's file")
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    seed = rng_seed if chosen["temperature"] else None
    return Sampling.plain(max_new_tokens=int(plain["max_gen_toks"]), stop=stop, rng_seed=seed, **chosen)
