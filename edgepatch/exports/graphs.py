"""For decoder graphs in JavaScript: the patch file itself, and one module that puts it in front of every text.

The module reads the patch file, so a device's signatures stay with it. It takes the seed as the full-precision model computed it, which
is what our own ONNX runtime does: the folder serves every quantization of the model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.exports.folders import (
    MODULE_FILE,
    PATCH_FILE,
    describe,
    export_folder,
    finish,
    loss_at_length,
    write_client_file,
)
from edgepatch.patch.file import Patch, write_patch
from edgepatch.runtimes import read_spec
from edgepatch.seeds.anchoring import place_in_words

EXAMPLE_FILE = "example.mjs"
READING = """import { readPatch } from "./edgepatch.mjs";
const patch = await readPatch(new URL("patch.safetensors", import.meta.url), "SHA256");
"""
EXAMPLES = {
    "transformers.js": """import { AutoModelForCausalLM, AutoTokenizer, Tensor } from "@huggingface/transformers";
READINGconst name = "MODEL"; // a folder or a hub's name
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await patch.install(await AutoModelForCausalLM.from_pretrained(name), Tensor);
const chat = [{ role: "user", content: "Hello" }];
const inputs = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true });
const output = await model.generate({ ...inputs, max_new_tokens: 64 });
console.log(tokenizer.batch_decode(output, { skip_special_tokens: true })[0]);
""",
    "onnxruntime-web": """import * as ort from "onnxruntime-web";
READINGconst session = await patch.install(await ort.InferenceSession.create("MODEL/model.onnx"), ort.Tensor);
// From here on `session` is used as before: input_ids, attention_mask and past_key_values of the text alone.
""",
}


def write(patch: Patch, model: Path, target: Path, client: str) -> dict[str, Any]:
    """Writes the folder.

    Args:
        patch: with a stored seed and a canary.
        model: folder of the ONNX model, of any quantization; its graph is not opened.
        target: the folder.
        client: a name in ``EXAMPLES``.

    Raises:
        InputError: the patch has no stored seed or no canary, or the folder cannot be written.
        MismatchError: the patch was made for another model.
    """
    _require_complete(patch)
    if model.is_file():
        raise InputError(
            f"{model}: expected the folder of the ONNX model, which {client} loads, found a file",
            hint="make one: edgepatch convert base --to onnx",
        )
    patch.base.require_same(read_spec(model))
    with export_folder(target) as folder:
        write_patch(patch, folder / PATCH_FILE)
        digest = hashlib.sha256((folder / PATCH_FILE).read_bytes()).hexdigest()
        write_client_file(MODULE_FILE, folder / MODULE_FILE)
        text = EXAMPLES[client].replace("READING", READING).replace("SHA256", digest).replace("MODEL", model.name)
        (folder / EXAMPLE_FILE).write_text(text, encoding="utf-8")
        manifest = describe(client, patch, model, "any", place_in_words(patch.anchoring)) | {"sha256": digest}
        return finish(folder, manifest, _readme(patch, digest))


def _require_complete(patch: Patch) -> None:
    if patch.kv_seed is None:
        raise InputError(
            f"{patch.name} {patch.version} holds a soft prompt but no KV seed, which a graph needs",
            hint="add the seed first: edgepatch convert seed",
        )
    if patch.canary is None:
        raise InputError(
            f"{patch.name} {patch.version} has no canary: nothing would prove in the browser that it acts",
            hint="ask its maker for a release with one",
        )


def _readme(patch: Patch, digest: str) -> list[str]:
    place = place_in_words(patch.anchoring)
    return [
        "`example.mjs` shows the use: read the patch, install it in the model, then work as before. No build step; browsers and Node 20.",
        (
            f"`readPatch` takes the file or its bytes, and its SHA-256: `{digest}`. Keep that number in your own code: whoever changes the file "
            "cannot change it there. In Node hand over bytes (`await readFile(...)`)."
        ),
        (
            "`install` refuses another model's graph, and a model on which the patch's canary does not act. Masks, positions and cells of the "
            'patch are its work: a tokenizer\'s mask cannot leave the patch out. `{ proof: "first" }` asks the first prompt of the canary alone, '
            "which is quick and proves nothing of long texts."
        ),
        "Hand over one conversation at a time, whole, without padding. A cache goes on only where this model has given it back.",
        "Exact for every quantization of the model: the seed is that of the full-precision model.",
        f"The seed {place}." if patch.anchoring else loss_at_length(patch),
        "Proof: `edgepatch check-export THIS_FOLDER --patch PATCH --model MODEL`.",
    ]
