"""A prompt cache of mlx-lm, written by the installed mlx-lm itself: its layout changes between releases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.errors import InactivePatchError, InputError
from edgepatch.exports.clients import run_client
from edgepatch.exports.folders import describe, export_folder, finish, loss_at_length
from edgepatch.llama_server.export import ExportOptions
from edgepatch.patch import canary
from edgepatch.patch.file import Patch, write_patch
from edgepatch.runtimes import read_spec
from edgepatch.seeds.anchoring import place_in_words
from edgepatch.tensors import CanaryPrompt

CACHE_FILE = "prompt_cache.safetensors"


def write(patch: Patch, model: Path, target: Path, options: ExportOptions) -> dict[str, Any]:
    """Writes the folder.

    Args:
        patch: with a stored seed.
        model: Transformers folder that mlx-lm loads.
        target: the folder.
        options: where mlx-lm is installed.

    Raises:
        InputError: mlx-lm is missing or writes another kind of cache, the patch has no stored seed, or the folder cannot be written.
        MismatchError: the patch was made for another model.
        InactivePatchError: its canary fails in mlx-lm.
    """
    if patch.kv_seed is None:
        raise InputError(
            f"{patch.name} {patch.version} holds no KV seed, which mlx-lm needs",
            hint="add the seed first: edgepatch convert seed",
        )
    patch.base.require_same(read_spec(model))
    with export_folder(target) as folder:
        seed = folder / ".seed.safetensors"
        write_patch(patch, seed)
        prompts = _short_prompts(patch)
        request: dict[str, Any] = {"write": str(folder / CACHE_FILE), "seed": str(seed), "model": str(model)}
        request |= {"layers": patch.base.num_hidden_layers, "canary": [prompt.tokens for prompt in prompts]}
        answer = run_client("mlx-lm", request, options.home)
        seed.unlink()
        _prove(prompts, answer)
        manifest = describe("mlx", patch, model, "F32", place_in_words(None))
        manifest |= {"mlx_lm": answer["version"], "header": answer["header"], "model_path": str(model)}
        return finish(folder, manifest, _readme(manifest, patch))


def _short_prompts(patch: Patch) -> list[CanaryPrompt]:
    """Of the canary, those behind which a seed that stays has the patch's effect."""
    rule = patch.anchoring
    prompts = patch.canary.prompts if patch.canary else ()
    return [prompt for prompt in prompts if rule is None or not any(rule.anchors(prompt.tokens))]


def _prove(prompts: Sequence[CanaryPrompt], answer: dict[str, Any]) -> None:
    """mlx-lm may read the folder otherwise than Transformers: releases up to 0.32 pass over ``rope_parameters``, without a word."""
    for prompt, logits in zip(prompts, answer["canary"], strict=True):
        bare, patched = (np.asarray(row, np.float32) for row in logits)
        try:
            canary.require_active(prompt, bare, patched, canary.tolerance("BF16"))
        except InactivePatchError as error:
            raise InactivePatchError(
                f"mlx-lm {answer['version']}: {error}",
                hint="does mlx-lm read all of config.json? it wants rope_theta beside rope_parameters, which newer Transformers write alone",
            ) from None


def _readme(manifest: dict[str, Any], patch: Patch) -> list[str]:
    model = manifest["model_path"]
    return [
        (
            f"`mlx_lm.generate --model {model} --prompt-cache-file {CACHE_FILE} --prompt 'Hello'`, or in Python "
            f"`load_prompt_cache('{CACHE_FILE}')` and `prompt_cache=` of `generate`: load it anew for each conversation."
        ),
        f"Written by mlx-lm {manifest['mlx_lm']}. The layout of these files has changed between releases: export again after an update.",
        (
            f"The cache holds the patch and {manifest['header']!r}, which the chat template puts in front of the user's first words. mlx-lm drops "
            "that text with a cache file, so hand over what comes behind it, and no system prompt."
        ),
        "Exact for this model folder. The header's cells are what it computes: export again for another quantization.",
        "`--model` must be spelled as above: mlx-lm compares the words. `mlx_lm.server` takes no cache file.",
        loss_at_length(patch),
        "Proof: `edgepatch check-export THIS_FOLDER --patch PATCH --model MODEL --client PYTHON`.",
    ]
