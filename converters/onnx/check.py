"""Is a graph the model that it was made of? Both continue the same seed, and their logits are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.onnx.files import open_folder
from edgepatch.converters.onnx.graphs import evaluate, quantization, recognise
from edgepatch.converters.onnx.sessions import open_session, prove_session
from edgepatch.errors import InputError
from edgepatch.tensors import ModelSpec, SoftPrompt

NUM_VIRTUAL_TOKENS, NUM_TOKENS = 5, 12
MAX_DIFFERENCE = 1e-4
"""Of a float32 graph's logits, where the largest logit is below 10; in proportion above."""

MIN_CORRELATION = {"F16": 0.999, "int8": 0.99, "int4": 0.9}
"""Of the logits of a quantized graph with those of the model; those of another model are near 0."""


@dataclass(frozen=True)
class Agreement:
    """How close a graph is to its model.

    Attributes:
        quantization: of the graph.
        max_difference: of a logit.
        correlation: of all logits.
    """

    quantization: str
    max_difference: float
    correlation: float


def compare(folder: Path, spec: ModelSpec, hf_folder: Path, model_file: str | None = None) -> Agreement:
    """Continues a random seed with a graph and with the model that it should be.

    Args:
        folder: the graph's.
        spec: the model.
        hf_folder: Transformers folder of the model.
        model_file: the graph within its folder.

    Raises:
        InputError: the graph cannot be seeded, or its logits are not the model's.
    """
    file = open_folder(folder, model_file)
    session = open_session(prove_session(file, spec=spec))
    graph = recognise(session, file, spec)
    model = folders.load_model(hf_folder)
    soft_prompt, tokens = _sample(model, spec)
    expected = _expected(model, soft_prompt, tokens)
    window = int(getattr(folders.text_config(model.config), "sliding_window", None) or 0)
    logits = evaluate(session, graph, spec, seeds.compute_kv_seed(model, soft_prompt), tokens, window)
    if not np.isfinite(logits).all():
        raise InputError(f"{file.path}: its logits are not finite", hint="export the model in fp32")
    result = Agreement(
        quantization(file, graph),
        float(np.abs(logits - expected).max()),
        float(np.corrcoef(logits.ravel(), expected.ravel())[0, 1]),
    )
    _require(result, file.path, float(np.abs(expected).max()))
    return result


def _require(result: Agreement, path: Path, largest: float) -> None:
    allowed = MAX_DIFFERENCE * max(1.0, largest / 10)
    if result.quantization == "F32":
        agrees = result.max_difference <= allowed
        difference = f"a logit differs by {result.max_difference:.1e}, allowed is {allowed:.1e}"
    else:
        least = MIN_CORRELATION[result.quantization]
        agrees = result.correlation >= least
        difference = f"the logits correlate by {result.correlation:.3f}, expected {least} or more"
    if not agrees:
        raise InputError(
            f"{path} does not compute what the model in Transformers computes behind the same seed: {difference}",
            hint="take another exporter (--exporter), or convert the model to GGUF",
        )


def _sample(model: Any, spec: ModelSpec) -> tuple[SoftPrompt, list[int]]:
    """A soft prompt in the scale of the embeddings, strong enough to move every logit, and a text."""
    rng = np.random.default_rng(7)
    embeddings = model.get_input_embeddings().weight
    scale = float(embeddings.std()) * 2
    soft_prompt = rng.standard_normal((NUM_VIRTUAL_TOKENS, spec.hidden_size)) * scale
    return SoftPrompt(soft_prompt.astype(np.float32)), [int(t) for t in rng.integers(0, spec.vocab_size, NUM_TOKENS)]


def _expected(model: Any, soft_prompt: SoftPrompt, tokens: list[int]) -> NDArray[np.float32]:
    """(T, V) logits of the model fed ``inputs_embeds``."""
    import torch

    text = model.get_input_embeddings()(torch.tensor([tokens]))
    embeddings = torch.cat([torch.from_numpy(soft_prompt.embeddings)[None], text], dim=1)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(inputs_embeds=embeddings).logits[0, -len(tokens) :].float().numpy()
    return logits
