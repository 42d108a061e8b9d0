"""Files of llama.cpp's own that its bindings restore: a session file of the whole context, or a slot file of one sequence.

Both hold the seed under one label (``runtimes.llamacpp.labels``). The cell of the label itself is what this very model computes, so a file
is exact for the model file that it was made with, and for no other quantization.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgepatch.converters.gguf.library import load_library
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.exports.folders import describe, export_folder, finish, loss_at_length
from edgepatch.llama_server import requirements
from edgepatch.llama_server.export import ExportOptions, open_session, server_settings, window_of
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.seeds.anchoring import place_in_words

SEED_FILES = {"llama-session": "seed.session", "node-llama-cpp": "seed.bin"}
EXAMPLE_FILE = "example.mjs"
EXAMPLE = """import { getLlama, LlamaChatSession } from "node-llama-cpp";
import { fileURLToPath } from "node:url";
const llama = await getLlama();
const model = await llama.loadModel({ modelPath: process.argv[2] });
const context = await model.createContext(CONTEXT);
const contextSequence = context.getSequence();
await contextSequence.loadStateFromFile(fileURLToPath(new URL("seed.bin", import.meta.url)), { acceptRisk: true });
const session = new LlamaChatSession({ contextSequence });
console.log(await session.prompt(process.argv[3] ?? "Hello"));
await llama.dispose();
"""
HOW = {
    "llama-session": "Load `seed.session` into a new context before the first token: `loadSession` (llama.rn), `stateLoadFile` (llamadart), "
    "`LoadState` (LLamaSharp), `--prompt-cache` (llama-completion), `llama_state_load_file` (C). Then evaluate the prompt from its second "
    "token on.",
    "node-llama-cpp": "`example.mjs` is ten lines: `node example.mjs MODEL.gguf 'Hello'`, where `npm install node-llama-cpp` has run. "
    "`acceptRisk` means that the file is trusted: compare its SHA-256 with manifest.json.",
}


def write(patch: Patch, model: Path, target: Path, options: ExportOptions, client: str) -> dict[str, Any]:
    """Writes the folder.

    Args:
        patch: with a stored seed.
        model: the GGUF file that the client loads.
        target: the folder.
        options: how the client makes its context.
        client: a name in ``SEED_FILES``.

    Raises:
        InputError: the model's prompts begin with different tokens, its seeds cannot be turned, or the folder cannot be written.
        MismatchError: the patch was made for another model.
        InactivePatchError: llama.cpp did not take the seed.
    """
    with Vocabulary(model) as vocabulary:
        label = requirements.choose_label(vocabulary, options.chat_template or vocabulary.chat_template)
    with export_folder(target) as folder, open_session(model, patch, options) as session:
        runtime = session.backend
        assert isinstance(runtime, LlamaCppRuntime)  # open_session
        settings = server_settings(model, patch, options, window_of(session))
        runtime.save_seed_file(folder / SEED_FILES[client], label.token, is_session=client == "llama-session")
        cells = settings.context_length + patch.num_virtual_tokens
        context = {"contextSize": cells, "flashAttention": options.flash_attention}
        if client == "node-llama-cpp":
            (folder / EXAMPLE_FILE).write_text(EXAMPLE.replace("CONTEXT", json.dumps(context)), encoding="utf-8")
        manifest = describe(client, patch, model, session.quantization, place_in_words(None))
        manifest |= {
            "label": {"token": label.token, "text": label.text},
            "context": {"cells": cells, "kv_type": options.kv_type, "flash_attention": options.flash_attention},
            "state_version": int(load_library().LLAMA_SESSION_VERSION),
        }
        return finish(folder, manifest, _readme(client, manifest, patch))


def _readme(client: str, manifest: dict[str, Any], patch: Patch) -> list[str]:
    context, label = manifest["context"], manifest["label"]["text"]
    attention = "on" if context["flash_attention"] else "off"
    return [
        HOW[client],
        f"Context: {context['cells']} cells, cache {context['kv_type']}, flash attention {attention}, one sequence; others are refused.",
        (
            f"Exact for {manifest['model']['file']} ({manifest['model']['quantization']}). Export again for another quantization: the cell of "
            f"the first token, {label!r}, is what this file computes."
        ),
        (
            f"Every prompt must begin with {label!r}, and every conversation starts from the file. A client that clears its cache, or shifts a "
            "full one, answers as the bare model from then on, without an error."
        ),
        loss_at_length(patch),
        "Proof: `edgepatch check-export THIS_FOLDER --patch PATCH --model MODEL`.",
    ]
