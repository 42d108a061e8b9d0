"""Does a running llama-server serve the patch? Asked from outside, answered with evidence or with the hazard that prevents it.

llama-server reports success for much that is not: a restored slot may be ignored, cleared by another request, or replaced by the
labels evaluated as text. So ``cache_n`` is believed only on the first request after a restore, and log probabilities decide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import InputError
from edgepatch.llama_server import requirements
from edgepatch.llama_server.client import LlamaServer, Reply
from edgepatch.llama_server.export import ExportOptions, sliding_window
from edgepatch.llama_server.findings import Finding, Report
from edgepatch.llama_server.references import Distance, Reference, effect_of, make_references, measure
from edgepatch.llama_server.requirements import SEED_FILE, Labels
from edgepatch.patch.file import Patch

USER_1, USER_2, USER_3 = (
    "What should I say to a neighbour who is too loud?",
    "And if that does not help?",
    "Thank you. Is there more?",
)
CONVERSATION = [
    {"role": "user", "content": USER_1},
    {"role": "assistant", "content": "Ask kindly, and say what you need."},
    {"role": "user", "content": USER_2},
    {"role": "assistant", "content": "Write a letter to the landlord."},
    {"role": "user", "content": USER_3},
]
TURNS = (CONVERSATION[:1], CONVERSATION[:3], CONVERSATION)
OTHER = [{"role": "user", "content": "Tell me something about rivers and the sea."}]
FOREIGN = "A text of somebody else, which has nothing to do with the patch and begins otherwise: "
NUM_LOGPROBS = 20
OUT_OF_SERVICE = (401, 403, 503)
NO_SLOT_ACTIONS = (403, 404, 405, 501)
"""501 is llama-server's own answer without ``--slot-save-path``, the others those of a proxy that closes the path."""


class _Stop(Exception):
    """Nothing more can be learned after the last finding."""


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
    """Asks a running server. Its slots are restored at the end; conversations in them must be evaluated again.

    Args:
        server: a llama-server, or ``edgepatch serve``.
        patch: what it should serve.
        model: the GGUF file that it serves.
        options: its KV type and flash attention; the references are computed with them.
        seed_file: name of the slot file in its ``--slot-save-path``.
        client_restores: whether the client restores the slot before each conversation; then what other prompts do to it is no matter.
        fill_context: also generate beyond a slot's context, which takes as long as reading a prompt of that size.
        strict: require also what no flag of llama-server grants: that a prompt without labels leaves the seed alone.

    Raises:
        InputError: the server cannot be reached, refuses the key or is still loading.
    """
    report = Report()
    if not _is_edgepatch(server, patch, report):
        with Vocabulary(model) as vocabulary:
            check = _Check(server, patch, model, options, vocabulary, report)
            check.seed_file, check.client_restores = seed_file, client_restores
            check.fill_context, check.strict = fill_context, strict
            with contextlib.suppress(_Stop):
                check.run()
    return report


