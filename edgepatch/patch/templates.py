"""Whether a model is told other words around messages than a patch was made with."""

from __future__ import annotations

from typing import NamedTuple

from edgepatch.patch.patch import Patch

NO_TEMPLATE = "none"


class OtherTemplate(NamedTuple):
    """A chat template of a model's that is another one than a patch was made with: its name, and both digests or ``NO_TEMPLATE``."""

    name: str
    expected: str
    actual: str


def other_template(patch: Patch, digest: str, tools_digest: str) -> OtherTemplate | None:
    """The first of a model's templates that differs; those that the patch does not name count for nothing.

    Args:
        patch: made with templates of its own.
        digest: SHA-256 of the model's template, or "" where it has none.
        tools_digest: of the one for conversations with tools alone.
    """
    if patch.chat_template not in ("", digest):
        return OtherTemplate("chat_template", patch.chat_template, digest or NO_TEMPLATE)
    expected = patch.tokenizer_probe.tools_template if patch.tokenizer_probe is not None else None
    if expected in (None, tools_digest):
        return None
    return OtherTemplate("chat_template for tools", expected or NO_TEMPLATE, tools_digest or NO_TEMPLATE)
