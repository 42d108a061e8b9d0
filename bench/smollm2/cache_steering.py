"""Cache steering: a mean difference of keys and values, added once to the cache where a prompt ends (Belitsky et al. 2025, arXiv 2507.08799).

As in the paper, every layer's direction is the mean over pairs of the key and of the value at the last token of the positive example
less those of the negative one. That last token is the same in both: here a newline behind the chosen and behind the rejected answer,
there the opening of an answer behind worked examples. After the prompt was evaluated, c_k times the one and c_v times the other are
added to one cell of the cache; nothing else is touched, and nothing is done while the reply is made.

The paper edits the cell of the prompt's last token and appends a neutral token, which is the first to see the edit. Here nothing is
appended, so that the bare model reads the same prompt: the cell of the next to last token is edited, and the last one sees it. The paper adds
keys as they were turned at their own places; here a direction is turned back, and to the place of the cell. The authors choose c_k and c_v
by hand; here they are chosen on training pairs. So is where the direction is taken: it may also be the mean over the answer's tokens, as
that of our control vector is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.arms import load_llamacpp
from edgepatch.bench.smollm2.control_vector import encoded
from edgepatch.bench.smollm2.strengths import Setting, Trial, choose_setting
from edgepatch.converters.hf import caches, folders, rotary
from edgepatch.converters.llamacpp.layout import seeded_state
from edgepatch.converters.llamacpp.moving import read_seed
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.errors import InputError
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import KVSeed
from edgepatch.training.frozen.forward import tokenizer_of
from edgepatch.training.pairs.preferences import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAKEN_AT = ("newline", "answer")
"""The token behind an answer, or the mean over the answer's own."""

C_KEYS, C_VALUES = (0.0, 0.2), (2.0, 4.0, 8.0)
"""Times the directions; the authors' published settings have c_k of 0, once 0.2, and c_v of 1 to 10."""

TEXT_PROMPT = 4
"""Tokens of a plain text that count as its prompt: a text alone has no place where a reply begins.

With 4 the third cell is edited. Most heads rest on the first cell: on SmolLM2 an edit of that one multiplies perplexity by 4 to 100.
"""


@dataclass(frozen=True)
class CacheEdit:
    """What is added to one cell of the cache.

    Attributes:
        cell: L keys and values (K, 1, H), float32; keys as at position 0.
        rotation: of the model's keys.
    """

    cell: KVSeed
    rotation: Rotation

    def times(self, c_keys: float, c_values: float) -> CacheEdit:
        """The same directions in other strengths."""
        keys, values = (
            tuple(np.float32(factor) * direction for direction in directions)
            for factor, directions in ((c_keys, self.cell.keys), (c_values, self.cell.values))
        )
        return CacheEdit(KVSeed(keys, values), self.rotation)


# The directions.


def mean_differences(model: Path, pairs: Sequence[Pair], progress: Progress = silent) -> dict[str, CacheEdit]:
    """For each of ``TAKEN_AT``, the mean over pairs of keys and values of the chosen answer less those of the rejected one.

    Args:
        model: Transformers folder, or GGUF file to be dequantized.
        pairs: of one task.
        progress: told of every pair.

    Raises:
        InputError: the model cannot be read, its keys do not turn with their place, or a pair cannot be encoded.
    """
    tokenizer, frozen = tokenizer_of(model), folders.load_model(model)
    rotation, newline = rotary.read_rotation(frozen), tokenizer.encode("\n", bos=False)
    differences = []
    for pair in pairs:
        prompt, *answers = encoded(tokenizer, pair)
        chosen, rejected = (_answer_cells(frozen, rotation, prompt, answer, newline) for answer in answers)
        differences.append(chosen - rejected)
        progress("directions", len(differences), len(pairs))
    means = np.asarray(np.mean(differences, axis=0), np.float32)
    cells = (KVSeed(tuple(keys), tuple(values)) for keys, values in means)
    return {name: CacheEdit(cell, rotation) for name, cell in zip(TAKEN_AT, cells, strict=True)}


