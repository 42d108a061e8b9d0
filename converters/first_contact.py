"""The first time that a library build, a CPU and a file meet: a child process tries them, and what came of it is remembered.

A C library can end its process over a file, a CPU or a setting that it has never met; no parser in front of it foresees all of that.
So whatever hands a foreign file to llama.cpp or ONNX Runtime proves it here first. Only success is remembered: what failed is
tried again at the next start.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from edgepatch.converters import machine_identity
from edgepatch.converters.machine_identity import cache_folder, digest_of, keep_memory, read_memory
from edgepatch.errors import InputError, UnfitModelError
from edgepatch.processes import run_apart

PROOF_VERSION = 1
"""Raised when a trial tries more than before: what an earlier release has proved is proved again."""

DEADLINE_VARIABLE = "EDGEPATCH_FIRST_CONTACT_DEADLINE_S"
BASE_DEADLINE_S, DEADLINE_BYTES_PER_S = 60.0, 20e6
NOTICE_S = 2.0
"""A trial that takes longer is announced."""

HASHED_FIRST = 32 * 2**20
"""Bytes up to which a file's digest is known before a child has started."""

MAX_CHANGES = 3
QUIETLY = {"GGML_NO_BACKTRACE": "1"}  # a child that dies is not examined with a debugger, which takes seconds
LIBRARIES = {"llama_cpp": "llama.cpp", "onnxruntime": "ONNX Runtime"}
MEMORY = "first_contact"

Report = Callable[[str], None]
"""In a child: says what it does next, as the end of a sentence that starts with "while": "evaluating 64 tokens"."""

logger = logging.getLogger("edgepatch.first_contact")
_is_trial = False


def in_trial() -> bool:
    """Whether this process is a child that tries something: it is there to die, and nothing is proved for it."""
    return _is_trial


@dataclass(frozen=True)
class Contact:
    """What meets.

    Attributes:
        package: the library's, as it is imported: "llama_cpp" or "onnxruntime".
        trial: "module:function", called in the child with the files' paths, the settings and a ``Report``. It returns a JSON object, and
            raises ``UnfitModelError`` where the library computes no numbers.
        files: all that the library reads, the one that names them first; none for the library alone.
        settings: JSON values that the trial and the use share; another value is another contact.
        details: further values for the trial, of which any is as good as another.
    """

    package: str
    trial: str
    files: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """Its name for people."""
        return LIBRARIES[self.package]

    @property
    def title(self) -> str:
        """Of the first file, or of the library."""
        return str(self.files[0]) if self.files else self.library

    def signature(self) -> list[list[Any]]:
        """Of all files."""
        return machine_identity.signature(self.files)


@dataclass(frozen=True)
class Failure:
    """Why a trial came to no good end.

    Attributes:
        words: the end of a sentence that starts with the library's name: "died of SIGSEGV while evaluating 1 token".
        stage: what it was doing.
        signal: the name of the signal that ended it, else "".
    """

    words: str
    stage: str = ""
    signal: str = ""

    @property
    def is_passing(self) -> bool:
        """Whether it says more of the moment than of the file: the system ends what takes too much memory."""
        return self.signal == "SIGKILL"

    @property
    def is_late(self) -> bool:
        """Whether it did not answer in time."""
        return not self.signal and self.words.startswith("did not answer")


@dataclass(frozen=True)
class Proof:
    """A library has opened files and computed with them, in a child.

    Attributes:
        contact: what was tried.
        signed: signature of the files from before.
        answer: what the trial told.
        note: what there is to say of it to the user: what is slower or off, why, and what mends it; "" when all is well.
    """

    contact: Contact
    signed: list[list[Any]]
    answer: dict[str, Any]
    note: str = ""

    def holds(self) -> bool:
        """Whether the files are still those that were tried."""
        return self.contact.signature() == self.signed


