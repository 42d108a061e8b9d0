"""The tokenizer probe: a few texts with the token ids that a model reads in them, which every copy of the model must read as well.

The digest of a vocabulary says which tokens there are. Which of them a text becomes is decided by merges, a pre-tokenizer, a BOS flag and
the types of tokens, and each of these can be changed in a file without changing the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from edgepatch.errors import InputError, MismatchError, PatchFormatError

MAX_TEXTS = 16
MAX_CHARACTERS = 512
MAX_IDS = 1024
MAX_SPECIAL = 8
"""Special tokens that a probe spells."""

DIGEST = re.compile("[0-9a-f]{64}")

PLAIN_TEXTS = (
    "The quick brown foxes can't jump over 1234567890 lazy dogs; they'll sleep, won't they?",
    "def area(width, height):\n    return width * height  # in m\n\nprint(area(3, 14.5))",
    "IT'S 7:30 in Gr\u00f6\u00dfe, na\u00efve caf\u00e9; \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, \u4f60\u597d \U0001f642",
)
"""What merges and pre-tokenizers differ in: contractions in both cases, numbers, words across scripts, blanks and line ends. Nothing in which
conversions of one tokenizer are known to differ (docs/reference/runtimes.md): composed characters, blanks in front of a text."""


class ProbeEncoder(Protocol):
    """Token ids of a text, with BOS where the model wants one; special tokens that it spells are read as such if it is trusted."""

    def __call__(self, text: str, *, trusted: bool) -> list[int]: ...


@dataclass(frozen=True)
class ProbeText:
    """A text and its token ids.

    Attributes:
        text: 1 to ``MAX_CHARACTERS`` characters.
        trusted: whether special tokens that it spells are read as such.
        token_ids: 1 to ``MAX_IDS``, BOS included where the model wants one.
    """

    text: str
    trusted: bool
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (1 <= len(self.text) <= MAX_CHARACTERS and 1 <= len(self.token_ids) <= MAX_IDS):
            raise PatchFormatError(
                f"tokenizer probe: expected 1 to {MAX_CHARACTERS} characters and 1 to {MAX_IDS} ids a text, "
                f"found {len(self.text)} and {len(self.token_ids)}"
            )


@dataclass(frozen=True)
class TokenizerProbe:
    """What the tokenizer of a patch's base makes of some texts.

    Attributes:
        texts: 1 to ``MAX_TEXTS``.
        tools_template: SHA-256 of the chat template for conversations with tools, "" where the base has none of its own for them;
            ``None`` in probes that were made before anybody asked.
    """

    texts: tuple[ProbeText, ...]
    tools_template: str | None = None

    def __post_init__(self) -> None:
        if self.tools_template and not DIGEST.fullmatch(self.tools_template):
            raise PatchFormatError(
                f"tokenizer probe: tools_template: expected a SHA-256 digest or nothing, found {self.tools_template!r:.80}"
            )
        if not 1 <= len(self.texts) <= MAX_TEXTS:
            raise PatchFormatError(f"tokenizer probe: expected 1 to {MAX_TEXTS} texts, found {len(self.texts)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = {
            "texts": [{**asdict(probe), "token_ids": list(probe.token_ids)} for probe in self.texts]
        }
        return values if self.tools_template is None else {**values, "tools_template": self.tools_template}

    @classmethod
    def from_dict(cls, values: Any) -> TokenizerProbe:
        """The inverse of ``as_dict``.

        Raises:
            PatchFormatError: a field is missing, unknown, of another type or out of bounds.
        """
        is_known = isinstance(values, dict) and {"texts"} <= set(values) <= {"texts", "tools_template"}
        texts = values["texts"] if is_known else None
        if not isinstance(texts, list) or not isinstance(values.get("tools_template", ""), str):
            raise PatchFormatError("tokenizer probe: expected an object with a list of texts, and a digest at most")
        return cls(tuple(map(_probe_text, texts)), values.get("tools_template"))

    def require_same(self, encode: ProbeEncoder) -> None:
        """Asks another copy of the tokenizer.

        Args:
            encode: of the model at hand.

        Raises:
            MismatchError: it reads other ids in a text, or cannot read it.
        """
        for probe in self.texts:
            try:
                token_ids: object = tuple(encode(probe.text, trusted=probe.trusted))
            except InputError as error:
                token_ids = str(error)
            if token_ids != probe.token_ids:
                raise MismatchError({f"tokenizer, token ids of {probe.text!r}": (probe.token_ids, token_ids)})


def probe_tokenizer(
    encode: ProbeEncoder, special: Sequence[str] = (), tools_template: str | None = None
) -> TokenizerProbe:
    """The probe of a tokenizer.

    Args:
        encode: of the model that a patch is made for.
        special: special tokens that open and close turns: a text that spells them is read twice, as text and as a template's own.
        tools_template: as in ``TokenizerProbe``.
    """
    spelled = " ".join(f"{token}word" for token in special[:MAX_SPECIAL])[:MAX_CHARACTERS]
    asked = [(text, False) for text in PLAIN_TEXTS] + [(spelled, trusted) for trusted in (False, True) if spelled]
    return TokenizerProbe(
        tuple(ProbeText(text, trusted, tuple(encode(text, trusted=trusted))) for text, trusted in asked),
        tools_template,
    )


def _probe_text(value: Any) -> ProbeText:
    if not isinstance(value, dict) or set(value) != {"text", "trusted", "token_ids"}:
        raise PatchFormatError("tokenizer probe: expected texts with the fields text, token_ids and trusted")
    text, trusted, ids = value["text"], value["trusted"], value["token_ids"]
    if not (isinstance(text, str) and isinstance(trusted, bool) and isinstance(ids, list)):
        raise PatchFormatError("tokenizer probe: expected a text, true or false, and a list of ids")
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise PatchFormatError("tokenizer probe: token_ids must be a list of whole numbers")
    return ProbeText(text, trusted, tuple(ids))
