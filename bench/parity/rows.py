"""Measures one architecture: every form of the tiny model, in every setting, against Transformers fed ``inputs_embeds``."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """

    tokens: list[int]
    patch: Patch
    no_seed: str
    patched: Logits
    bare: Logits
    patched_f16: Logits


def make_oracle(spec: Architecture, folder: Path) -> Oracle:
    """Loads the model, draws a soft prompt in the scale of its token embeddings, and evaluates both."""
    import torch

    from edgepatch.converters.hf import folders, seeds
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
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    return Oracle(tokens, patch, no_seed, patched, bare, logits(True))


def _draw_soft_prompt(spec: Architecture, embeddings: Logits) -> SoftPrompt:
    """P random virtual tokens of the token embeddings' root mean square, other ones for each architecture."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "big"))
    scale = np.sqrt(np.square(embeddings).mean())
    return SoftPrompt((rng.standard_normal((NUM_VIRTUAL_TOKENS, embeddings.shape[1])) * scale).astype(np.float32))


@dataclass(frozen=True)
class _Answer:
    """Logits of the measured text, (T, V), and of each of the canary's prompts, (V,)."""

    text: Logits
    canary: list[Logits]


def _ask(oracle: Oracle, model: Path, patch: Patch | None, **options: Any) -> _Answer:
    from edgepatch.runtimes import load_runtime

    with load_runtime(model, patch, **options, num_threads=1) as runtime:
        _require_route(runtime, options.get("seed_route"))
        assert oracle.patch.canary is not None  # make_oracle
        prompts = [list(prompt.tokens) for prompt in oracle.patch.canary.prompts]
        return _Answer(runtime.logits(oracle.tokens), [runtime.logits(tokens)[-1] for tokens in prompts])


def _require_route(runtime: Session, route: str | None) -> None:
    if route and runtime.seed_route != route:
        raise InputError(f"seed route: expected {route}, found {runtime.seed_route}")


def _compare(oracle: Oracle, bare: _Answer, patched: _Answer) -> Row:
    assert oracle.patch.canary is not None  # make_oracle
    probes = zip(oracle.patch.canary.prompts, bare.canary, patched.canary, strict=True)
    return divergence(oracle.patched, patched.text) | {
        "kl_bare": divergence(oracle.bare, bare.text)["kl"],
        "kl_no_patch": divergence(oracle.patched, bare.text)["kl"],
        "canary": max(deviation(prompt, without, with_patch) for prompt, without, with_patch in probes),
    }


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
    for route, seed_route in ROUTES.items():
        row: Row = {"route": route} | dict.fromkeys(METRICS)
        try:
            if route == "b" and oracle.no_seed:
                raise InputError(oracle.no_seed)
            options = setting | {"context_length": CONTEXT}
            bare = bare or _ask(oracle, model, None, **options)
            patched = _ask(oracle, model, oracle.patch, **options, seed_route=seed_route)
            row |= _compare(oracle, bare, patched)
            if type_name == "F16":
                row["kl_rounded"] = divergence(oracle.patched_f16, patched.text)["kl"]
        except EdgepatchError as error:
            row["refused"] = _reason(error)
        yield row


def _onnx_rows(spec: Architecture, folder: Path, oracle: Oracle) -> Iterator[Row]:
    exporter = ""
    for precision in ONNX_PRECISIONS:
        row: Row = {"architecture": spec.name, "runtime": "onnx", "quantization": precision}
        row |= {
            "kv_type": "f16" if precision == "fp16" else "f32",
            "flash_attention": None,
            "route": "b",
        } | dict.fromkeys(METRICS)
        try:
            if oracle.no_seed:
                raise InputError(oracle.no_seed)
            exporter = _export(spec, folder, precision, exporter)
            bare, patched = (_ask(oracle, folder / f"onnx-{precision}", patch) for patch in (None, oracle.patch))
            row |= {"exporter": exporter} | _compare(oracle, bare, patched)
        except EdgepatchError as error:
            row["refused"] = _reason(error)
        yield row


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
