"""A control vector for a llama.cpp model from preference pairs: what a user would take first in place of a patch.

One direction a layer, the mean difference between the hidden states of chosen and rejected answers (Rimsky et al. 2024, arXiv 2312.06681;
repeng's and llama.cpp's "mean" method). How strong it is, and in which layers, is chosen on training pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.arms import load_llamacpp, write_control_vector
from edgepatch.bench.likelihoods import token_losses, tokens_behind
from edgepatch.converters.hf import folders
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session
from edgepatch.training.forward import tokenizer_of
from edgepatch.training.pairs.preferences import Pair

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STRENGTHS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Times the mean difference, which each layer adds once more."""
SHARES = {"all layers": (0.0, 1.0), "middle third": (1 / 3, 2 / 3)}
MAX_PERPLEXITY = 1.05
"""Of the bare model's: a stronger vector costs more than any patch may."""


@dataclass(frozen=True)
class Trial:
    """One setting, measured on training pairs.

    Attributes:
        layers: key of ``SHARES``.
        strength: one of ``STRENGTHS``.
        margin_gain: how much less the model leans to the rejected answers, in nats a token.
        perplexity: of benign texts, over the bare model's.
    """

    layers: str
    strength: float
    margin_gain: float
    perplexity: float


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
        prompt = tokenizer.encode(pair.prompt) if isinstance(pair.prompt, str) else tokenizer.encode_chat(pair.prompt)
        answers = (tokenizer.encode(answer, bos=False) for answer in (pair.chosen, pair.rejected))
        with torch.no_grad():
            chosen, rejected = (_hidden_means(frozen, prompt, answer) for answer in answers)
        differences.append(chosen - rejected)
        progress("directions", len(differences), len(pairs))
    return np.asarray(np.mean(differences, axis=0), np.float32)


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
    """Leaves in the file the vector with the largest gain in margin that costs no more perplexity than ``MAX_PERPLEXITY``.

    Args:
        model: GGUF file that the vector will stand in.
        directions: (L, D) float32.
        pairs: that may be trained on.
        texts: benign, that may be trained on.
        file: GGUF file of the vector.
        progress: told of every trial.

    Returns:
        The chosen trial, and all. Where every one costs too much it is the cheapest.

    Raises:
        InputError: the model cannot be read, or the file not be written.
    """
    with load_llamacpp(model) as bare:
        spec, lean, loss = bare.spec, _mean_lean(bare, pairs), _mean_loss(bare, texts)
    trials = list[Trial]()
    for layers in SHARES:
        for strength in STRENGTHS:
            write_control_vector(spec, scaled(directions, layers, strength), file)
            with load_llamacpp(model, control_vector=file) as steered:
                gain, ratio = lean - _mean_lean(steered, pairs), np.exp(_mean_loss(steered, texts) - loss)
            trials.append(Trial(layers, strength, float(gain), float(ratio)))
            progress("strengths", len(trials), len(SHARES) * len(STRENGTHS))
    cheap = [trial for trial in trials if trial.perplexity <= MAX_PERPLEXITY]
    chosen = max(cheap, key=lambda t: t.margin_gain) if cheap else min(trials, key=lambda t: t.perplexity)
    write_control_vector(spec, scaled(directions, chosen.layers, chosen.strength), file)
    return chosen, trials


def _mean_lean(runtime: Session, pairs: Sequence[Pair]) -> float:
    """How far the model leans to the rejected answers, in nats a token."""
    leans = []
    for pair in pairs:
        start = runtime.tokens(pair.prompt if isinstance(pair.prompt, str) else list(pair.prompt))
        chosen, rejected = (
            token_losses(runtime, start + tokens_behind(runtime, answer), len(start)).mean()
            for answer in (pair.chosen, pair.rejected)
        )
        leans.append(float(chosen - rejected))
    return float(np.mean(leans))


def _mean_loss(runtime: Session, texts: Sequence[str]) -> float:
    """Nats a token."""
    return float(np.concatenate([token_losses(runtime, runtime.encode(text)) for text in texts]).mean())
