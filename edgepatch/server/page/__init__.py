"""The page for people: a chat of one file. Nothing but its own script and style may run in it, and it talks to this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
COMPARES, DOES_NOT = 'data-compare="yes"', 'data-compare="no"'


def chat_page(compares: bool) -> HTMLResponse:
    """The page; it holds nothing of the model, so it needs no key.

    Args:
        compares: whether the server answers without the patch as well.
    """
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text.replace(DOES_NOT, COMPARES) if compares else text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The page and the policy that lets its own script and style run."""
    text = files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
    return text, POLICY.format(script=_hash(text, "script"), style=_hash(text, "style"))


def _hash(text: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
