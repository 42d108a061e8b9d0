"""Does a running llama-server serve the patch? Asked from outside, answered with evidence or with the hazard that prevents it.

llama-server reports success for much that is not: a restored slot may be ignored, cleared by another request, or hold a conversation
that was evaluated before. So nothing that it says of itself counts: the log probabilities of its answers decide, beside those of our own
runtime with the patch and without. It is first asked as it is found; only then are its slots restored.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import InputError
from edgepatch.llama_server import requirements, served
from edgepatch.llama_server.answers import NUM_LOGPROBS, TURNS, Examiner, evidence_of, new_conversations, verdict
from edgepatch.llama_server.client import LlamaServer, Reply
from edgepatch.llama_server.export import ExportOptions, open_session, window_of
from edgepatch.llama_server.findings import Report, Stop
from edgepatch.llama_server.references import Distance, Reference
from edgepatch.llama_server.requirements import SEED_FILE, Label
from edgepatch.patch.file import Patch

FOREIGN = "A text of somebody else, which has nothing to do with the patch and begins otherwise: "
OUT_OF_SERVICE = (401, 403, 503)
NO_SLOT_ACTIONS = (403, 404, 405, 501)
"""501 is llama-server's own answer without ``--slot-save-path``, the others those of a proxy that closes the path."""


def check_server(
    server: LlamaServer,
    patch: Patch,
    model: Path,
    options: ExportOptions,
    *,
    seed_file: str = SEED_FILE,
    client_restores: bool = False,
    fill_context: bool = False,
    strict: bool = False,
) -> Report:
    """Asks a running server. One that answers patched as it is found has its slots restored at the end; conversations in them must be
    evaluated again.

    Args:
        server: a llama-server, or ``edgepatch serve``.
        patch: what it should serve.
        model: the GGUF file that it serves.
        options: its KV type and flash attention; the references are computed with them.
        seed_file: name of the slot file in its ``--slot-save-path``.
        client_restores: whether the client restores the slot before each conversation; then what a slot holds before is no matter.
        fill_context: also generate beyond a slot's context, which takes as long as reading a prompt of that size.
        strict: require also what no flag of llama-server grants: that a prompt without the first token leaves the seed alone.

    Raises:
        InputError: the server cannot be reached, refuses the key or is still loading.
    """
    report = Report()
    with contextlib.suppress(Stop):
        _require_service(server)
        if served.names_patches(server):
            served.check(server, patch, model, options, report)
            return report
        with Vocabulary(model) as vocabulary:
            check = _Check(server, patch, model, options, vocabulary, report)
            check.seed_file, check.client_restores = seed_file, client_restores
            check.fill_context, check.strict = fill_context, strict
            check.run()
    return report


def _require_service(server: LlamaServer) -> None:
    for path, hint in (("/health", "wait until it has loaded, or name its key"), ("/v1/patches", "name its key")):
        reply = server.get(path)
        if reply.status in OUT_OF_SERVICE:
            raise InputError(f"{server.url}: {reply.message}", f"{hint}: --api-key-file, or LLAMA_API_KEY")


