"""``edgepatch serve`` beside the references: it names its patches, and its answers must bear that out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepatch.llama_server.answers import NUM_LOGPROBS, Examiner, evidence_of, new_conversations, verdict
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.export import ExportOptions, open_session
from edgepatch.llama_server.findings import Report
from edgepatch.patch.file import Patch


def names_patches(server: LlamaServer) -> bool:
    """Whether this says of itself that it is ``edgepatch serve``."""
    reply = server.get("/v1/patches")
    return reply.ok and isinstance(reply.value("data"), list)


def check(server: LlamaServer, patch: Patch, model: Path, options: ExportOptions, report: Report) -> None:
    """Compares what the server says it serves with the patch, and what it answers with our own runtime.

    Raises:
        Stop: it does not serve the patch.
        InputError: the model or the patch cannot be loaded here.
    """
    entries = [entry for entry in server.get("/v1/patches").value("data") if isinstance(entry, dict)]
    active = [entry for entry in entries if entry.get("active", True)]
    names = ", ".join(str(entry.get("digest"))[:71] for entry in active) or "none"
    report.note(
        "edgepatch serve",
        [entry.get("digest") for entry in active] == [patch.digest],
        f"active patch {names}, expected {patch.digest}",
        "patch",
    )
    with open_session(model, patch, options, pinned=bool(active[0].get("pinned"))) as session:
        conversations, name = new_conversations(), server.get("/v1/models").value("data", 0, "id")
        examiner = Examiner(session, [session.tokens(messages) for messages in conversations])
        replies = [server.post("/v1/chat/completions", question(name, messages)) for messages in conversations]
        distance = examiner.distance(replies)
    if distance is None:
        report.note("answers", False, f"the server gives no log probabilities: {replies[-1].message}", "server")
        return
    hazard = verdict(distance)
    report.note("answers", not hazard, evidence_of(distance), hazard)


def question(name: Any, messages: Any) -> dict[str, Any]:
    """A request for the log-probabilities of the first token, as OpenAI has it: a field of llama-server's own would be refused."""
    return {
        "model": str(name),
        "messages": messages,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": NUM_LOGPROBS,
    }
