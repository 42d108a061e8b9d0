"""Does a client answer with the patch? Its greedy tokens and logits are compared with those of our own runtime, patched and bare.

Our runtime reads what the client answered and says at each place what it would have taken itself. So one token that another kernel
rounds otherwise is one difference, and not the end of the comparison; where none differs, both replies are the same token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx.files import find_model_file
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError
from edgepatch.exports.clients import is_here, run_client
from edgepatch.exports.folders import PATCH_FILE, read_export
from edgepatch.exports.mlx import CACHE_FILE
from edgepatch.exports.seed_files import SEED_FILES
from edgepatch.exports.targets import TARGETS
from edgepatch.llama_server.references import MAX_SHARE
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime, runtime_name
from edgepatch.runtimes.session import Session
from edgepatch.text.messages import Message

COUNT = 24
TEXTS = ("What is your name?", "What should I say to my neighbour?", "Name three fruits.")
FILLER = "The weather was fine, and the children played in the garden until it was dark. "
LONG_LENGTH = 300
"""Tokens of the prompt that a pinned seed would lose most of its hold on: longer than two blocks."""

EQUAL, WITHIN, BARE, OTHER = "token for token", "within bounds", "bare", "neither"


@dataclass(frozen=True)
class Row:
    """What one client did with one export.

    Attributes:
        target: of the export.
        client: that was asked.
        version: of the client.
        model: file or folder.
        quantization: of it.
        tokens_compared: of all replies.
        tokens_equal: of them, those that our patched runtime takes too.
        bare_differs_at: the first place of a reply at which our bare runtime takes another token; ``None`` where it never does.
        max_abs_dlogit: the largest difference of the first token's logits from ours; ``None`` where the client shows none.
        load_ms: that the patch took to load, in the client's own time.
        first_token_ratio: how many times as long as bare the first token of a short prompt takes with the patch, in the client's own time,
            medians of turns; ``None`` where the client has the patch alone.
        bytes: of the folder's files that the client reads for it.
        verdict: ``EQUAL``; ``WITHIN``: logits, and those of tokens that are not ours, are nearer to ours than a quarter of what the patch
            changes; ``BARE``; ``OTHER``.
    """

    target: str
    client: str
    version: str
    model: str
    quantization: str
    tokens_compared: int
    tokens_equal: int
    bare_differs_at: int | None
    max_abs_dlogit: float | None
    load_ms: float
    first_token_ratio: float | None
    bytes: int
    verdict: str

    @property
    def holds(self) -> bool:
        """Whether the client can only be answering with the patch."""
        return self.verdict in (EQUAL, WITHIN)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_export(folder: Path, patch: Patch, model: Path, home: Path | None = None) -> list[Row]:
    """Asks each client of an export that is here.

    Args:
        folder: of the export.
        patch: that it was made of.
        model: that the client loads.
        home: where the client is installed; see ``clients.run_client``.

    Raises:
        InputError: it is no export, a client is not installed, or the export has a check of its own.
        PatchFormatError: a file of it is damaged.
        InactivePatchError: it is of another patch, or of another quantization where that is not exact.
        MismatchError: the patch is for another model.
    """
    manifest = read_export(folder)
    name = manifest["client"]
    target = TARGETS.get(name)
    if target is None or not target.clients:
        hint = "a running server is asked: edgepatch check-server URL" if target else f"one of {', '.join(TARGETS)}"
        raise InputError(f"{folder}: an export for {name} has no clients to start", hint)
    if manifest["patch"]["digest"] != patch.digest:
        raise InactivePatchError(
            f"{folder}: expected an export of {patch.name} {patch.version} ({patch.digest[:12]}), "
            f"found one of {manifest['patch']['name']} {manifest['patch']['version']} ({manifest['patch']['digest'][:12]})",
            hint="export again",
        )
    graph = _graph(name, model)
    with _open(manifest, patch, model, not target.moves) as session:
        _require_exact(folder, manifest, session)
        request = _request(folder, manifest, model, session) | graph
        answers = {client: run_client(client, request, home) for client in target.clients if is_here(client)}
        rows = _rows(session, answers)
    size = sum(
        (folder / file).stat().st_size for file in (request["seed"], "edgepatch.mjs") if (folder / file).is_file()
    )
    shared = {"target": name, "model": model.resolve().name, "quantization": session.quantization, "bytes": size}
    return [Row(**shared, **row) for row in rows]


def _open(manifest: dict[str, Any], patch: Patch, model: Path, pinned: bool) -> Session:
    context = manifest.get("context")
    settings: dict[str, Any] = {"num_threads": 1}
    if context:
        settings = {"kv_type": context["kv_type"], "flash_attention": context["flash_attention"], "num_threads": 1}
    if manifest["client"] == "mlx":
        settings = {}
    return load_runtime(model, patch, pinned=pinned and patch.anchoring is not None, **settings)


def _graph(name: str, model: Path) -> dict[str, Any]:
    """What the client of a graph is told of its files; for other clients only whether the model is of the kind that they load.

    Raises:
        InputError: it is of another kind, or damaged.
    """
    kind = "onnx" if TARGETS[name].moves else "torch" if name == "mlx" else "llamacpp"
    if runtime_name(model) != kind:
        expected = {"onnx": "an ONNX folder", "torch": "a Transformers folder", "llamacpp": "a GGUF file"}[kind]
        raise InputError(
            f"{model}: expected {expected}, which {name} loads, found another model", "edgepatch convert base"
        )
    if kind != "onnx":
        return {}
    path = find_model_file(model)
    beside = [file.name for file in path.parent.iterdir() if file.name.startswith(path.name) and file != path]
    return {"graph": path.relative_to(model).as_posix(), "external": beside}


def _require_exact(folder: Path, manifest: dict[str, Any], session: Session) -> None:
    expected = manifest["model"]["quantization"]
    if expected not in ("any", session.quantization):
        raise InactivePatchError(
            f"{folder}: expected a model of {expected}, which it was made with, found {session.quantization}: the cell of the first token "
            "would be another model's",
            hint="export again with the model that the client loads; exports for JavaScript are exact for every quantization",
        )


def _request(folder: Path, manifest: dict[str, Any], model: Path, session: Session) -> dict[str, Any]:
    seed = {**SEED_FILES, "mlx": CACHE_FILE}.get(manifest["client"], PATCH_FILE)
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = [session.tokens(chat) for chat in chats]
    if TARGETS[manifest["client"]].moves:
        prompts[-1] = session.tokens([{"role": "user", "content": _long_text(session)}, *_turn()])
    return {
        "folder": str(folder.resolve()),
        "seed": seed,
        "patch": PATCH_FILE,
        # mlx-lm compares the words with those of the export.
        "model": manifest.get("model_path") or str(model.resolve()),
        "sha256": manifest.get("sha256", ""),
        "context": manifest.get("context", {}),
        "base": session.spec.as_dict(),
        "prompts": prompts,
        "texts": TEXTS,
        "count": COUNT,
        "proof": "all",
    }


def _long_text(session: Session) -> str:
    count = len(session.tokens([{"role": "user", "content": FILLER}]))
    return FILLER * (LONG_LENGTH // max(count, 1) + 1)


def _turn() -> list[Message]:
    return [{"role": "assistant", "content": "How nice."}, {"role": "user", "content": TEXTS[-1]}]


# What they answered.

Logits = NDArray[np.float32]


def _rows(session: Session, answers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of each client; the model is asked with the patch, and then without."""
    patched, patch = _references(session, answers), session.patch
    session.swap(None)
    bare = _references(session, answers)
    session.swap(patch)
    return [_row(client, answer, patched[client], bare[client]) for client, answer in answers.items()]