def _is_edgepatch(server: LlamaServer, patch: Patch, report: Report) -> bool:
    """Whether this is ``edgepatch serve``, which names its patch; then its word is the finding."""
    health = server.get("/health")
    if health.status in OUT_OF_SERVICE:
        raise InputError(
            f"{server.url}: {health.message}", hint="wait until it has loaded, or give the key with --api-key"
        )
    reply = server.get("/v1/patches")
    if reply.status in OUT_OF_SERVICE:
        raise InputError(f"{server.url}: {reply.message}", hint="give the key with --api-key")
    entries = reply.value("data")
    if not reply.ok or not isinstance(entries, list):
        return False
    active = [str(entry.get("digest")) for entry in entries if isinstance(entry, dict) and entry.get("active", True)]
    evidence = f"active patch {active[0] if active else 'none'}, expected {patch.digest}"
    report.findings.append(Finding("edgepatch serve", active == [patch.digest], evidence, "patch"))
    return True


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
        self.window = sliding_window(model)
        template = options.chat_template or vocabulary.chat_template
        self.labels: Labels = requirements.choose_labels(vocabulary, patch.num_virtual_tokens, template)
        self.context_length, self.num_slots, self.can_restore = 0, 1, True
        self.references: list[Reference] = []
        self.silent: list[
            Reference
        ] = []  # answered with a part of a character, for which llama-server gives no log probabilities

    @property
    def telling(self) -> Reference:
        """Of the first turns to which the server gives log probabilities, the one whose answer the patch changes more."""
        first_turns = [r for r in (self.references[0], self.references[-1]) if r not in self.silent]
        return max(first_turns or self.references, key=effect_of)

    def run(self) -> None:
        self.see_properties()
        self.see_tokenizer()
        prompts = self.see_template()
        self.references = make_references(self.model, self.patch, self.options, self.labels.ids, prompts)
        self.see_restore()
        try:
            self.see_answers()
            self.see_turns()
            self.see_others()
            if self.fill_context and self.can_restore:
                self.see_full_context()
        finally:
            if self.can_restore:
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
        self.note("llama-server", is_complete, evidence)
        self.num_slots, self.context_length = slots, positions

    def see_tokenizer(self) -> None:
        text = self.labels.text * 3 + "Hello"
        body = {"content": text, "add_special": True, "parse_special": True}
        actual, expected = (
            self.server.post("/tokenize", body).value("tokens"),
            self.vocabulary.tokenize(text, around=True),
        )
        self.note("tokenizer", actual == expected, f"expected {expected}, found {actual}", "vocabulary")

    def see_template(self) -> list[list[int]]:
        """Three turns of a conversation and another one, as the server will evaluate them behind the labels."""
        prompts, count = [], self.labels.count
        for messages in (*TURNS, OTHER):
            rendered = self.server.post("/apply-template", {"messages": messages}).value("prompt")
            tokens = requirements.prompt_ids(self.vocabulary, rendered) if isinstance(rendered, str) else []
            if tokens[:count] != self.labels.ids or len(tokens) == count:
                self.note("chat template", False, f"prompts start with {str(rendered)[:40]!r}", "template")
            prompts.append(tokens[count:])
        self.note("chat template", True, f"prompts start with {count} labels, {self.labels.text}")
        return prompts

    # What it does.

    def see_restore(self) -> None:
        reply = self.server.restore(0, self.seed_file)
        if reply.status in NO_SLOT_ACTIONS:
            self.can_restore = False
            as_found = self._distance([self._ask(reference, 0) for reference in self.references])
            evidence = "the server has none" + (
                "; it holds the seed until its next start" if as_found.is_patched else ""
            )
            self.note("slot restore", as_found.is_patched, evidence, "slots")
            return
        restored = reply.value("n_restored")
        evidence = f"{restored} of {self.labels.count} positions restored" if reply.ok else reply.message
        self.note("slot restore", restored == self.labels.count, evidence, "H7")

    def restore_all(self) -> None:
        for slot in range(self.num_slots):
            self.server.restore(slot, self.seed_file)

    def see_answers(self) -> None:
        """The first request after each restore, in slot 0: nothing has come in between."""
        replies = []
        for reference in self.references:
            if self.can_restore:
                self.server.restore(0, self.seed_file)
            replies.append(self._ask(reference, 0))
            cached = replies[-1].value("timings", "cache_n") or 0
            if cached < self.labels.count:
                self.note("first request", False, self._cached(cached), "H3" if self.window else "cache")
        self.silent = [
            reference for reference, reply in zip(self.references, replies, strict=True) if not top_logprobs(reply)
        ]
        distance = self._distance(replies)
        self.note("first request", distance.is_patched, self._cached(cached, distance), _verdict(distance))

    def see_turns(self) -> None:
        """A conversation of three turns through the chat endpoint, with one restore before the first."""
        if self.can_restore:
            self.server.restore(0, self.seed_file)
        replies, evidence = [], []
        for turn, messages in enumerate(TURNS):
            replies.append(self.server.chat(messages, slot=0, num_logprobs=NUM_LOGPROBS))
            cached = replies[-1].value("usage", "prompt_tokens_details", "cached_tokens") or 0
            evidence.append(str(cached))
            if cached < self.labels.count:
                hazard = "H3" if self.window else "hybrid" if turn else "cache"
                self.note("three turns", False, f"turn {turn + 1}: " + self._cached(cached), hazard)
        distance = self._distance(replies)
        self.note("three turns", distance.is_patched, self._cached(", ".join(evidence), distance), _verdict(distance))

    def see_new_conversation(self) -> None:
        """Another conversation in the same slot, without a restore: the server must cut its cache back to the labels."""
        evidence = self._expect_seed(self.telling, 0, "new conversation", "H3" if self.window else "hybrid")
        self.note("new conversation", True, evidence)

    def see_neighbours(self) -> None:
        """Every slot restored, then a request in each: none may have lost its seed to another."""
        if self.can_restore:
            self.restore_all()
        for slot in range(self.num_slots):
            self._expect_seed(self.telling, slot, "every slot", "H4" if self.can_restore else "slots")
        self.note("every slot", True, f"{self.num_slots} of {self.num_slots} slots answer patched")

    def see_foreign_prompt(self) -> None:
        """A prompt without labels in a slot with a long conversation, and a new conversation there without a restore."""
        self.server.restore(0, self.seed_file)
        self._ask(self.references[2], 0)
        self.server.complete(self.vocabulary.tokenize(FOREIGN * 3, around=True), slot=0)
        reply = self._ask(self.telling, 0)
        distance = self._distance([reply], [self.telling])
        evidence = self._cached(reply.value("timings", "cache_n"), distance)
        holds = distance.nearest == "patched"
        self.report.findings.append(
            Finding("after a prompt without labels", holds, evidence, "" if holds else "H5", required=self.strict)
        )
        self.server.restore(0, self.seed_file)  # at once: what is there now must not get into the server's prompt cache

    def see_full_context(self) -> None:
        """Generation beyond the slot's context must end instead of pushing the seed out."""
        self.server.restore(0, self.seed_file)
        room = self.context_length - self.labels.count - 8
        words = (self.vocabulary.tokenize(FOREIGN) * room)[:room]
        body = {"prompt": self.labels.ids + words, "id_slot": 0, "n_predict": 32, "ignore_eos": True}
        reply = self.server.post("/completion", body)
        count = reply.value("tokens_predicted")
        evidence = f"{count} tokens generated where about 8 fit" if reply.ok else reply.message
        self.note("full context", isinstance(count, int) and count < 16, evidence, "H8")

    # Evidence.

    def note(self, subject: str, holds: bool, evidence: str, hazard: str = "") -> None:
        self.report.findings.append(Finding(subject, holds, evidence, "" if holds else hazard))
        if not holds:
            raise _Stop

    def _ask(self, reference: Reference, slot: int) -> Reply:
        return self.server.complete(self.labels.ids + reference.tokens, slot, num_logprobs=NUM_LOGPROBS)

    def _distance(self, replies: Sequence[Reply], references: Sequence[Reference] = ()) -> Distance:
        pairs = [(r, top_logprobs(reply)) for r, reply in zip(references or self.references, replies, strict=False)]
        answers = [(reference, logprobs) for reference, logprobs in pairs if logprobs]
        if not answers:
            self.note("log probabilities", False, f"the server gives none: {replies[-1].message}", "model")
        return measure(answers)

    def _expect_seed(self, reference: Reference, slot: int, subject: str, hazard: str) -> str:
        """Log probabilities alone: ``cache_n`` also counts labels that were evaluated as text."""
        reply = self._ask(reference, slot)
        distance = self._distance([reply], [reference])
        evidence = f"slot {slot}: " + self._cached(reply.value("timings", "cache_n"), distance)
        if distance.nearest != "patched":
            self.note(subject, False, evidence, hazard)
        return evidence

    def _cached(self, cached: object, distance: Distance | None = None) -> str:
        text = f"{cached} positions from the cache, P is {self.labels.count}"
        if distance is not None:
            text += f"; log probabilities {distance.patched:.4f} from patched, {distance.bare:.4f} from bare"
            text += f", {distance.as_text:.4f} from placeholders as text"
        return text


def _verdict(distance: Distance) -> str:
    """The hazard that a distance speaks of; "" for none."""
    if distance.is_patched:
        return ""
    if distance.nearest == "patched":
        return "weak"
    return {"bare": "bare", "as_text": "H6"}.get(distance.nearest, "model")


def top_logprobs(reply: Reply) -> Mapping[int, float]:
    """Token id -> log probability of the first generated token; empty where the reply has none."""
    rows = reply.value("completion_probabilities", 0, "top_logprobs") or reply.value(
        "choices", 0, "logprobs", "content", 0, "top_logprobs"
    )
    logprobs = {row["id"]: float(row["logprob"]) for row in rows or [] if isinstance(row.get("id"), int)}
    return {
        token: value for token, value in logprobs.items() if value > -1e4
    }  # a probability of 0 is written as a huge number
