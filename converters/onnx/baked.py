"""A patch baked into a graph, for programs that run onnxruntime-genai: its Generator has no way to take a seed.

In every layer the first P positions of the past are replaced by the seed, whatever was evaluated there:
``past' = Concat(seed, past[P:])``. So a program appends P tokens of any kind first, by themselves, and then its prompt. Each step
costs a copy of the cache, and a program that leaves the P tokens out runs unpatched at first: prefer edgepatch's own runtime.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters.onnx.conversion import CONFIG_FILE, replacement
from edgepatch.converters.onnx.exporters import require_packages
from edgepatch.converters.onnx.files import MODEL_FILE, GraphFile, open_folder
from edgepatch.converters.onnx.graphs import DecoderGraph, evaluate, recognise
from edgepatch.converters.onnx.identity import BAKED_KEY, read_identity, stamp
from edgepatch.converters.onnx.sessions import open_session, prove_session
from edgepatch.errors import InputError
from edgepatch.files.writing import unwritable
from edgepatch.patch.file import Patch
from edgepatch.tensors import KVSeed, ModelSpec

NUM_TOKENS = 8  # of the greedy text that is compared
PROMPT_LENGTH = 4
DUMMY_TOKEN = 0
MAX_ATTEMPTS = 16
NEAR_TIE = 0.1
TO_THE_END = np.iinfo(np.int64).max


def bake_seed(folder: Path, patch: Patch, target: Path) -> None:
    """Writes an onnxruntime-genai folder with a patch in its graph; the graph's metadata names the patch's digest.

    The folder takes its place only after onnxruntime-genai has continued a prompt with it as the seeded original does.

    Args:
        folder: ONNX folder of the builder.
        patch: with a KV seed.
        target: the folder to write.

    Raises:
        InputError: the patch has no seed, the graph is not the builder's, or the baked graph gives another text.
        MismatchError: the patch was made for another model.
        MissingExtraError: onnx or onnxruntime-genai is not installed.
    """
    require_packages("builder")
    if patch.kv_seed is None:
        raise InputError(
            f"patch {patch.name} {patch.version} holds no KV seed", hint="add it first: edgepatch convert seed"
        )
    file = open_folder(folder)
    session = open_session(prove_session(file))
    spec, _ = read_identity(folder, file, session.get_modelmeta().custom_metadata_map)
    patch.base.require_same(spec)
    graph = recognise(session, file, spec)
    if not graph.shared or not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{file.path} is no graph of onnxruntime-genai's builder, the only kind that onnxruntime-genai runs",
            hint="export it with edgepatch convert base --to onnx",
        )
    prompt, expected = _check(session, graph, spec, patch.kv_seed)
    try:
        with replacement(target) as unfinished:
            shutil.copytree(folder, unfinished, dirs_exist_ok=True)
            _bake(unfinished / MODEL_FILE, graph, patch.kv_seed)
            stamp(unfinished / MODEL_FILE, {BAKED_KEY: patch.digest})
            token_ids = generate_baked(unfinished, patch.num_virtual_tokens, prompt, len(expected))
            _require_same(token_ids, expected, file)
    except OSError as error:
        raise unwritable(target, error) from error


def _require_same(actual: Sequence[int], expected: Sequence[int], file: GraphFile) -> None:
    """``found`` may have ended early, at an end token."""
    if not actual or list(actual) != list(expected)[: len(actual)]:
        raise InputError(
            f"{file.path}: baked, it continues the check prompt with {list(actual)}, seeded with {list(expected)}",
            hint="update onnxruntime-genai, or run the folder with edgepatch",
        )


def _bake(model_file: Path, graph: DecoderGraph, seed: KVSeed) -> None:
    """Puts the seed before every reader of a past."""
    import onnx
    from onnx import helper, numpy_helper

    model: Any = onnx.load(str(model_file), load_external_data=False)
    bounds = {"edgepatch.first": seed.num_virtual_tokens, "edgepatch.end": TO_THE_END, "edgepatch.axis": 2}
    constants = [numpy_helper.from_array(np.array([value], dtype=np.int64), name) for name, value in bounds.items()]
    nodes = []
    for i, past in enumerate(graph.past):
        cells = (seed.values if i % 2 else seed.keys)[i // 2].astype(graph.cache_type)[None]  # (1, K, P, H)
        rest, stored, seeded = (f"edgepatch.{past}.{part}" for part in ("rest", "seed", "seeded"))
        constants.append(numpy_helper.from_array(cells, stored))
        nodes.append(helper.make_node("Slice", [past, *bounds], [rest], name=rest))
        nodes.append(helper.make_node("Concat", [stored, rest], [seeded], name=seeded, axis=2))
        for node in model.graph.node:
            node.input[:] = [seeded if name == past else name for name in node.input]
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    model.graph.initializer.extend(constants)
    onnx.save(model, str(model_file))


def _prompt(spec: ModelSpec, attempt: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(attempt).integers(0, spec.vocab_size, PROMPT_LENGTH)]


def _check(session: Any, graph: DecoderGraph, spec: ModelSpec, seed: KVSeed) -> tuple[list[int], list[int]]:
    """A prompt and its continuation by the seeded original, by plain forward passes, up to the first near tie.

    A step by step evaluation of quantized weights rounds differently, so it may decide a tie the other way.
    """
    for attempt in range(MAX_ATTEMPTS):
        prompt = _prompt(spec, attempt)
        tokens = list(prompt)
        while len(tokens) < PROMPT_LENGTH + NUM_TOKENS:
            logits = evaluate(session, graph, spec, seed, tokens)[-1]
            second, first = np.sort(logits)[-2:]
            if first - second < NEAR_TIE:
                break
            tokens.append(int(logits.argmax()))
        if len(tokens) > PROMPT_LENGTH:
            return prompt, tokens[PROMPT_LENGTH:]
    raise InputError(
        f"{MAX_ATTEMPTS} check prompts end in near ties: the model tells no token from another", hint="check the patch"
    )


def generate_baked(folder: Path, num_virtual_tokens: int, prompt: Sequence[int], count: int) -> list[int]:
    """``count`` greedy tokens of onnxruntime-genai on a baked folder: the two appends that every program must make.

    Args:
        folder: written by ``bake_seed``.
        num_virtual_tokens: P of the patch in it.
        prompt: token ids.
        count: tokens to generate; an end token ends nothing.
    """
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    settings = og.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=num_virtual_tokens + len(prompt) + count)
    generator = og.Generator(model, settings)
    generator.append_tokens(np.full((1, num_virtual_tokens), DUMMY_TOKEN, dtype=np.int32))
    generator.append_tokens(np.array([list(prompt)], dtype=np.int32))
    tokens: list[int] = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
