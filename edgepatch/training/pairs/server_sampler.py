"""Continuations from an OpenAI-compatible server: vLLM, llama-server, ``edgepatch serve``, OpenAI's own service.

Every continuation is a request of its own with a random seed of its own (``n`` is not known to every server, and a seed tells
choices apart on all of them); a server that caches prompts evaluates the prompt once. Requests of several prompts are under
way at once, never more than ``num_parallel``.
"""

from __future__ import annotations

import asyncio
import random
import threading
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.training.pairs.files import PairPrompt
from edgepatch.training.pairs.samplers import PromptTooLongError, Sampler

if TYPE_CHECKING:
    import httpx

SENT = ("temperature", "top_p")
"""Of the sampling, where it says so; what it leaves open is the server's to say."""

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""The server is busy, starting or behind a proxy that lost it: the same request may succeed later."""

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
BEGIN_S = 0.01
"""Within which a request that was sent has begun to connect."""

TOO_LONG = ("context_length", "context length", "context size", "exceed_context")
"""What servers write where a prompt does not fit, in code, type or message."""

T = TypeVar("T")


def is_url(source: str) -> bool:
    """Whether a model is named by an address rather than a path."""
    return source.startswith(("http://", "https://"))


def _base_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"server: expected a URL like http://127.0.0.1:8000/v1, found {url!r}")
    if parts.username is not None:
        raise InputError(
            "server: expected a URL without a user or password", hint="name a variable that holds the API key"
        )
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _problem(reply: httpx.Response) -> dict[str, str]:
    """What a server says of a refused request: message, type and code, as far as it says it in OpenAI's form."""
    try:
        body = reply.json()
    except ValueError:
        body = {}
    error = body.get("error", body) if isinstance(body, Mapping) else {}
    error = error if isinstance(error, Mapping) else {"message": error}
    details = {name: str(error[name]) for name in ("message", "type", "code") if error.get(name)}
    return {"message": reply.text[:300].strip() or reply.reason_phrase} | details


