"""A few facts of every kind of file that is neither a patch nor a model, and what is done with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.converters.gguf.header import GGUFHeader
from edgepatch.converters.gguf.types import type_name
from edgepatch.converters.hf import specs
from edgepatch.converters.peft.adapters import CONFIG_FILE, PICKLES, TENSOR_FILE
from edgepatch.converters.peft.settings import PEFT_TYPES
from edgepatch.converters.weight_tables import read_table
from edgepatch.errors import EdgepatchError, InputError, PatchFormatError, UntrustedError
from edgepatch.files.canonical import parse_json
from edgepatch.inspection.facts import printable
from edgepatch.inspection.kinds import Kind, Recognised

MAX_MANIFEST_BYTES = 2**20
MAX_LINE_BYTES = 2**16
BLOCK_BYTES = 512
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Described:
    """What a file is.

    Attributes:
        kind: for people.
        facts: name -> value.
        hint: what is done with such a file.
    """

    kind: str
    facts: Mapping[str, Any]
    hint: str


def describe(path: Path, recognised: Recognised) -> Described:
    """A few facts of a file or folder that is neither a patch nor a model.

    Raises:
        InputError: it cannot be read, or is damaged.
        UntrustedError: a trust root or a store breaks its format.
        PatchFormatError: a bundle breaks its format.
    """
    if recognised.header is not None:
        return _gguf(path, recognised.kind, recognised.header)
    try:
        return DESCRIBERS[recognised.kind](path, recognised)
    except EdgepatchError as error:
        error.hint = error.hint or f"get the {recognised.kind.value} again from its maker"
        raise


def _gguf(path: Path, kind: Kind, header: GGUFHeader) -> Described:
    names = Counter(type_name(info.ggml_type) for info in header.tensors.values())
    facts: dict[str, Any] = {
        "name": printable(header.metadata.get("general.name", "")),
        "architecture": header.architecture,
        "size_bytes": path.stat().st_size,
        "tensors": ", ".join(f"{count} {name}" for name, count in names.most_common()) or "none",
    }
    if kind is Kind.GGUF_PART:
        number = header.metadata.get("split.no", 0)
        facts["part"] = f"{number + 1 if isinstance(number, int) else '?'} of {header.num_parts}"
    base = header.metadata.get("general.base_model.0.name")
    if base:
        facts["base"] = printable(base)
    return Described(kind.value, facts, GGUF_HINTS.get(kind, "no runtime of edgepatch loads it"))


GGUF_HINTS = {
    Kind.GGUF_PART: "merge the parts first: llama-gguf-split --merge FIRST_PART OUT",
    Kind.GGUF_PATCH: "make it a patch file: edgepatch convert adapter FILE -o PATCH",
    Kind.GGUF_LORA: "a LoRA changes weights and is no patch; merge it into its base model",
    Kind.GGUF_PROJECTOR: "it goes with a language model, which is another file: name that one",
    Kind.GGUF_VOCABULARY: "it is for tests of a tokenizer; name a file that holds weights",
}


def _tensors(path: Path, _: Recognised) -> Described:
    table = read_table(path)
    types = Counter(tensor.dtype for tensor in table.tensors.values())
    facts = {
        "size_bytes": path.stat().st_size,
        "tensors": ", ".join(f"{count} {name}" for name, count in types.most_common()),
        "parameters": sum(tensor.num_values for tensor in table.tensors.values()),
        "first": ", ".join(printable(name) for name in sorted(table.tensors)[:3]),
        "metadata": {printable(key): printable(value) for key, value in table.metadata.items()},
    }
    has_config = (path.parent / "config.json").is_file()
    return Described(
        Kind.TENSORS.value,
        facts,
        f"it holds weights of a model: name the folder {path.parent}" if has_config else "no edgepatch wrote it",
    )


def _private_key(path: Path, recognised: Recognised) -> Described:
    """Nothing of its content but whether it is encrypted."""
    label = str(recognised.content["label"])
    mode = path.stat().st_mode & 0o777
    facts = {
        "encrypted": "yes" if label == "ENCRYPTED PRIVATE KEY" else "no" if label == "PRIVATE KEY" else "unknown",
        "rights": f"{mode:04o}" + ("" if not mode & 0o077 else ", others can read it: chmod 600"),
    }
    return Described(Kind.PRIVATE_KEY.value, facts, "it signs: edgepatch sign PATCH KEY; its content is never shown")


def _public_key(path: Path, _: Recognised) -> Described:
    from edgepatch.trust.keys import read_public_key
    from edgepatch.trust.signatures import key_id, raw_public_key

    return Described(
        Kind.PUBLIC_KEY.value,
        {"key_id": key_id(raw_public_key(read_public_key(path)))},
        "it goes into a trust root: edgepatch root create",
    )


def _trust_root(path: Path, _: Recognised) -> Described:
    from edgepatch.trust.roots import read_root, time_text
    from edgepatch.trust.verification import require_signed

    root = read_root(path)
    try:
        signed = ", ".join(sorted(root.called(key) for key in require_signed(root)))
    except UntrustedError as error:
        signed = f"not enough: {error}"
    roles = {
        f"{name}_keys": f"{role.threshold} of {', '.join(sorted(root.called(key) for key in role.keys))}"
        for name, role in root.roles.items()
    }
    facts = {
        "version": root.version,
        "fingerprint": root.fingerprint,
        "created": time_text(root.created),
        "expires": time_text(root.expires),
        **roles,
        "signed_by": signed,
    }
    return Described(Kind.TRUST_ROOT.value, facts, "edgepatch trust set ROOT makes a device trust it")


def _bundle(path: Path, _: Recognised) -> Described:
    """What its manifest says; nothing of it is checked here."""
    with path.open("rb") as file:
        header = file.read(BLOCK_BYTES)
        try:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
        except ValueError:
            raise PatchFormatError(f"{path}: its first header is damaged", hint="get the bundle again") from None
        if size > MAX_MANIFEST_BYTES:
            raise PatchFormatError(f"{path}: manifest.json: expected at most {MAX_MANIFEST_BYTES} bytes, found {size}")
        manifest = parse_json(file.read(size), f"{path}: manifest.json")
    members = manifest.get("members") if isinstance(manifest, dict) else None
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise PatchFormatError(f"{path}: manifest.json: expected a list of members", hint="get the bundle again")
    facts = {
        "size_bytes": path.stat().st_size,
        "patch": printable(manifest.get("patch", "")),
        "extra": printable(manifest.get("extra") or "no wheels"),
        "platform": printable(f"{manifest.get('platform', '')} Python {manifest.get('python_version', '')}"),
        "files": len(members),
        "checked": "no: this is what it says of itself",
    }
    return Described(
        Kind.BUNDLE.value,
        facts,
        "edgepatch bundle import checks it and takes it in; with --out DIR it only writes the files",
    )


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    return lines + (last != b"\n")


def _pairs(path: Path, recognised: Recognised) -> Described:
    chosen = recognised.content["chosen"]
    facts = {
        "lines": _count_lines(path),
        "form": "conversations" if isinstance(chosen, list) else "plain text",
        "prompt": "explicit" if "prompt" in recognised.content else "the common beginning of both answers",
        "scores": "yes" if "chosen_score" in recognised.content else "no",
    }
    return Described(Kind.PAIRS.value, facts, "edgepatch train MODEL --pairs FILE makes a patch of it")


def _prompts(path: Path, recognised: Recognised) -> Described:
    facts = {"lines": _count_lines(path), "keys": ", ".join(printable(key) for key in sorted(recognised.content))}
    return Described(
        Kind.PROMPTS.value, facts, "edgepatch pairs MODEL --teacher self --prompts FILE samples answers to them"
    )


def _results(path: Path, recognised: Recognised) -> Described:
    content = recognised.content
    counts = {key: len(value) for key, value in content.items() if isinstance(value, list)}
    facts = {key: printable(content[key]) for key in ("command", "created", "date", "quantization") if key in content}
    if isinstance(content.get("patch"), dict):
        facts["patch"] = printable(content["patch"].get("digest", ""))
    facts["holds"] = ", ".join(f"{count} {printable(key)}" for key, count in counts.items()) or "figures"
    return Described(Kind.RESULTS.value, facts, "edgepatch bench report makes pages of such files")


def _provenance(path: Path, recognised: Recognised) -> Described:
    facts = {
        printable(key): printable(value) for key, value in recognised.content.items() if not isinstance(value, dict)
    }
    return Described(
        Kind.PROVENANCE.value, facts, "it stands beside the pairs; `edgepatch train` copies it into the patch"
    )


def _onnx_file(path: Path, _: Recognised) -> Described:
    from edgepatch.converters.onnx.files import read_graph_file

    graph = read_graph_file(path)
    facts = {
        "size_bytes": path.stat().st_size,
        "producer": printable(graph.producer),
        "tensors": len(graph.tensors),
        "operators": printable(", ".join(f"{count} {name}" for name, count in graph.operators.most_common(6))),
    }
    return Described(
        Kind.ONNX_FILE.value, facts, f"a model is a folder with its graph and tokenizer: name {path.parent}"
    )


def _peft_folder(folder: Path, _: Recognised) -> Described:
    settings = specs.read_json(folder / CONFIG_FILE)
    kind = printable(settings.get("peft_type", "unknown"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    weights = folder / TENSOR_FILE
    if not weights.is_file():
        instead = f"the pickle {pickles[0]}, which can run code when it is read" if pickles else "none"
        raise InputError(f"{folder}: expected {TENSOR_FILE}, found {instead}", hint="save the adapter as safetensors")
    tensors = read_table(weights).tensors
    facts = {
        "type": kind,
        "base": printable(settings.get("base_model_name_or_path") or "not told"),
        "virtual_tokens": settings.get("num_virtual_tokens"),
        "rank": settings.get("r"),
        "size_bytes": weights.stat().st_size,
        "parameters": sum(tensor.num_values for tensor in tensors.values()),
    }
    can_be_patch = kind in PEFT_TYPES
    return Described(
        Kind.PEFT_FOLDER.value,
        {name: value for name, value in facts.items() if value is not None},
        "edgepatch convert adapter FOLDER --model MODEL -o PATCH makes a patch of it"
        if can_be_patch
        else f"{kind} changes weights and is no patch; merge it into its base model",
    )


def _store(folder: Path, _: Recognised) -> Described:
    from edgepatch.store.audit import status, title
    from edgepatch.store.reading import StoreReader

    reader = StoreReader(folder)
    state = reader.read()[0]
    active = [title(state.patches[digest]) for record in state.bases.values() for digest in record.active]
    findings = status(reader)[1]
    facts = {
        "bases": len(state.bases),
        "patches": len(state.patches),
        "active": ", ".join(active) or "nothing",
        "errors": "; ".join(str(finding.message) for finding in findings if finding.level == "error") or "none",
    }
    return Described(Kind.STORE.value, facts, f"edgepatch status --store {folder} says more")


def _export(folder: Path, recognised: Recognised) -> Described:
    content = recognised.content
    patch, model = (_entries(content.get(name)) for name in ("patch", "model"))
    facts = {
        "for": printable(content["client"]),
        "patch": printable(f"{patch.get('name')} {patch.get('version')} ({str(patch.get('digest'))[:12]})"),
        "model": printable(f"{model.get('file')}, {model.get('quantization')}"),
        "seed": printable(content.get("place", "")),
        "files": len(_entries(content["files"])),
        "checked": "no: this is what it says of itself",
    }
    checker = "check-server URL" if content["client"] == "llama-server" else f"check-export {folder}"
    return Described(
        Kind.EXPORT.value, facts, f"edgepatch {checker} --patch PATCH --model MODEL asks the client itself"
    )


def _entries(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _run(folder: Path, recognised: Recognised) -> Described:
    config = _entries(recognised.content["config"])
    names = ("num_virtual_tokens", "sft_steps", "dpo_steps", "kl_weight", "dtype")
    facts = {name: printable(config[name]) for name in names if name in config}
    facts["checkpoint"] = "yes" if (folder / "checkpoint.safetensors").is_file() else "none yet"
    return Described(Kind.RUN.value, facts, f"the same `edgepatch train` with --run {folder} goes on from there")


def _conversation(path: Path, recognised: Recognised) -> Described:
    messages = recognised.content["messages"]
    facts = {
        "messages": len(messages) if isinstance(messages, list) else 0,
        "held_with": printable(recognised.content["system_fingerprint"]),
    }
    return Described(Kind.CONVERSATION.value, facts, f"`/load {path}` in `edgepatch chat` goes on with it")


def _journal(path: Path, recognised: Recognised) -> Described:
    teacher = _entries(_entries(recognised.content["settings"]).get("teacher"))
    facts = {"prompts_done": max(0, _count_lines(path) - 1), "teacher": printable(teacher.get("kind", "unknown"))}
    return Described(Kind.JOURNAL.value, facts, "the same `edgepatch pairs` goes on from there; --restart forgets it")


def _log(path: Path, _: Recognised) -> Described:
    with path.open("rb") as file:
        first = file.readline(MAX_LINE_BYTES)
        file.seek(max(0, path.stat().st_size - MAX_LINE_BYTES))
        last = file.read(MAX_LINE_BYTES).splitlines()[-1]
    command, state = (printable(line.decode("utf-8", "replace").strip()) for line in (first, last))
    facts = {"lines": _count_lines(path), "command": command.partition(": ")[2], "last": state}
    return Described(Kind.LOG.value, facts, "it tells how far the work was, and how it ended")


DESCRIBERS: Mapping[Kind, Callable[[Path, Recognised], Described]] = {
    Kind.TENSORS: _tensors,
    Kind.PRIVATE_KEY: _private_key,
    Kind.PUBLIC_KEY: _public_key,
    Kind.TRUST_ROOT: _trust_root,
    Kind.BUNDLE: _bundle,
    Kind.PAIRS: _pairs,
    Kind.PROMPTS: _prompts,
    Kind.PROVENANCE: _provenance,
    Kind.RESULTS: _results,
    Kind.ONNX_FILE: _onnx_file,
    Kind.PEFT_FOLDER: _peft_folder,
    Kind.STORE: _store,
    Kind.EXPORT: _export,
    Kind.RUN: _run,
    Kind.CONVERSATION: _conversation,
    Kind.JOURNAL: _journal,
    Kind.LOG: _log,
}
