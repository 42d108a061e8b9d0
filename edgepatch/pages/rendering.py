"""From a page's values to its HTML: one file, no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgepatch.errors import MissingExtraError
from edgepatch.pages.blocks import Page

if TYPE_CHECKING:
    from jinja2 import Template


@cache
def _template() -> Template:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MissingExtraError("jinja2", "bench") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")


def render(page: Page) -> str:
    """The HTML of a page.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return _template().render(page=page, sections=[section for section in page.sections if section])