class ServerSampler(Sampler):
    """Asks a server for continuations: ``/completions`` for plain text, ``/chat/completions`` for messages.

    Args:
        url: "http://127.0.0.1:8000/v1"; "/v1" may be left out.
        model: the server's name for the model; "" takes the one model that it serves.
        api_key: sent as a bearer token.
        num_parallel: requests under way at once.
        timeout_s: of one request.
        num_tries: of each request, with growing pauses, while the server is busy or cannot be reached.

    Raises:
        InputError: no URL of a server, the server does not answer, refuses the key or serves several models.
        MissingExtraError: httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        api_key: str = "",
        num_parallel: int = 8,
        timeout_s: float = 600,
        num_tries: int = 6,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise MissingExtraError("httpx", "pairs") from None
        self.url, self.lookahead, self._num_tries = _base_url(url), num_parallel, num_tries
        self._answers_as: object = None
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=num_parallel)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=limits)
        self._slots = asyncio.Semaphore(num_parallel)
        self._loop = asyncio.new_event_loop()
        # Requests run aside in a loop of their own, so that Ctrl-C interrupts waiting for them and ``close`` cancels them.
        self._thread = threading.Thread(target=self._loop.run_forever, name="sampling", daemon=True)
        self._thread.start()
        try:
            self.model = model or self._run(self._only_model()).result()
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> dict[str, str]:
        """The address and the server's name for the model; whether it serves the same weights tomorrow, nobody can tell."""
        return {"server": self.url, "model": self.model}

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _only_model(self) -> str:
        body = await self._send("GET", "models", None, num_tries=1)
        names = [str(entry.get("id")) for entry in body.get("data") or [] if isinstance(entry, Mapping)]
        if len(names) != 1:
            raise InputError(
                f"{self.url} serves {len(names)} models: {', '.join(names[:8]) or 'none'}", hint="name the model"
            )
        return names[0]

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, num_tries: int) -> dict[str, Any]:
        """The JSON object that the server answers with, once it does."""
        import httpx

        problem, wait_s = "", FIRST_WAIT_S
        for attempt in range(num_tries):
            if attempt:
                await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
                wait_s = min(wait_s * 2, LONGEST_WAIT_S)
            try:
                reply = await self._client.request(method, f"{self.url}/{path}", json=body)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
                continue
            if reply.status_code == 200:
                return self._parsed(reply)
            if reply.status_code not in RETRIED:
                raise self._refusal(reply, path)
            problem = f"HTTP {reply.status_code}: {_problem(reply)['message']}"
            wait_s = max(wait_s, _retry_after(reply))
        tries = f" after {num_tries} tries" if num_tries > 1 else ""
        raise InputError(
            f"{self.url}/{path} does not answer{tries}: {problem}", hint="check that the server is running and has room"
        )

    def _parsed(self, reply: httpx.Response) -> dict[str, Any]:
        try:
            body = reply.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise InputError(
                f"{reply.url}: expected a JSON object, found {reply.text[:100]!r}",
                hint="is this an OpenAI-compatible server?",
            )
        return body

    def _refusal(self, reply: httpx.Response, path: str) -> InputError:
        problem = _problem(reply)
        message = f"{self.url}/{path} refuses: HTTP {reply.status_code}: {problem['message']}"
        if reply.status_code in (400, 413, 422) and any(
            word in " ".join(problem.values()).lower() for word in TOO_LONG
        ):
            return PromptTooLongError(message)
        hints = {
            401: "name the variable that holds the API key",
            403: "name the variable that holds the API key",
            404: "check the URL (it mostly ends in /v1) and the model's name",
        }
        return InputError(message, hints.get(reply.status_code, ""))

    async def _continue(self, prompt: PairPrompt, sampling: Sampling, rng_seed: int) -> str:
        path = "completions" if isinstance(prompt, str) else "chat/completions"
        body = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "seed": rng_seed,
            **{name: value for name in SENT if (value := getattr(sampling, name)) is not None},
            **({"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(message) for message in prompt]}),
        }
        async with self._slots:
            reply = await self._send("POST", path, body, self._num_tries)
        self._require_same_model(reply.get("model"))
        try:
            choice = reply["choices"][0]
            text = choice["text"] if isinstance(prompt, str) else choice["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise InputError(f"{self.url}/{path}: expected choices with a text, found {str(reply)[:200]}")
        return text

    def _require_same_model(self, name: object) -> None:
        """Servers may answer by an alias, but not by one model first and by another later."""
        self._answers_as = self._answers_as or name
        if name and name != self._answers_as:
            raise InputError(
                f"{self.url} answered as {self._answers_as}, and now as {name}: the pairs would be of two models",
                hint="let the server serve one model, and begin again with --restart",
            )

    def start(self, prompt: PairPrompt, sampling: Sampling, count: int) -> Callable[[], list[str]]:
        """Sends the requests."""
        first = sampling.rng_seed if sampling.rng_seed is not None else random.getrandbits(31)
        answers = [self._run(self._continue(prompt, sampling, first + i)) for i in range(count)]
        return lambda: [answer.result() for answer in answers]

    def sample(self, prompt: PairPrompt, sampling: Sampling, count: int) -> list[str]:
        """As the base class says; of ``sampling``, length, temperature, top-p and random seed are sent."""
        return self.start(prompt, sampling, count)()

    def close(self) -> None:
        """Cancels the requests under way."""
        if self._loop.is_closed():
            return
        self._run(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        # The HTTP client connects in tasks of its own, and one that is cancelled before it began complains when it is collected.
        await asyncio.sleep(BEGIN_S)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


def _retry_after(reply: httpx.Response) -> float:
    """Seconds that the server asks for; 0 where it asks for none, or for a date."""
    asked = reply.headers.get("retry-after", "")
    return min(float(asked), LONGEST_WAIT_S) if asked.isdigit() else 0.0
