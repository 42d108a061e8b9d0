"""Measures one architecture: every form of the tiny model, in every setting, against Transformers fed ``inputs_embeds``."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.parity import moved
from edgepatch.bench.parity.models import PROMPT, Architecture, convert
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.patch.canary import deviation
from edgepatch.patch.file import Patch
from edgepatch.runtimes.session import Session
from edgepatch.tensors import SoftPrompt

NUM_VIRTUAL_TOKENS, NUM_TOKENS, CONTEXT = 50, 64, 256
KV_TYPES = ("f32", "f16", "q8_0", "q4_0")
ROUTES = {"b": "stored", "c": "decoded"}
ONNX_PRECISIONS = ("fp32", "fp16", "int8", "int4")
ONNX_EXPORTERS = ("builder", "transformers")
PINNED, MOVED = "pinned", "moved"
SEEDS = (PINNED, MOVED)
"""At the start of the text, or in front of each block and turn of it."""
METRICS = ("max_abs_dlogit", "kl", "top1")

Row = dict[str, Any]
Logits = NDArray[np.float32]


def divergence(reference: Logits, actual: Logits) -> dict[str, float]:
    """Largest difference of a logit, mean KL(reference || actual) and share of equal top tokens, over (T, V) logits."""
    log_p, log_q = (_log_softmax(logits) for logits in (reference, actual))
    return {
        "max_abs_dlogit": float(np.abs(reference.astype(np.float64) - actual).max()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "top1": float((reference.argmax(-1) == actual.argmax(-1)).mean()),
    }


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@dataclass(frozen=True)
class Oracle:
    """What Transformers says.

    Attributes:
        tokens: T token ids.
        patch: P virtual tokens with their float32 seed, where the architecture can have one, and the canary.
        no_seed: why there is no seed, or "".
        patched: (T, V) logits behind the soft prompt.
        bare: (T, V) logits without it.
        patched_f16: (T, V) logits behind the soft prompt of the same model with its matrices rounded to float16.
        moving: the same patch, whose seed goes along with the text; ``None`` where it cannot.
        cannot_move: why, or "".
        moved: (T, V) logits behind it; empty where it cannot.
    """

    tokens: list[int]
    patch: Patch
    no_seed: str
    patched: Logits
    bare: Logits
    patched_f16: Logits
    moving: Patch | None
    cannot_move: str
    moved: Logits

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Of the canaries of both patches."""
        canaries = [patch.canary for patch in (self.patch, self.moving) if patch is not None]
        return list(dict.fromkeys(prompt.tokens for canary in canaries if canary for prompt in canary.prompts))


def make_oracle(spec: Architecture, folder: Path) -> Oracle:
    """Loads the model, draws a soft prompt in the scale of its token embeddings, and evaluates both."""
    import torch

    from edgepatch.converters.hf import folders, seeds
    from edgepatch.converters.hf.rotary import read_rotation
    from edgepatch.text.tokenizers import FolderTokenizer

    model = folders.load_model(folder)
    tokens = FolderTokenizer(folder).encode(f"{PROMPT} {PROMPT}")[:NUM_TOKENS]  # once is enough for a tiny vocabulary
    embed = model.get_input_embeddings()
    soft_prompt = _draw_soft_prompt(spec, embed(torch.arange(model.config.vocab_size)).detach().numpy())

    def logits(prefix: bool) -> Logits:
        parts = [torch.from_numpy(soft_prompt.embeddings)[None]] * prefix + [embed(torch.tensor([tokens]))]
        with torch.inference_mode():
            logits_behind: Logits = model(inputs_embeds=torch.cat(parts, dim=1)).logits[0, -NUM_TOKENS:].numpy()
        return logits_behind

    seed, no_seed = None, ""
    try:
        seed = seeds.compute_kv_seed(model, soft_prompt)
    except InputError as error:
        no_seed = str(error)
    patch = Patch(
        "parity", "1.0.0", folders.read_spec(folder), soft_prompt, seed, canary=seeds.compute_canary(model, soft_prompt)
    )
    patched, bare = logits(True), logits(False)
    moving, cannot_move, moved_text = None, "", np.empty((0, 0), np.float32)
    try:
        rotation, anchoring = read_rotation(model), moved.anchoring_of(tokens)
        canary = seeds.compute_canary(model, soft_prompt, rotation=rotation, anchoring=anchoring)
        moving = replace(patch, rotation=rotation, anchoring=anchoring, canary=canary)
        moved_text = moved.moved_logits(model, soft_prompt, anchoring, tokens)
    except InputError as error:
        cannot_move = str(error)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    return Oracle(tokens, patch, no_seed, patched, bare, logits(True), moving, cannot_move, moved_text)