class _Check:
    def __init__(
        self,
        server: LlamaServer,
        patch: Patch,
        model: Path,
        options: ExportOptions,
        vocabulary: Vocabulary,
        report: Report,
    ) -> None:
        self.server, self.vocabulary, self.report = server, vocabulary, report
        self.seed_file, self.client_restores, self.fill_context, self.strict = SEED_FILE, False, False, False
        self.patch, self.model, self.options = patch, model, options
        self.label: Label = requirements.choose_label(vocabulary, options.chat_template or vocabulary.chat_template)
        self.context_length, self.num_slots, self.can_restore, self.window = 0, 1, True, 0
        self.examiner: Examiner

    def run(self) -> None:
        self.see_properties()
        self.see_tokenizer()
        prompts = self.see_template()
        with open_session(self.model, self.patch, self.options) as session:
            self.examiner, self.window = Examiner(session, prompts), window_of(session)
            self.ask()

    def ask(self) -> None:
        if not self.client_restores:
            self.see_as_found()
        self.see_restore()
        try:
            self.see_answers()
            self.see_turns()
            self.see_others()
            if self.fill_context and self.can_restore:
                self.see_full_context()
        finally:
            self.restore_all()

    def see_others(self) -> None:
        """What other requests do to the seed."""
        if not self.client_restores:
            self.see_new_conversation()
        self.see_neighbours()
        if self.can_restore and not self.client_restores:  # else the seed would stay lost
            self.see_foreign_prompt()

    # What the server says of itself.

    def see_properties(self) -> None:
        reply = self.server.get("/props")
        slots, positions = reply.value("total_slots"), reply.value("default_generation_settings", "n_ctx")
        is_complete = reply.ok and isinstance(slots, int) and isinstance(positions, int)
        evidence = (
            f"{slots} slots of {positions} positions, build {reply.value('build_info')}"
            if is_complete
            else reply.message
        )
        self.report.note("llama-server", is_complete, evidence, "server")
        self.num_slots, self.context_length = slots, positions

    def see_tokenizer(self) -> None:
        text = self.label.text * 3 + "Hello"
        body = {"content": text, "add_special": True, "parse_special": True}
        actual, expected = (
            self.server.post("/tokenize", body).value("tokens"),
            self.vocabulary.tokenize(text, around=True),
        )
        self.report.note(
            "tokenizer", actual == expected, f"expected {expected}, found {str(actual)[:200]}", "vocabulary"
        )

    def see_template(self) -> list[list[int]]:
        """The conversations that are asked, as the server will evaluate them."""
        prompts = []
        for messages in new_conversations():
            rendered = self.server.post("/apply-template", {"messages": messages}).value("prompt")
            tokens = requirements.prompt_ids(self.vocabulary, rendered) if isinstance(rendered, str) else []
            if tokens[:1] != [self.label.token] or len(tokens) == 1:
                evidence = f"expected prompts that start with {self.label.text!r}, found {str(rendered)[:40]!r}"
                self.report.note("chat template", False, evidence, "template")
            prompts.append(tokens)
        self.report.note("chat template", True, f"prompts start with {self.label.text!r}, the label of the seed")
        return prompts

    # What it does.

    def see_as_found(self) -> None:
        """Every slot, before anything is restored: what clients get now."""
        self._require_patched("as found", [self._ask(reference, 0) for reference in self.examiner.references])
        for slot in range(1, self.num_slots):
            self._require_seed(self.examiner.telling, slot, "as found", "")

    def see_restore(self) -> None:
        reply = self.server.restore(0, self.seed_file)
        if reply.status in NO_SLOT_ACTIONS:
            self.can_restore = False
            self.report.note(
                "slot restore", not self.client_restores, "none; the seed is there until the next start", "slots"
            )
            return
        restored = reply.value("n_restored")
        evidence = f"{restored} positions restored, expected 1" if reply.ok else reply.message
        self.report.note("slot restore", restored == 1, evidence, "H7")

    def restore_all(self) -> None:
        if self.can_restore:
            for slot in range(self.num_slots):
                self.server.restore(slot, self.seed_file)

    def see_answers(self) -> None:
        """The first request after each restore, in slot 0: nothing has come in between."""
        replies = []
        for reference in self.examiner.references:
            if self.can_restore:
                self.server.restore(0, self.seed_file)
            replies.append(self._ask(reference, 0))
        is_cached = bool(replies[-1].value("timings", "cache_n"))
        hazard = "H3" if self.window else "bare" if is_cached else "cache"
        self._require_patched("first request", replies, hazard)

    def see_turns(self) -> None:
        """A conversation of three turns through the chat endpoint, with one restore before the first."""
        if self.can_restore:
            self.server.restore(0, self.seed_file)
        replies = [self.server.chat(messages, slot=0, num_logprobs=NUM_LOGPROBS) for messages in TURNS]
        self._require_patched(
            "three turns", replies, "H3" if self.window else "bare", self.examiner.references[: len(TURNS)]
        )

    def see_new_conversation(self) -> None:
        """Another conversation in the same slot, without a restore: the server must cut its cache back to the label."""
        evidence = self._require_seed(self.examiner.telling, 0, "new conversation", "H3" if self.window else "")
        self.report.note("new conversation", True, evidence)

    def see_neighbours(self) -> None:
        """Every slot restored, then a request in each: none may have lost its seed to another."""
        self.restore_all()
        for slot in range(self.num_slots):
            self._require_seed(self.examiner.telling, slot, "every slot", "H4")
        self.report.note("every slot", True, f"{self.num_slots} of {self.num_slots} slots answer patched")

    def see_foreign_prompt(self) -> None:
        """A prompt without the first token in a slot with a long conversation, and a new conversation there without a restore."""
        self.server.restore(0, self.seed_file)
        self._ask(self.examiner.references[len(TURNS) - 1], 0)
        self.server.complete(self.vocabulary.tokenize(FOREIGN * 3), slot=0)
        reply = self._ask(self.examiner.telling, 0)
        distance = _distance_of(self, [reply], [self.examiner.telling])
        holds, evidence = distance.nearest == "patched", self._cached(reply, distance)
        self.report.add("after a prompt without the first token", holds, evidence, "H5", required=self.strict)
        self.server.restore(0, self.seed_file)  # at once: what is there now must not get into the server's prompt cache

    def see_full_context(self) -> None:
        """Generation beyond the slot's context must not push the seed out."""
        self.server.restore(0, self.seed_file)
        room = self.context_length - 8
        words = [self.label.token, *(self.vocabulary.tokenize(FOREIGN) * room)][:room]
        body = {"prompt": words, "id_slot": 0, "n_predict": 32, "ignore_eos": True}
        count = self.server.post("/completion", body).value("tokens_predicted")
        evidence = self._require_seed(self.examiner.telling, 0, "full context", "H8")
        self.report.note("full context", True, f"{count} tokens generated where about 8 fit; then {evidence}")

    # Evidence.

    def _ask(self, reference: Reference, slot: int) -> Reply:
        return self.server.complete(reference.tokens, slot, num_logprobs=NUM_LOGPROBS)

    def _require_patched(
        self, subject: str, replies: list[Reply], if_bare: str = "bare", references: list[Reference] | None = None
    ) -> None:
        """Several prompts together: the effect must be large enough to tell."""
        distance = _distance_of(self, replies, references or self.examiner.references)
        hazard = verdict(distance)
        self.report.note(
            subject, not hazard, self._cached(replies[-1], distance), if_bare if hazard == "bare" else hazard
        )

    def _require_seed(self, reference: Reference, slot: int, subject: str, if_bare: str) -> str:
        """One prompt, the most telling one."""
        reply = self._ask(reference, slot)
        distance = _distance_of(self, [reply], [reference])
        evidence = f"slot {slot}: {self._cached(reply, distance)}"
        if distance.nearest != "patched":
            hazard = if_bare if if_bare and distance.nearest == "bare" else verdict(distance)
            self.report.note(subject, False, evidence, hazard)
        return evidence

    def _cached(self, reply: Reply, distance: Distance) -> str:
        cached = reply.value("timings", "cache_n")
        if cached is None:
            cached = reply.value("usage", "prompt_tokens_details", "cached_tokens")
        return f"{cached} tokens from the cache; {evidence_of(distance)}"


def _distance_of(check: _Check, replies: list[Reply], references: list[Reference]) -> Distance:
    distance = check.examiner.distance(replies, references)
    if distance is None:
        check.report.note("log probabilities", False, f"the server gives none: {replies[-1].message}", "server")
        raise Stop
    return distance