@dataclass(frozen=True)
class Way:
    """One way to try a contact.

    Attributes:
        settings: of the trial, besides the contact's.
        words: what is different from the first way: "without repacked weights".
        note: what to tell the user, made of the failure of the first way.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    words: str = ""
    note: Callable[[Failure], str] = lambda failure: ""


Next = Callable[[Sequence[Failure]], Way | None]
"""The next way to try after some have failed; ``None`` where there is none left."""


def _only_once(failures: Sequence[Failure]) -> Way | None:
    return None if failures else Way()


def prove(contact: Contact, next_way: Next = _only_once, implies: Sequence[Contact] = ()) -> Proof:
    """What is known of a contact, or a trial in a child where nothing is. Ctrl-C ends the child where the main thread calls.

    Args:
        contact: what meets.
        next_way: how to try; by default once, with the contact's own settings.
        implies: contacts of the same files that are proved with this one.

    Raises:
        UnfitModelError: the library died, hung or computed no numbers in every way.
        EdgepatchError: the library, or the trial, refused the file in good order.
    """
    signed = contact.signature()
    digest = machine_identity.remembered_content(signed)
    if digest is None and sum(entry[1] for entry in signed) <= HASHED_FIRST:
        digest = machine_identity.hash_content(contact.files, signed)
    record = _recall(contact, digest) if digest is not None else None
    if record is None:
        record = _try(contact, next_way, digest, signed, implies)
    proof = Proof(contact, signed, record["answer"], record["note"])
    if proof.note:
        logger.warning("%s", proof.note)
    return proof


def _try(
    contact: Contact, next_way: Next, digest: str | None, signed: list[list[Any]], implies: Sequence[Contact]
) -> dict[str, Any]:
    """Tries one way after the other, and remembers what works; a large file is hashed meanwhile."""
    ended = threading.Event()
    with ThreadPoolExecutor(1) as hashing, _set_at_end(ended):
        is_unhashed = digest is None
        hashed = hashing.submit(machine_identity.hash_content, contact.files, signed, ended) if is_unhashed else None
        way, answer, failures = _first_that_works(contact, next_way)
        record = {"answer": answer, "note": way.note(failures[0]) if failures else ""}
        content = hashed.result() if hashed is not None else digest
    assert content is not None
    if contact.signature() == signed and not any(failure.is_passing for failure in failures):
        for proved in (contact, *implies, Contact(contact.package, "")):
            _keep(proved, content, record if proved is contact else {"answer": {}, "note": ""})
    return record


def _first_that_works(contact: Contact, next_way: Next) -> tuple[Way, dict[str, Any], list[Failure]]:
    """The way, what its trial answered, and how those before it failed."""
    failures: list[Failure] = []
    tried: list[Way] = []
    while (way := next_way(failures)) is not None:
        outcome = try_apart(contact, way.settings)
        if not isinstance(outcome, Failure):
            return way, outcome, failures
        failures.append(outcome)
        tried.append(way)
    raise _unfit(contact, tried, failures)


@contextmanager
def _set_at_end(ended: threading.Event) -> Iterator[None]:
    """Nobody waits for a digest once the trial has failed or was interrupted."""
    try:
        yield
    finally:
        ended.set()


def _unfit(contact: Contact, tried: Sequence[Way], failures: Sequence[Failure]) -> UnfitModelError:
    words = [failures[0].words]
    for way, failure in zip(tried[1:], failures[1:], strict=True):
        words.append(f"{way.words} too" if failure.words == failures[0].words else f"{way.words} it {failure.words}")
    last = failures[-1]
    hint = "get it again; where that does not help, see docs/reference/runtimes.md, The first time that a file meets a machine"
    if last.is_passing:
        hint = "the system may have ended it for want of memory: free some, or take a smaller model"
    elif last.is_late:
        hint = f"give it longer: {DEADLINE_VARIABLE}=SECONDS, or take fewer threads where the machine is busy"
    message = f"{contact.title} cannot be used on this machine: {contact.library} {', '.join(words)}"
    return UnfitModelError(message, hint)


# The child.


def try_apart(
    contact: Contact,
    settings: Mapping[str, Any],
    deadline_s: float | None = None,
    hear: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any] | Failure:
    """Calls a contact's trial in a child.

    Args:
        contact: what to try.
        settings: besides the contact's own.
        deadline_s: by default a minute, and a second for each 20 MB; the variable overrules it.
        hear: told, from another thread, what the child does next.

    Returns:
        What it answered, or why it did not.

    Raises:
        EdgepatchError: what the trial raised on purpose, but for ``UnfitModelError``, which is a failure.
    """
    reading, writing = os.pipe()
    request = {
        "trial": contact.trial,
        "files": [str(file) for file in contact.files],
        "settings": {**contact.settings, **contact.details, **settings},
        "stages": writing,
    }
    with ExitStack() as stack:
        stages = stack.enter_context(os.fdopen(reading, "r", encoding="utf-8", errors="replace"))
        stack.enter_context(_announced(contact))
        lines: list[str] = []
        listener = threading.Thread(target=_listen, args=(stages, lines, hear), daemon=True)
        listener.start()
        try:
            outcome = run_apart(
                f"{__name__}:answer",
                request,
                deadline_s=_deadline(contact, deadline_s),
                environment=QUIETLY,
                pass_fds=(writing,),
            )
        finally:
            os.close(writing)
            listener.join()
    stage = lines[-1] if lines else ""
    while_doing = f" while {stage}" if stage else ""
    if isinstance(outcome.error, UnfitModelError):
        return Failure(str(outcome.error), stage)
    if outcome.error is not None:
        raise outcome.error
    if outcome.failure:
        return Failure(outcome.failure + while_doing, stage, outcome.signal)
    return dict(outcome.value)


def _listen(stages: TextIO, lines: list[str], hear: Callable[[str], None]) -> None:
    """Collects what a child says until it is gone."""
    for line in stages:
        lines.append(line.rstrip("\n"))
        hear(lines[-1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: calls the trial."""
    global _is_trial
    _is_trial = True

    def report(stage: str) -> None:
        os.write(request["stages"], f"{stage}\n".encode())

    module, _, function = request["trial"].partition(":")
    trial = getattr(import_module(module), function)
    answer: dict[str, Any] = trial([Path(file) for file in request["files"]], request["settings"], report)
    return answer


