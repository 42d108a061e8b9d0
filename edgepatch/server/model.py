"""What is served, as plain values that any thread may read while the runtime works."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgepatch.runtimes.session import Session
from edgepatch.seeds.anchoring import place_in_words

if TYPE_CHECKING:
    from edgepatch.decoding.sampling import DrawRule
    from edgepatch.patch.file import Patch
    from edgepatch.server.schemas.replies import Model, SamplingDefaults
    from edgepatch.server.schemas.replies import Patch as Entry


class ServedModel:
    """Name, patches and vocabulary of a loaded runtime; they never change while the server runs.

    Args:
        session: the loaded model.
        name: what clients call it.

    Attributes:
        context_length: tokens that a prompt may have.
        text_bound: how many bytes of text they can stand for.
        told_notes: what is told at the start, and among the ``notes``: what is less than the patches promise, and advice of the
            model on sampling that cannot be followed.
        sampling_defaults: what fills the settings that requests leave open.
        patches: the active ones.
        tokens: ``Session.tokens``, which needs the vocabulary alone, so that any thread may call it.
        chat_template: how conversations are written.
        special_tokens: name -> id of each token without text.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.name = name
        self.created = int(time.time())
        self.fingerprint = session.system_fingerprint
        self.end_token_ids = session.end_token_ids
        self.num_sequences = session.num_sequences
        self.sampling_defaults = session.sampling_defaults
        advice = (self.sampling_defaults.note,) if self.sampling_defaults.note else ()
        self.told_notes = (*advice, *session.slot.notes)
        self.notes = (*session.notes, *self.told_notes)
        self.context_length, self.text_bound = session.context_length, session.text_bound
        self.tokens = session.tokens
        self.chat_template, self.special_tokens = session.chat_template, session.special_tokens
        self.patches = [_patch_entry(part, session) for part in session.parts]
        self._labels = _labels(session, name)
        self._token_bytes: list[bytes] = []

    def read_vocabulary(self, session: Session) -> None:
        """Reads the tokens' texts, once; on the thread that owns the session.

        Raises:
            InputError: the model's tokens have no text of their own.
        """
        self._token_bytes = self._token_bytes or session.token_bytes()

    def token_bytes(self, token_id: int) -> bytes:
        """The token's text in UTF-8, perhaps a part of a character; empty for a special token."""
        return self._token_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The token's text; its bytes spelled out where they are no whole characters, its id where it has no text."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8") or f"token_id:{token_id}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @property
    def entry(self) -> Model:
        """The model in ``/v1/models``."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "edgepatch",
            "sampling_defaults": _sampling_entry(self.sampling_defaults.sampling.rule),
        }

    @property
    def labels(self) -> dict[str, str]:
        """For the metrics; several patches have the name and digest of what they are together."""
        return self._labels


def _labels(session: Session, name: str) -> dict[str, str]:
    patch = session.patch
    names = (patch.name, patch.version, patch.digest) if patch else ("", "", "")
    labels = dict(zip(("patch", "patch_version", "patch_digest"), names, strict=True))
    return {"model": name, **labels, "system_fingerprint": session.system_fingerprint}


def _sampling_entry(rule: DrawRule) -> SamplingDefaults:
    return {
        "temperature": rule.temperature,
        "top_p": rule.top_p,
        "top_k": rule.top_k,
        "min_p": rule.min_p,
        "repetition_penalty": rule.repetition_penalty,
    }


def _patch_entry(patch: Patch, session: Session) -> Entry:
    pins = session.slot.is_pinned
    return {
        "object": "patch",
        "name": patch.name,
        "version": patch.version,
        "digest": patch.digest,
        "num_virtual_tokens": patch.num_virtual_tokens,
        "active": True,
        "seed_route": session.seed_route,
        "pinned": pins and patch.anchoring is not None,
        "place": place_in_words(patch.anchoring, pins),
        "chat_template": patch.chat_template,
        "other_template": session.slot.other_template if session.slot.has_other_template(patch) else "",
        "tokenizer_probe": patch.tokenizer_probe is not None,
        "signatures": [signature.key_id for signature in patch.signatures],
        "canary": len(patch.canary.prompts) if patch.canary else 0,
    }