def _draw_soft_prompt(spec: Architecture, embeddings: Logits) -> SoftPrompt:
    """P random virtual tokens of the token embeddings' root mean square, other ones for each architecture."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "big"))
    scale = np.sqrt(np.square(embeddings).mean())
    return SoftPrompt((rng.standard_normal((NUM_VIRTUAL_TOKENS, embeddings.shape[1])) * scale).astype(np.float32))


@dataclass(frozen=True)
class _Answer:
    """Logits of the measured text, (T, V), and of each of the canaries' prompts, (V,)."""

    text: Logits
    canary: dict[tuple[int, ...], Logits]


def _ask(oracle: Oracle, model: Path, patch: Patch | None, **options: Any) -> _Answer:
    from edgepatch.runtimes import load_runtime

    with load_runtime(model, patch, **options, num_threads=1) as runtime:
        _require_route(runtime, options.get("seed_route"))
        canary = {tokens: runtime.logits_of_last(tokens) for tokens in oracle.prompts}
        return _Answer(runtime.logits(oracle.tokens), canary)


def _require_route(runtime: Session, route: str | None) -> None:
    if route and runtime.seed_route != route:
        raise InputError(f"seed route: expected {route}, found {runtime.seed_route}")


def _compare(oracle: Oracle, patch: Patch, bare: _Answer, patched: _Answer) -> Row:
    assert patch.canary is not None  # make_oracle
    expected = oracle.moved if patch is oracle.moving else oracle.patched
    deviations = (deviation(p, bare.canary[p.tokens], patched.canary[p.tokens]) for p in patch.canary.prompts)
    row = divergence(expected, patched.text) | {
        "kl_bare": divergence(oracle.bare, bare.text)["kl"],
        "kl_no_patch": divergence(expected, bare.text)["kl"],
        "canary": max(deviations),
    }
    if patch is oracle.moving:
        row["kl_pinned"] = divergence(oracle.moved, oracle.patched)["kl"]
    return row


def _patch_of(oracle: Oracle, seed: str, route: str) -> Patch:
    """The patch whose seed stays or moves.

    Raises:
        InputError: there is none of this architecture.
    """
    if route == "b" and oracle.no_seed:
        raise InputError(oracle.no_seed)
    if seed == PINNED:
        return oracle.patch
    if oracle.moving is None:
        raise InputError(oracle.cannot_move)
    return oracle.moving


def _reason(error: EdgepatchError) -> str:
    """An error in one line, without the paths of this run."""
    words = " ".join(str(error).splitlines()).split(" ")
    return " ".join(Path(word).name if "/" in word else word for word in words)


def measure(spec: Architecture, folder: Path, oracle: Oracle, llama_cpp_source: Path) -> list[Row]:
    """All rows of an architecture; what the library refuses gives rows with its reason.

    Args:
        spec: the architecture.
        folder: holds its Transformers folder in ``hf``, and gets the other forms.
        oracle: of that model.
        llama_cpp_source: llama.cpp's source tree.
    """
    rows: list[Row] = []
    for type_name, model in _gguf_forms(spec, folder, llama_cpp_source):
        rows += llamacpp_rows(spec, type_name, model, oracle)
    return [*rows, *_onnx_rows(spec, folder, oracle)]


def _gguf_forms(spec: Architecture, folder: Path, llama_cpp_source: Path) -> Iterator[tuple[str, Path]]:
    from edgepatch.converters.gguf import writer

    for type_name in spec.gguf_types:
        target = folder / f"{type_name}.gguf"
        if type_name in ("F32", "F16"):
            convert(spec, folder / "hf", target, type_name, llama_cpp_source)
        else:
            writer.quantize(folder / "F32.gguf", target, type_name, num_threads=1)
        yield type_name, target