def _references(session: Session, answers: dict[str, dict[str, Any]]) -> dict[str, list[Logits]]:
    """(N, V) in front of each of the N tokens of every reply of every client; the same reply is read once."""
    read: dict[tuple[int, ...], Logits] = {}
    references: dict[str, list[Logits]] = {client: [] for client in answers}
    for client, answer in answers.items():
        for reply in answer["replies"]:
            key = (len(reply["prompt"]), *reply["prompt"], *reply["tokens"])
            if key not in read:
                read[key] = _logits(session, reply["prompt"], reply["tokens"])
            references[client].append(read[key])
    return references


def _logits(session: Session, prompt: list[int], tokens: list[int]) -> Logits:
    """Token by token, as clients do: kernels for many tokens round otherwise."""
    return np.stack([session.logits_of_last([*prompt, *tokens[:i]]) for i in range(max(len(tokens), 1))])


def _row(client: str, answer: dict[str, Any], patched: list[Logits], bare: list[Logits]) -> dict[str, Any]:
    replies = answer["replies"]
    equal = [_equal(reply["tokens"], logits) for reply, logits in zip(replies, patched, strict=True)]
    bare_equal = [_equal(reply["tokens"], logits) for reply, logits in zip(replies, bare, strict=True)]
    compared, num_equal = sum(map(len, equal)), sum(map(sum, equal))
    differing = [row.index(False) for row in bare_equal if not all(row)]
    shown = [i for i, reply in enumerate(replies) if reply.get("logits")]
    gap = max((_gap(replies[i]["logits"], patched[i][0]) for i in shown), default=None)
    effect = max(_gap(patched[i][0], bare[i][0]) for i in range(len(replies)))
    short = max(_shortfall(reply["tokens"], logits) for reply, logits in zip(replies, patched, strict=True))
    is_near = max(short, gap or 0.0) <= MAX_SHARE * effect
    return {
        "client": client,
        "version": str(answer["version"]),
        "tokens_compared": compared,
        "tokens_equal": num_equal,
        "bare_differs_at": min(differing, default=None),
        "max_abs_dlogit": None if gap is None else round(gap, 6),
        "load_ms": round(answer["load_ms"], 2),
        "first_token_ratio": round(answer["first_token_ratio"], 3) if "first_token_ratio" in answer else None,
        "verdict": _verdict(compared, num_equal, sum(map(sum, bare_equal)), is_near, bool(differing)),
    }


def _verdict(compared: int, equal: int, bare_equal: int, is_near: bool, bare_differs: bool) -> str:
    if compared and equal == compared and bare_differs:
        return EQUAL
    if is_near and equal > bare_equal:
        return WITHIN
    return BARE if bare_equal > equal else OTHER


def _equal(tokens: Sequence[int], logits: Logits) -> list[bool]:
    return [token == int(best) for token, best in zip(tokens, logits.argmax(axis=-1), strict=False)]


def _shortfall(tokens: Sequence[int], logits: Logits) -> float:
    """By how much the logit of a token that the client took is below the best of ours, at most."""
    return max((float(row.max() - row[token]) for token, row in zip(tokens, logits, strict=False)), default=0.0)


def _gap(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).max())


def require_proven(rows: Sequence[Row], folder: Path) -> None:
    """Raises unless every client that was asked answers with the patch.

    Raises:
        InactivePatchError: one does not.
        EdgepatchError: none was asked.
    """
    if not rows:
        raise EdgepatchError(f"{folder}: no client was asked")
    failed = next((row for row in rows if not row.holds), None)
    if failed:
        raise InactivePatchError(
            f"not proven: {failed.client} {failed.version}: {failed.tokens_equal} of {failed.tokens_compared} tokens are ours, "
            f"and as a whole it answers like {failed.verdict}",
            hint="export again for this model file; has the client been updated since?",
        )
