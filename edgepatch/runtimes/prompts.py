"""What a model is asked: a text, a conversation or token ids, made token ids and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from edgepatch.errors import InputError
from edgepatch.runtimes.runtime import Runtime, Tools
from edgepatch.text.messages import Message
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions

Prompt = str | Sequence[Message] | Sequence[int]


def token_ids(
    runtime: Runtime, prompt: Prompt, tools: Tools | None = None, options: ChatOptions = PLAIN_CHAT
) -> list[int]:
    """Token ids of a prompt; ``tools`` go into the chat template, which ``options`` belong to.

    Raises:
        InputError: the prompt is empty or malformed, or an id is outside the vocabulary, or a text has so many bytes that it fits
            into no context.
    """
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if tools and not is_chat:
        raise InputError("tools need chat messages as a prompt", hint="leave them out, or send messages")
    if isinstance(prompt, str):
        runtime.require_fit(prompt)
        ids = runtime.encode(prompt)
    elif is_chat:
        ids = runtime.encode_chat(cast(Sequence[Message], prompt), tools, options)
    else:
        ids = _checked_ids(prompt)
    if not ids:
        raise InputError("the prompt is empty", hint="give at least one token")
    wrong = next((t for t in ids if not 0 <= t < runtime.spec.vocab_size), None)
    if wrong is not None:
        raise InputError(f"token id {wrong} is outside the vocabulary of {runtime.spec.vocab_size}")
    return ids


def _checked_ids(prompt: Sequence[Any]) -> list[int]:
    """The prompt's token ids, if it is made of them alone."""
    if not all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in prompt):
        raise InputError("prompt: expected a text, messages, or token ids alone", hint="do not mix them")
    return [int(token) for token in prompt]