def _deadline(contact: Contact, by_default: float | None) -> float:
    setting = os.environ.get(DEADLINE_VARIABLE)
    if setting:
        try:
            seconds = float(setting)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise InputError(f"{DEADLINE_VARIABLE}: expected a number of seconds, found {setting!r}")
        return seconds
    if by_default is not None:
        return by_default
    return BASE_DEADLINE_S + float(sum(entry[1] for entry in contact.signature())) / DEADLINE_BYTES_PER_S


@contextmanager
def _announced(contact: Contact) -> Iterator[None]:
    """Says so where a trial takes longer than a moment."""
    words = f"first contact with {contact.title} on this machine: trying it in a child process ..."
    timer = threading.Timer(NOTICE_S, logger.info, ("%s", words))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# The memory.


def _file(contact: Contact, content: str) -> Path:
    """Where the outcome of a contact is kept; another file for whatever could change the outcome."""
    facts = [PROOF_VERSION, machine_identity.machine(contact.package), contact.trial, dict(contact.settings)]
    return cache_folder() / MEMORY / f"{digest_of([*facts, content if contact.files else ''])}.json"


def _recall(contact: Contact, content: str) -> dict[str, Any] | None:
    file = _file(contact, content)
    memory = read_memory(file)
    if memory.get("key") != file.stem or not isinstance(memory.get("answer"), dict):
        return None
    return memory if isinstance(memory.get("note"), str) else None


def _keep(contact: Contact, content: str, record: dict[str, Any]) -> None:
    file = _file(contact, content)
    if contact.files or not file.exists():
        machine = machine_identity.machine(contact.package)
        names = [os.path.realpath(path) for path in contact.files]
        keep_memory(file, {"key": file.stem, "machine": machine, "package": contact.package, "files": names, **record})


def require_library(package: str, trial: str) -> None:
    """Proves that a C library can be loaded on this CPU, before this process loads it.

    Args:
        package: the library's.
        trial: loads it.

    Raises:
        UnfitModelError: it cannot be loaded.
        EdgepatchError: it says why not.
    """
    contact = Contact(package, "")
    if in_trial() or _recall(contact, "") is not None:
        return
    outcome = try_apart(Contact(package, trial), {})
    if isinstance(outcome, Failure):
        hint = "install it again so that it is built for this CPU; edgepatch doctor says what it can do"
        raise UnfitModelError(f"{contact.library} {outcome.words}", hint)
    _keep(contact, "", {"answer": {}, "note": ""})


def open_proved(proving: Callable[[], Proof], opening: Callable[[Proof], Any]) -> Any:
    """Opens files right behind their proof, and proves them again where they were changed meanwhile.

    Args:
        proving: gives the proof.
        opening: opens; what it returns has ``close``, or needs none.

    Raises:
        InputError: the files do not come to rest.
    """
    for _ in range(MAX_CHANGES):
        proof = proving()
        if not proof.holds():
            continue
        opened = opening(proof)
        if proof.holds():
            return opened
        getattr(opened, "close", lambda: None)()
    raise InputError(f"{proof.contact.title} is being written to", hint="load it when the writer is done")


def remembered_notes() -> list[dict[str, Any]]:
    """What runs with something turned off on this machine as it is now: "file", "note", and the file that remembers it."""
    machines = {package: machine_identity.machine(package) for package in LIBRARIES}
    notes: dict[tuple[str, str], dict[str, Any]] = {}
    for memory in sorted((cache_folder() / MEMORY).glob("*.json")):
        entry = read_memory(memory)
        names, note = entry.get("files"), entry.get("note")
        if note and names and entry.get("machine") == machines.get(str(entry.get("package"))):
            key = str(names[0]), str(note)
            notes.setdefault(key, {"file": key[0], "note": key[1], "remembered_in": str(memory)})
    return list(notes.values())
