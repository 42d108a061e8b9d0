"""A control vector for a llama.cpp model from preference pairs: what a user would take first in place of a patch.

One direction a layer, the mean difference between the hidden states of chosen and rejected answers (Rimsky et al. 2024, arXiv 2312.06681;
repeng's and llama.cpp's "mean" method). How strong it is, and in which layers, is chosen on training pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.arms import load_llamacpp, write_control_vector
from edgepatch.bench.smollm2.strengths import Setting, Trial, choose_setting
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.specs import spec_of
from edgepatch.converters.hf import folders
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.training.frozen.forward import tokenizer_of
from edgepatch.training.pairs.preferences import Pair

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STRENGTHS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Times the mean difference, which each layer adds once more."""
SHARES = {"all layers": (0.0, 1.0), "middle third": (1 / 3, 2 / 3)}


def mean_differences(model: Path, pairs: Sequence[Pair], progress: Progress = silent) -> NDArray[np.float32]:
    """(L, D): mean over pairs of what each layer gives on the chosen answer less on the rejected one, averaged over their tokens.

    Args:
        model: Transformers folder, or GGUF file to be dequantized.
        pairs: of one task.
        progress: told of every pair.

    Raises:
        InputError: the model cannot be read, or a pair not be encoded.
    """
    import torch

    tokenizer, frozen = tokenizer_of(model), folders.load_model(model)
    differences = []
    for pair in pairs:
        prompt, *answers = encoded(tokenizer, pair)
        with torch.no_grad():
            chosen, rejected = (_hidden_means(frozen, prompt, answer) for answer in answers)
        differences.append(chosen - rejected)
        progress("directions", len(differences), len(pairs))
    return np.asarray(np.mean(differences, axis=0), np.float32)


def encoded(tokenizer: FolderTokenizer, pair: Pair) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a pair's prompt, its chosen and its rejected answer."""
    prompt = tokenizer.encode(pair.prompt) if isinstance(pair.prompt, str) else tokenizer.encode_chat(pair.prompt)
    chosen, rejected = (tokenizer.encode(answer, bos=False) for answer in (pair.chosen, pair.rejected))
    return prompt, chosen, rejected


def _hidden_means(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.float64]:
    """(L, D) over the answer's tokens."""
    import torch

    with _layer_outputs(model) as outputs:
        model.get_decoder()(input_ids=torch.tensor([[*prompt, *answer]]))
    return np.stack([output[0, len(prompt) :].double().mean(0).numpy() for output in outputs])


@contextmanager
def _layer_outputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Outputs of the decoder's layers in their order; Transformers' own ``hidden_states`` end behind the last norm."""
    outputs: list[torch.Tensor] = []

    def keep(layer: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.get_decoder().layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def scaled(directions: NDArray[np.float32], layers: str, strength: float) -> NDArray[np.float32]:
    """The directions of a share of the layers times the strength; the others are zero."""
    first, last = (round(end * len(directions)) for end in SHARES[layers])
    inside = np.arange(len(directions))
    return np.where(((inside >= first) & (inside < last))[:, None], directions * strength, 0).astype(np.float32)


def choose(
    model: Path,
    directions: NDArray[np.float32],
    pairs: Sequence[Pair],
    texts: Sequence[str],
    file: Path,
    progress: Progress = silent,
) -> tuple[Trial, list[Trial]]:
    """Leaves in the file the vector in the strength that ``strengths.choose_setting`` takes.

    Args:
        model: GGUF file that the vector will stand in.
        directions: (L, D) float32.
        pairs: that may be trained on.
        texts: benign, that may be trained on.
        file: GGUF file of the vector.
        progress: told of every trial.

    Returns:
        The chosen trial, and all.

    Raises:
        InputError: the model cannot be read, or the file not be written.
    """
    spec = spec_of(read_header(model))

    def write(setting: Setting) -> None:
        vector = scaled(directions, str(setting["layers"]), float(setting["strength"]))
        write_control_vector(spec, vector, file)

    def steered(setting: Setting | None) -> Session:
        if setting is None:
            return load_llamacpp(model)
        write(setting)
        return load_llamacpp(model, control_vector=file)

    settings: list[Setting] = [{"layers": layers, "strength": strength} for layers in SHARES for strength in STRENGTHS]
    chosen, trials = choose_setting(steered, settings, pairs, texts, progress)
    write(chosen.setting)
    return chosen, trials
