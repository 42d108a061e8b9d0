"""A seed under one label: the state of a text's first token with the seed in front of it, which stock clients of llama.cpp restore.

Such a client reuses cells as far as the *tokens* of a prompt agree with those that it has counted, one cell a token, and knows
of no others. So all cells stand at the position of the first token, which every prompt begins with, and count as that token. Its own key
and value are those behind the seed. All of it is computed in a float32 cache, turned so that the token stands at 0 and the seed in front of
it, and rounded once to the type of the client's cache.
"""

from __future__ import annotations

from dataclasses import replace

from edgepatch.converters.llamacpp.layout import Layout, one_label_state, seeded_state
from edgepatch.converters.llamacpp.moving import read_seed
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.context import LlamaContext
from edgepatch.runtimes.llamacpp.turning import read_rotation
from edgepatch.tensors import KVSeed


def labelled_cells(client: LlamaContext, num_rotated: int, patch: Patch, layout: Layout, token: int) -> KVSeed:
    """The stored seed of a patch and a text's first token behind it, in float32.

    Args:
        client: whose model computes the token's cell.
        num_rotated: R, dimensions of a head that turn.
        patch: with a stored seed.
        layout: measured on this model.
        token: its id.

    Returns:
        P + 1 cells, canonical, at places -P to 0.

    Raises:
        InputError: keys of the model do not turn with their place.
        InactivePatchError: llama.cpp did not take the seed.
    """
    assert patch.kv_seed is not None  # save_seed_file
    model, spec, count = client.model, patch.base, patch.num_virtual_tokens
    exact = replace(client.settings, num_cells=count + 1, num_sequences=1, kv_type="f32", flash_attention=False)
    plain = replace(layout, key_block=0, value_block=0)  # quantized caches alone are multiplied
    context = LlamaContext(model, exact)
    try:
        rotation = patch.rotation or read_rotation(context, plain, spec, num_rotated)
        context.clear()
        context.evaluate(0, [token])
        context.restore(0, seeded_state(read_state(context.state(0)), plain, patch.kv_seed, model.window))
        context.evaluate(0, [token])
        cells = read_seed(read_state(context.state(0)), plain, spec.num_key_value_heads, spec.head_dim)
    finally:
        context.close()
    return rotation.moved(cells, -count)


def labelled_state(context: LlamaContext, sequence: int, cells: KVSeed, layout: Layout, token: int) -> bytes:
    """The state of such cells under the label of the token, all at position 0.

    Args:
        context: whose cache takes it; it is empty afterwards.
        sequence: that takes it.
        cells: of ``labelled_cells``.
        layout: measured on this model under these settings.
        token: any will do; the structure of its state is wanted.

    Raises:
        InputError: a value is beyond the cache's type.
    """
    context.clear()
    context.evaluate(sequence, [token])
    probe = read_state(context.state(sequence))
    context.clear()
    return one_label_state(probe, layout, cells)
