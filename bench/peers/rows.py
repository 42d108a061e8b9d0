"""What the table of a peer's tests holds: one row a test, with a verdict and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "refused", "not_applicable", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "refused", "not_applicable", "fail")


@dataclass(frozen=True)
class Row:
    """One test.

    Attributes:
        suite: "vocabularies", "templates" or "server".
        test: its name there.
        verdict: "refused" on purpose, "not_applicable" where the test is of something that there is not here.
        reason: empty where it passes.
    """

    suite: str
    test: str
    verdict: Verdict
    reason: str = ""


def count(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Suite -> verdict -> rows."""
    suites = dict.fromkeys(row.suite for row in rows)
    return {
        suite: {verdict: sum(row.suite == suite and row.verdict == verdict for row in rows) for verdict in VERDICTS}
        for suite in suites
    }