def _answer_cells(
    model: PreTrainedModel, rotation: Rotation, prompt: list[int], answer: list[int], newline: list[int]
) -> NDArray[np.float32]:
    """(2, 2, L, K, 1, H): for each of ``TAKEN_AT`` keys and values of every layer, keys as at position 0."""
    import torch

    tokens, first, end = [*prompt, *answer, *newline], len(prompt), len(prompt) + len(answer)
    cache = caches.new_cache(model)
    with torch.inference_mode():
        model.get_decoder()(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    cached = [layer.keys[0].numpy() for layer in cache.layers]
    keys = np.stack(  # (L, K, T - first, H)
        [
            np.stack([rotation.turned(key[:, i], layer, -i) for i in range(first, len(tokens))], axis=1)
            for layer, key in enumerate(cached)
        ]
    )
    values = np.stack([layer.values[0, :, first:].numpy() for layer in cache.layers])
    both = np.stack([keys, values])
    return np.stack([both[..., -1:, :], both[..., : end - first, :].mean(axis=3, keepdims=True)])


# The model that is steered.


class CacheSteeredRuntime(LlamaCppRuntime):
    """A GGUF file in llama.cpp, without a patch, that edits the cache of every prompt once.

    Of a prompt, of which the logits of the last token alone are asked for, the cell of the next to last token is edited. Of a text that is
    read as a whole the first ``TEXT_PROMPT`` tokens are its prompt. One of a single token stays as it is. Every prompt is evaluated afresh:
    what another has left has its edit elsewhere.

    Args:
        path: the GGUF file.
        edit: what is added.
        **options: of ``LlamaCppRuntime``.

    Raises:
        InputError: the file cannot be read, the edit is of another model, or the layout of the cache cannot be confirmed.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """

    def __init__(self, path: Path, edit: CacheEdit, **options: Any) -> None:
        super().__init__(path, None, **options)
        try:
            spec = self.spec
            shape = (spec.num_hidden_layers, spec.num_key_value_heads, 1, spec.head_dim)
            found = (len(edit.cell.keys), *edit.cell.keys[0].shape)
            if found != shape:
                raise InputError(f"cache edit: expected {shape}, found {found}", hint="make it for this very model")
            self._edit, self._layout = edit, self.calibration.layout_by_rope()
        except BaseException:
            self.close()
            raise

    def rewind(self, sequence: int, length: int) -> int:
        return super().rewind(sequence, 0)

    def forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        if self.context.last_position(sequence) >= 0:
            if not every:
                raise InputError(
                    f"sequence {sequence}: expected an empty one for a prompt, found one that it goes on from",
                    hint="reset the session between a prompt and a longer one that begins with it",
                )
            return super().forward(sequence, tokens, every)
        place = (min(len(tokens), TEXT_PROMPT) if every else len(tokens)) - 2
        if place < 0:
            return super().forward(sequence, tokens, every)
        before = super().forward(sequence, tokens[: place + 1], every)
        self._edit_last_cell(sequence, place)
        behind = super().forward(sequence, tokens[place + 1 :], every)
        return np.concatenate([before, behind]) if every else behind

    def _edit_last_cell(self, sequence: int, place: int) -> None:
        """llama.cpp has no call that changes a cell, so that the sequence's state is read, changed and put back."""
        state = read_state(self.context.state(sequence))
        cells = read_seed(state, self._layout, self.spec.num_key_value_heads, self.spec.head_dim)
        added = self._edit.rotation.moved(self._edit.cell, place)
        for kind in ("keys", "values"):
            for layer, direction in zip(getattr(cells, kind), getattr(added, kind), strict=True):
                layer[:, place:] += direction
        self.context.restore(sequence, seeded_state(state, self._layout, cells))


def load(model: Path, edit: CacheEdit | None, **options: Any) -> Session:
    """A GGUF file in llama.cpp with an edit of its cache, or bare; no patch.

    Args:
        model: the file.
        edit: of this model.
        **options: of ``LlamaCppRuntime``.

    Raises:
        InputError: as ``CacheSteeredRuntime``.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """
    return (
        load_llamacpp(model, **options) if edit is None else Session(CacheSteeredRuntime(model, edit, **options), None)
    )


def choose(
    model: Path,
    edits: Mapping[str, CacheEdit],
    pairs: Sequence[Pair],
    texts: Sequence[str],
    progress: Progress = silent,
) -> tuple[Trial, list[Trial]]:
    """The trial that ``strengths.choose_setting`` takes, and all.

    Args:
        model: GGUF file that is steered.
        edits: of ``mean_differences`` on this model.
        pairs: that may be trained on.
        texts: benign, that may be trained on.
        progress: told of every trial.

    Raises:
        InputError: the model cannot be read, or a text does not fit its context.
    """

    def steered(setting: Setting | None) -> Session:
        return load(model, None if setting is None else edit_of(edits, setting))

    settings: list[Setting] = [
        {"taken_at": place, "c_keys": c_keys, "c_values": c_values}
        for place in TAKEN_AT
        for c_keys in C_KEYS
        for c_values in C_VALUES
    ]
    return choose_setting(steered, settings, pairs, texts, progress)


def edit_of(edits: Mapping[str, CacheEdit], setting: Setting) -> CacheEdit:
    """The edit that a setting names, in its strength.

    Args:
        edits: of ``mean_differences``.
        setting: of a trial of ``choose``.
    """
    return edits[str(setting["taken_at"])].times(float(setting["c_keys"]), float(setting["c_values"]))
