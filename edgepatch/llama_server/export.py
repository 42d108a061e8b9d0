"""Writes the folder with which an unmodified llama-server serves a patch.

The slot file is written by llama.cpp itself, from a context of ours that holds the patch and nothing else, so its layout is that of the
library. Where a server already runs, ``Probe`` takes header and settings from a file which that server wrote of itself.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.library import load_library
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.converters.llamacpp import state as llamacpp_state
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.files.strict_json import read_json
from edgepatch.files.writing import FolderKind, replacing_folder, require_new_folder
from edgepatch.llama_server import requirements
from edgepatch.llama_server.client import LlamaServer, Reply
from edgepatch.llama_server.requirements import Label, ServerSettings
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.context import KV_TYPES
from edgepatch.runtimes.llamacpp.runtime import DEFAULT_CONTEXT, LlamaCppRuntime
from edgepatch.runtimes.session import Session
from edgepatch.seeds.anchoring import place_in_words

MANIFEST_FILE, PROBE_FILE = "manifest.json", "edgepatch-probe.bin"
EXPORT_FOLDER = FolderKind("an earlier export", MANIFEST_FILE)
FILE_HEADER = struct.Struct("<III")  # magic, version, number of token ids; the ids follow, then the state


@dataclass(frozen=True)
class ExportOptions:
    """What the server is to be started with.

    Attributes:
        context_length: positions of a slot, of which the patch takes none; by default the model's own length, at most 4096.
        kv_type: type of the KV cache.
        flash_attention: whether it is on.
        num_slots: conversations at a time.
        chat_template: instead of the model's own.
        home: where a client is installed that writes a part of the export itself; ``None`` for this environment.
    """

    context_length: int | None = None
    kv_type: str = "f16"
    flash_attention: bool = True
    num_slots: int = 1
    chat_template: str = ""
    home: Path | None = None


@dataclass(frozen=True)
class Probe:
    """A slot file of the label alone that a running server wrote.

    Attributes:
        header: everything in front of the state: version and token ids as this server writes them.
        state: the structure of the state.
    """

    header: bytes
    state: llamacpp_state.SequenceState

    @property
    def kv_type(self) -> str:
        """The server's type of the KV cache."""
        cache = self.state.caches[0]
        kinds = {rows.ggml_type for rows in (*cache.keys, *cache.values)}
        if len(kinds) > 1:
            raise InputError(
                "the server caches keys and values in different types", hint="start it with one type for both"
            )
        number = kinds.pop()
        return next((name for name, ggml_type in KV_TYPES.items() if ggml_type == number), f"ggml type {number}")

    @property
    def flash_attention(self) -> bool:
        """Whether the server computes with flash attention, which decides the order of the values."""
        return not self.state.caches[0].transposed


def split_slot_file(data: bytes) -> tuple[bytes, bytes]:
    """(header with token ids, state) of a slot file.

    Raises:
        InactivePatchError: the file is shorter than it says.
    """
    if len(data) < FILE_HEADER.size:
        raise InactivePatchError(f"slot file: expected a header of {FILE_HEADER.size} bytes, found {len(data)}")
    end = FILE_HEADER.size + 4 * FILE_HEADER.unpack_from(data)[2]
    if end >= len(data):
        raise InactivePatchError(f"slot file: expected more than {end} bytes, found {len(data)}")
    return data[:end], data[end:]


def probe(server: LlamaServer, slot_folder: Path, model: Path, options: ExportOptions) -> Probe:
    """Asks a running server for the layout of its slot files; what was in its slot 0 is lost.

    Args:
        server: started with ``--slot-save-path``.
        slot_folder: that folder, as this process reads it.
        model: the GGUF file that it serves.
        options: the chat template counts.

    Raises:
        InputError: the server refuses, or its file does not appear in the folder.
        InactivePatchError: the file's layout is unknown.
    """
    with Vocabulary(model) as vocabulary:
        label = requirements.choose_label(vocabulary, options.chat_template or vocabulary.chat_template)
    _require(server.complete([label.token], slot=0), "evaluate a token")
    try:
        _require(server.post("/slots/0?action=save", {"filename": PROBE_FILE}), "save a slot")
        path = slot_folder / PROBE_FILE
        try:
            data = path.read_bytes()
            path.unlink()
        except OSError as error:
            hint = "--slot-dir must be the folder of the server's --slot-save-path"
            raise InputError(f"cannot read {path}: {error.strerror}", hint) from None
    finally:
        server.post("/slots/0?action=erase", {})  # it holds the label without a seed, which nothing may reuse
    header, state = split_slot_file(data)
    if int.from_bytes(state[:4], "little") > 1:
        raise InputError("the server keeps one cache for each slot", hint="start it with --kv-unified or --parallel 1")
    return Probe(header, llamacpp_state.read_state(state))


