"""What a check of a server found, and the hazards that explain what does not hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

HAZARDS = {
    "H3": "the model has a sliding window, and the server drops a restored slot; start it with --swa-full",
    "H4": "a request on one slot clears the idle ones; start it with --no-cache-idle-slots and restore every slot",
    "H5": "a prompt that does not start with the first token of all others evicts the seed; offer clients /v1/chat/completions alone, or "
    "restore after it",
    "H7": "the server refuses the slot file: it is not in --slot-save-path, or flash attention, KV types, --kv-unified or version are "
    "not those of the export; use the flags of start.sh, or export with --server and --slot-dir",
    "H8": "a full context is shifted, and the seed goes first; start it with --no-context-shift",
    "slots": "the server has no slot restore; start it with --slot-save-path DIR",
    "template": "the chat template does not start with the token of the export; serve the same GGUF file with --jinja and without another "
    "template, or export with --chat-template FILE",
    "vocabulary": "the server tokenizes otherwise than the model file; serve the same GGUF file",
    "bare": "the server answers as the bare model does; start it with start.sh and run restore.sh: after each start, and after a prompt "
    "that began otherwise",
    "other": "the answers fit neither the patched nor the bare model: another patch, other weights, or flags such as --lora or --rope-*; "
    "export for this very file, run restore.sh, and check again",
    "patch": "the server holds another patch, or none",
    "server": "this is no llama-server, or one that answers without log probabilities",
    "weak": "the patch changes the next token of the test prompts too little to tell",
    "cache": "the server does not reuse its cache; start it without --no-cache-prompt",
}


class Stop(Exception):
    """Nothing more can be learned after the last finding."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        holds: whether it is as it must be.
        evidence: what was seen.
        hazard: key of ``HAZARDS`` where it does not hold.
        required: whether the proof fails with it; else it is a limit that no flag of llama-server removes.
    """

    subject: str
    holds: bool
    evidence: str
    hazard: str = ""
    required: bool = True

    @property
    def remedy(self) -> str:
        """What is wrong, and the flag that mends it; empty where it holds."""
        return HAZARDS.get(self.hazard, "") if not self.holds else ""


@dataclass
class Report:
    """The findings, in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, subject: str, holds: bool, evidence: str, hazard: str = "", required: bool = True) -> None:
        """Writes a finding down; ``hazard`` is what it speaks of where it does not hold."""
        self.findings.append(Finding(subject, holds, evidence, "" if holds else hazard, required))

    def note(self, subject: str, holds: bool, evidence: str, hazard: str = "") -> None:
        """Writes down a finding without which there is no proof.

        Raises:
            Stop: it does not hold.
        """
        self.add(subject, holds, evidence, hazard)
        if not holds:
            raise Stop

    @property
    def proven(self) -> bool:
        """Whether everything required holds."""
        return bool(self.findings) and self.failed is None

    @property
    def failed(self) -> Finding | None:
        """The first finding that is required and does not hold."""
        return next((finding for finding in self.findings if finding.required and not finding.holds), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"proven": self.proven, "findings": [asdict(f) | {"remedy": f.remedy} for f in self.findings]}
