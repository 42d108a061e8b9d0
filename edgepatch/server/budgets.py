"""What replies may hold in memory: so many log-probabilities a request, and so many of all requests together."""

from __future__ import annotations

from edgepatch.server.refusals import Refusal

MAX_OF_REQUEST = 2**18
"""Log-probabilities of one request, of prompts and replies; each takes about 300 bytes until the reply is written."""

MAX_OF_SERVER = 2**20


class LogprobBudget:
    """Counts the log-probabilities that all requests hold; used on the event loop alone."""

    def __init__(self) -> None:
        self._num_held = 0

    def open(self) -> Account:
        """The account of one request."""
        return Account(self)

    def take(self, count: int) -> None:
        """Counts some more.

        Raises:
            Refusal: 503, all requests together hold too many.
        """
        if self._num_held + count > MAX_OF_SERVER:
            raise Refusal(503, "too many log-probabilities are asked for at once; try again later", code="queue_full")
        self._num_held += count

    def give_back(self, count: int) -> None:
        """Counts some off."""
        self._num_held -= count


class Account:
    """The log-probabilities of one request.

    Args:
        budget: of all requests.
    """

    def __init__(self, budget: LogprobBudget) -> None:
        self._budget, self._num_held = budget, 0

    def take(self, count: int) -> None:
        """Counts some more.

        Raises:
            Refusal: 400, the request alone asks for too many; 503, all requests together do.
        """
        if self._num_held + count > MAX_OF_REQUEST:
            raise Refusal(
                400,
                f"logprobs: expected at most {MAX_OF_REQUEST} in all prompts and replies, found more; ask for fewer prompts, "
                "tokens or top_logprobs at once",
                "logprobs",
                "too_many_logprobs",
            )
        self._budget.take(count)
        self._num_held += count

    def close(self) -> None:
        """Gives all back."""
        self._budget.give_back(self._num_held)
        self._num_held = 0