def llamacpp_rows(spec: Architecture, type_name: str, model: Path, oracle: Oracle) -> Iterator[Row]:
    """One row for each cache, flash attention and route of a GGUF file."""
    identity = {"architecture": spec.name, "runtime": "llamacpp", "quantization": type_name}
    for kv_type in KV_TYPES:
        for flash_attention in (False, True):
            setting = {"kv_type": kv_type, "flash_attention": flash_attention}
            yield from (identity | setting | row for row in _routes(type_name, model, oracle, setting))


def _routes(type_name: str, model: Path, oracle: Oracle, setting: Row) -> Iterator[Row]:
    """The rows of one model and one kind of cache."""
    bare: _Answer | None = None
    for route, seed in product(ROUTES, SEEDS):
        row: Row = {"route": route, "seed": seed} | dict.fromkeys(METRICS)
        try:
            patch, options = _patch_of(oracle, seed, route), setting | {"context_length": CONTEXT}
            bare = bare or _ask(oracle, model, None, **options)
            patched = _ask(oracle, model, patch, **options, seed_route=ROUTES[route])
            row |= _compare(oracle, patch, bare, patched)
            if type_name == "F16" and seed == PINNED:
                row["kl_rounded"] = divergence(oracle.patched_f16, patched.text)["kl"]
        except EdgepatchError as error:
            row["refused"] = _reason(error)
        yield row


def _onnx_rows(spec: Architecture, folder: Path, oracle: Oracle) -> Iterator[Row]:
    exporter = ""
    for precision in ONNX_PRECISIONS:
        identity: Row = {"architecture": spec.name, "runtime": "onnx", "quantization": precision}
        identity |= {"kv_type": "f16" if precision == "fp16" else "f32", "flash_attention": None, "route": "b"}
        target, refused = folder / f"onnx-{precision}", oracle.no_seed
        try:
            exporter = "" if refused else _export(spec, folder, precision, exporter)
        except EdgepatchError as error:
            refused = _reason(error)
        for seed in SEEDS:
            row = identity | {"seed": seed} | dict.fromkeys(METRICS)
            yield row | ({"refused": refused} if refused else {"exporter": exporter} | onnx_row(target, oracle, seed))


def onnx_row(model: Path, oracle: Oracle, seed: str) -> Row:
    """What is measured of an ONNX folder with a seed that stays or moves, or why it is refused."""
    try:
        patch = _patch_of(oracle, seed, "b")
        return _compare(oracle, patch, *(_ask(oracle, model, each) for each in (None, patch)))
    except EdgepatchError as error:
        return {"refused": _reason(error)}


def _export(spec: Architecture, folder: Path, precision: Any, working: str) -> str:
    """Exports with the exporter that is known to work, else with the first that does; gives its name."""
    from edgepatch.converters.onnx import conversion as onnx

    if working == "transformers":  # as `onnx.export` would, but without minutes of exporting the same graph again
        return _reduce(folder, precision, working)
    refusals = []
    for exporter in [working] if working else dict.fromkeys((spec.exporter, *ONNX_EXPORTERS)):
        try:
            onnx.export(folder / "hf", folder / f"onnx-{precision}", precision, exporter)  # type: ignore[arg-type]
            return str(exporter)
        except InputError as error:
            refusals.append(f"{exporter}: {error}")
    raise InputError("; ".join(refusals))


def _reduce(folder: Path, precision: str, exporter: str) -> str:
    """The exported float32 folder again, with smaller weights."""
    from edgepatch.converters.hf import folders
    from edgepatch.converters.onnx.files import MODEL_FILE
    from edgepatch.converters.onnx.identity import QUANTIZATIONS, identity, stamp
    from edgepatch.converters.onnx.precision import reduce

    target = folder / f"onnx-{precision}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / "onnx-fp32", target)
    reduce(target / MODEL_FILE, precision)
    stamp(target / MODEL_FILE, identity(folders.read_spec(folder / "hf"), QUANTIZATIONS[precision]))
    return exporter
