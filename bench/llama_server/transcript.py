"""The same prompts through an unmodified llama-server and through edgepatch, greedily, token for token."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCH
from edgepatch.bench.llama_server.server import PACKAGE, running_server
from edgepatch.errors import EdgepatchError
from edgepatch.llama_server.client import LlamaServer
from edgepatch.prompts.sets import load_prompts

KINDS = ("F16", "Q8_0", "Q4_K_M")
NUM_PROMPTS, NUM_TOKENS = 24, 64
CONVERSATION = ("What is your name?", "What should I say to my neighbour?", "Thank you. And if he is angry?")


def transcribe(binary: Path, patch_file: Path = LAB_PATCH) -> dict[str, Any]:
    """Greedy continuations of the lab model by both, for each weight type and with flash attention on and off."""
    from edgepatch.converters.gguf import writer
    from edgepatch.patch.file import read_patch

    patch, rows, chats = read_patch(patch_file), [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        writer.convert_folder(LAB_FOLDER / "base", folder / "F16.gguf", "F16")
        for kind in KINDS:
            model = folder / f"{kind}.gguf"
            if kind != "F16":
                writer.quantize(folder / "F16.gguf", model, kind, 1)
            for flash_attention in (True, False):
                row, chat = _compare(binary, folder, model, patch, flash_attention)
                rows.append({"weights": kind, "kv_type": "f16", "flash_attention": flash_attention, **row})
                chats.append(chat)
    return {
        "server": {"llama_cpp_python": version(PACKAGE), "build": rows[0].pop("build")},
        "patch": {"name": patch.name, "version": patch.version, "digest": patch.digest},
        "rows": [{k: v for k, v in row.items() if k != "build"} for row in rows],
        "conversation": chats[0],
    }


def _compare(
    binary: Path, folder: Path, model: Path, patch: Any, flash_attention: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from edgepatch.llama_server.export import ExportOptions, export
    from edgepatch.llama_server.requirements import SEED_FILE, ServerSettings
    from edgepatch.runtimes import load_runtime

    target = folder / f"{model.stem}-{flash_attention}"
    manifest = export(patch, model, target, ExportOptions(flash_attention=flash_attention))
    flags = ServerSettings(**manifest["settings"]).flags(str(target))
    equal = []
    with (
        running_server(binary, flags, folder / "server.log") as server,
        load_runtime(model, patch, flash_attention=flash_attention, num_threads=1, pinned=True) as runtime,
        load_runtime(model, None, flash_attention=flash_attention, num_threads=1) as bare,
    ):
        for prompt in _prompts():
            tokens = runtime.encode(prompt)
            runtime.reset()  # llama-server evaluates the whole prompt at once, and the size of a batch decides about rounding
            reply = _restored(server, SEED_FILE).complete(tokens, 0, NUM_TOKENS)
            ours, unpatched = greedy(runtime, tokens), greedy(bare, tokens)
            equal.append((common_prefix(reply.value("tokens"), ours), len(ours), common_prefix(unpatched, ours)))
        chat = _converse(_restored(server, SEED_FILE), runtime)
        build = server.get("/props").value("build_info")
    row = {
        "prompts": len(equal),
        "tokens": sum(n for _, n, _ in equal),
        "tokens_equal": sum(n for n, _, _ in equal),
        "tokens_equal_without_patch": sum(n for _, _, n in equal),
        "turns": len(chat),
        "turns_equal": sum(turn["stock"] == turn["edgepatch"] for turn in chat),
        "build": build,
    }
    return row, chat


def _prompts() -> list[str]:
    return [prompt for kind in ("benign", "toxic") for prompt in load_prompts(kind, "eval")[: NUM_PROMPTS // 2]]


def _restored(server: LlamaServer, filename: str) -> LlamaServer:
    if server.restore(0, filename).value("n_restored") != 1:
        raise EdgepatchError("llama-server does not restore the slot file")
    return server


def greedy(runtime: Any, tokens: Sequence[int], count: int = NUM_TOKENS) -> list[int]:
    """Our own greedy continuation, the model's end token included."""
    from edgepatch.decoding.sampling import Sampling

    return [
        piece.token_id for piece in runtime.stream(list(tokens), Sampling.plain(max_new_tokens=count, temperature=0.0))
    ]


def common_prefix(actual: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens agree before the first that does not; a continuation that goes on too long agrees one token less."""
    pairs = zip(actual, expected, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(actual), len(expected)))
    return length - (length == len(expected) < len(actual))


def _converse(server: LlamaServer, runtime: Any) -> list[dict[str, Any]]:
    """A conversation of three turns through the chat endpoint, restored once, and our own answers to the same messages."""
    from edgepatch.decoding.sampling import Sampling

    messages: list[dict[str, str]] = []
    turns = []
    for question in CONVERSATION:
        messages.append({"role": "user", "content": question})
        reply = server.chat(messages, 0, NUM_TOKENS)
        answer = str(reply.value("choices", 0, "message", "content"))
        ours = runtime.chat(messages, Sampling.plain(max_new_tokens=NUM_TOKENS, temperature=0.0))
        cached = reply.value("usage", "prompt_tokens_details", "cached_tokens")
        turns.append({"user": question, "stock": answer, "edgepatch": ours, "cached_tokens": cached})
        messages.append({"role": "assistant", "content": answer})
    return turns


def document(result: dict[str, Any]) -> str:
    """The transcript as Markdown."""
    lines = [
        "# An unmodified llama-server beside edgepatch",
        "",
        (
            f"Made by `edgepatch bench llama-server`: llama-server {result['server']['build']} (the sources of llama-cpp-python "
            f"{result['server']['llama_cpp_python']}) restores the slot file of `edgepatch export`, and continues {NUM_PROMPTS} prompts "
            f"greedily by up to {NUM_TOKENS} tokens; so does edgepatch with the same GGUF file of the lab model and {result['patch']['name']} "
            f"{result['patch']['version']}. *Bare* counts the tokens that the model would have given without the patch as well."
        ),
        "",
        (
            "The seed of the slot stands at other positions than edgepatch's own, so its keys were turned and rounded once more. Replies part "
            "where two tokens are nearly as likely, the sooner the coarser the weights, and then go different ways."
        ),
        "",
        "| weights | KV | flash attention | tokens | equal | bare | chat turns | equal |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        figures = [
            row["tokens"],
            row["tokens_equal"],
            row["tokens_equal_without_patch"],
            row["turns"],
            row["turns_equal"],
        ]
        attention = "on" if row["flash_attention"] else "off"
        lines.append(f"| {row['weights']} | {row['kv_type']} | {attention} | " + " | ".join(map(str, figures)) + " |")
    lines += ["", f"One conversation, restored once, {result['rows'][0]['weights']}:", "", "```"]
    for turn in result["conversation"]:
        lines += [
            f"user:      {turn['user']}",
            f"server:    {turn['stock']}",
            f"edgepatch: {turn['edgepatch']}",
            f"           ({turn['cached_tokens']} positions from the server's cache)",
        ]
    return "\n".join([*lines, "```", ""])
