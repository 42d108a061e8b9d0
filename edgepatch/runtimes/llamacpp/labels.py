"""A seed under one label: the state of a text's first token with the seed in front of it, which stock clients of llama.cpp restore.

Such a client reuses cells as far as the *tokens* of a prompt agree with those that it has counted, one cell a token, and knows
of no others. So all cells stand at the position of the first token, which every prompt begins with, and count as that token. Its own key
and value are those behind the seed. All of it is computed in a float32 cache, turned so that the token stands at 0 and the seed in front of
it, and rounded once to the type of the client's cache.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgepatch.converters.llamacpp.layout import Layout, one_label_state, seeded_state
from edgepatch.converters.llamacpp.moving import read_seed
from edgepatch.converters.llamacpp.state import SequenceState, read_state
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.calibration import Calibration
from edgepatch.runtimes.llamacpp.context import ContextSettings, LlamaContext, LlamaModel
from edgepatch.runtimes.llamacpp.turning import read_rotation
from edgepatch.tensors import KVSeed, ModelSpec


class LabelledSeed:
    """The seed of a patch with the first token of every prompt behind it.

    Args:
        model: loaded; keys of it turn with their place.
        settings: of the context in which the state is wanted.
        calibration: of the model.
        patch: with a seed whose layout is confirmed, or with a soft prompt.
        layout: measured on this model under these settings.
        token: its id.

    Raises:
        InputError: keys of the model do not turn with their place.
        InactivePatchError: llama.cpp did not take the seed.
    """

    def __init__(
        self,
        model: LlamaModel,
        settings: ContextSettings,
        calibration: Calibration,
        patch: Patch,
        layout: Layout,
        token: int,
    ) -> None:
        self._layout, self._window, self._token = layout, model.window, token
        exact = replace(settings, num_cells=patch.num_virtual_tokens + 1, num_sequences=1)
        context = LlamaContext(model, replace(exact, kv_type="f32", flash_attention=False))
        plain = replace(layout, key_block=0, value_block=0)  # quantized caches alone are multiplied
        try:
            rotation = patch.rotation or read_rotation(context, plain, patch.base, calibration.num_rotated)
            context.clear()
            if patch.kv_seed is not None:
                context.evaluate(0, [token])
                probe = read_state(context.state(0))
                context.restore(0, seeded_state(probe, plain, patch.kv_seed, model.window))
            elif patch.soft_prompt is not None:
                factor = calibration.embedding_factor(context, 0)
                context.evaluate_embeddings(0, patch.soft_prompt.embeddings * np.float32(factor))
            context.evaluate(0, [token])
            self._cells = rotation.moved(self._read(context, plain, patch.base), -patch.num_virtual_tokens)
        finally:
            context.close()

    @staticmethod
    def _read(context: LlamaContext, layout: Layout, spec: ModelSpec) -> KVSeed:
        return read_seed(read_state(context.state(0)), layout, spec.num_key_value_heads, spec.head_dim)

    def state(self, context: LlamaContext, sequence: int) -> bytes:
        """The state of all cells at position 0.

        Args:
            context: whose cache takes it; what it held is lost.
            sequence: that takes it.

        Raises:
            InputError: a value is beyond the cache's type.
        """
        context.clear()
        context.evaluate(sequence, [self._token])
        probe: SequenceState = read_state(context.state(sequence))
        context.clear()
        return one_label_state(probe, self._layout, self._cells, self._window)
