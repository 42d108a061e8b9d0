"""What the programs share: where the server is, one schema and one function, and a line of JSON for each case."""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel

URL, KEY, MODEL = (os.environ[name] for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "EDGEPATCH_MODEL"))
QUESTION = "What is the capital of Italy?"
TOWNS = ("Rome", "Ulm")
MAX_NOTE = 300


class Answer(BaseModel):
    """The answer to a question."""

    town: Literal["Rome", "Ulm"]
    is_sure: bool


def get_weather(town: Literal["Rome", "Ulm"]) -> str:
    """The weather of a town.

    Args:
        town: its name.
    """
    return f"It rains in {town}."


WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"town": {"type": "string", "enum": list(TOWNS)}},
    "required": ["town"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a town.",
    "parameters": WEATHER_SCHEMA,
}


def require(holds: object, what: str) -> None:
    """Raises:
    AssertionError: it does not hold.
    """
    if not holds:
        raise AssertionError(what)


class Cases:
    """The cases of one client, each printed as it ends.

    Args:
        client: its distribution.
    """

    def __init__(self, client: str) -> None:
        self._client, self._version = client, version(client)

    def run(self, name: str, check: Callable[[], object]) -> None:
        """Runs one case; what it raises is its failure."""
        try:
            check()
            verdict, note = "pass", ""
        except Exception as error:  # whatever a client's library may raise
            verdict, note = "fail", f"{type(error).__name__}: {error}"[:MAX_NOTE]
        row = {"client": self._client, "version": self._version, "case": name, "verdict": verdict, "note": note}
        print(json.dumps(row), flush=True)