def _require(reply: Reply, action: str) -> None:
    if not reply.ok:
        hint = "start llama-server with --slot-save-path DIR" if reply.status == 501 else "read the server's log"
        raise InputError(f"the server does not {action}: {reply.message}", hint)


def _structure(state: llamacpp_state.SequenceState) -> object:
    """All of a state but its cells."""
    return [
        (
            cache.extended,
            cache.transposed,
            [(r.ggml_type, r.row_bytes) for r in (*cache.keys, *cache.values)],
        )
        for cache in state.caches
    ]


def export(
    patch: Patch, model: Path, target: Path, options: ExportOptions, probe: Probe | None = None
) -> dict[str, Any]:
    """Writes the folder; it appears complete or not at all, and replaces only a folder that an earlier export wrote.

    Args:
        patch: what the server is to serve.
        model: the GGUF file that it serves it on.
        target: the folder.
        options: how the server will be started; settings that the probe tells are taken from it.
        probe: of a running server.

    Returns:
        The manifest.

    Raises:
        InputError: the model's prompts begin with different tokens, its seeds cannot be turned, an option cannot be used, or the folder
            cannot be written.
        MismatchError: the patch was made for another model.
        InactivePatchError: llama.cpp did not take the seed, or the server's cache has another layout than ours.
    """
    if options.num_slots < 1:
        raise InputError(f"slots: expected 1 or more, found {options.num_slots}")
    if probe:
        options = replace(options, kv_type=probe.kv_type, flash_attention=probe.flash_attention)
    with Vocabulary(model) as vocabulary:
        label = requirements.choose_label(vocabulary, options.chat_template or vocabulary.chat_template)
    require_replaceable(target)
    with replacing_folder(target) as folder, open_session(model, patch, options) as session:
        runtime = session.backend
        assert isinstance(runtime, LlamaCppRuntime)  # open_session
        settings = server_settings(model, patch, options, window_of(session))
        seed = folder / requirements.SLOT_FOLDER / requirements.SEED_FILE
        seed.parent.mkdir()
        runtime.save_seed_file(seed, label.token)
        if probe:
            _adopt_header(seed, probe)
        seed.chmod(0o444)  # clients may ask the server to save over it
        if options.chat_template:
            _write(folder / requirements.TEMPLATE_FILE, options.chat_template)
        _write(folder / "start.sh", requirements.start_script(settings), 0o755)
        _write(folder / "restore.sh", requirements.restore_script(settings.num_slots), 0o755)
        _write(folder / "README.md", _readme(patch, label, settings))
        manifest = _manifest(patch, session, label, settings, probe is not None) | {"files": digests_of(folder)}
        _write(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    return manifest


def open_session(model: Path, patch: Patch | None, options: ExportOptions, pinned: bool = True) -> Session:
    """Our own llama.cpp with the server's settings; ``pinned``, the seed stays at the start of the text, as it does there."""
    runtime = LlamaCppRuntime(model, patch, kv_type=options.kv_type, flash_attention=options.flash_attention)
    return Session(runtime, patch, pinned, other_template=bool(options.chat_template))


def window_of(session: Session) -> int:
    """The width of a model's sliding window in llama.cpp; 0 for none."""
    assert isinstance(session.backend, LlamaCppRuntime)  # open_session
    return session.backend.model.window


def server_settings(model: Path, patch: Patch, options: ExportOptions, window: int) -> ServerSettings:
    """What a client of llama.cpp must be started with.

    Raises:
        InputError: the context is longer than the model or its sliding window allows.
    """
    trained = int(read_header(model).setting("context_length"))
    length = min(trained, DEFAULT_CONTEXT) if options.context_length is None else options.context_length
    if not 1 < length <= trained:
        raise InputError(f"context length: expected 2 to {trained}, found {length}")
    most = window - patch.num_virtual_tokens
    if window and length > most:
        raise InputError(
            f"context length: expected at most {max(most, 0)}, found {length}: layers with a sliding window of {window} would lose the "
            f"{patch.num_virtual_tokens} cells of the seed all at once, and not one by one as the model does",
            hint=f"--context {most}, or `edgepatch serve`" if most > 1 else "use `edgepatch serve`",
        )
    return ServerSettings(
        str(model.resolve()),
        length,
        patch.num_virtual_tokens,
        options.kv_type,
        options.flash_attention,
        options.num_slots,
        window > 0,
        bool(options.chat_template),
    )


def place_on_server(patch: Patch) -> str:
    """Where the seed of a patch stands on an unmodified llama-server, in words."""
    moves = "" if patch.anchoring is None else f"was made to move ({patch.anchoring}) and here "
    return f"{moves}{place_in_words(None)}; `edgepatch serve` moves a seed that can"


def _adopt_header(seed: Path, probe: Probe) -> None:
    """Puts the server's header in front of our state, which must be laid out as the server's."""
    _, state = split_slot_file(seed.read_bytes())
    if _structure(llamacpp_state.read_state(state)) != _structure(probe.state):
        raise InactivePatchError(
            "the server's cache is laid out otherwise than ours of the same model and types",
            hint="is it the same GGUF file? add --swa-full for a model with a sliding window",
        )
    seed.write_bytes(probe.header + state)


def _manifest(patch: Patch, session: Session, label: Label, settings: ServerSettings, probed: bool) -> dict[str, Any]:
    lib = load_library()
    return {
        "client": "llama-server",
        "patch": {"name": patch.name, "version": patch.version, "digest": patch.digest},
        "num_virtual_tokens": patch.num_virtual_tokens,
        "model": {
            "file": Path(settings.model).name,
            "quantization": session.quantization,
            "spec": session.spec.as_dict(),
        },
        "seed_route": session.seed_route,
        "label": asdict(label),
        "place": place_on_server(patch),
        "settings": asdict(settings),
        "flags": settings.flags("."),
        "restore": {"path": "/slots/{slot}?action=restore", "body": {"filename": requirements.SEED_FILE}},
        "header": "the probed server" if probed else "the library",
        "library": {"llama_cpp_python": version("llama-cpp-python"), "state_version": int(lib.LLAMA_STATE_SEQ_VERSION)},
    }


def _readme(patch: Patch, label: Label, settings: ServerSettings) -> str:
    return (
        f"# {patch.name} {patch.version} for llama-server\n\n"
        "`start.sh` starts the server (its program: $LLAMA_SERVER), `restore.sh` puts the patch into its slots: after each start.\n\n"
        f"Exact for {Path(settings.model).name} alone. Export again for another quantization: the cell of the first token, "
        f"{label.text!r}, is what this file computes.\n\n"
        f"Every prompt must begin with {label.text!r}; one that does not evicts the patch, without an error.\n\n"
        f"The seed {place_on_server(patch)}.\n\n"
        "Proof: `edgepatch check-server URL --patch PATCH --model MODEL`.\n"
    )


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def require_replaceable(target: Path, force: bool = True) -> None:
    """Refuses a folder that is there, but for an earlier export: that is replaced by the user's word, unless others put files into it.

    Args:
        target: the folder.
        force: whether an earlier export may be replaced.

    Raises:
        InputError: it may not, or nothing can be written there.
    """
    require_new_folder(target, EXPORT_FOLDER, force)
    if not (target / MANIFEST_FILE).is_file():
        return
    manifest = read_json(target / MANIFEST_FILE, what="manifest of an export", hint="name a new folder")
    own = {str(name).split("/")[0] for name in manifest.get("files") or ()}
    foreign = sorted({path.name for path in target.iterdir()} - own - {MANIFEST_FILE})
    if foreign:
        raise InputError(f"{target}: {foreign[0]} is not of the export, and would go with it", hint="name a new folder")
