"""Which type llama.cpp's quantizer gives a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bench.shapes.shape import Shape

CHUNK_BLOCKS = 1 << 14

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
"""Kind of a file -> its number in ``general.file_type``."""

FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What takes the place of a type in blocks of 256 where a row is no multiple of them."""


def tensor_types(shape: Shape, kind: str) -> dict[str, str]:
    """Matrix -> its ggml type in a file of ``kind``.

    Source: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` of llama.cpp's ``src/llama-quant.cpp``, for Q4_K_M.

    Raises:
        InputError: a row is no multiple of its type's blocks.
    """
    import gguf

    types = {}
    for name, dimensions in shape.tensors().items():
        if len(dimensions) == 1:
            continue
        chosen = _mixed(name, shape) if kind == "Q4_K_M" else kind
        if dimensions[-1] % _block_values(gguf, chosen):
            chosen = FALLBACKS.get(chosen, chosen)
        if dimensions[-1] % _block_values(gguf, chosen):
            raise InputError(
                f"{name}: rows of {dimensions[-1]} are no multiple of {chosen}'s blocks of {_block_values(gguf, chosen)}"
            )
        types[name] = chosen
    return types


def _block_values(gguf: Any, kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def _mixed(name: str, shape: Shape) -> str:
    """Q4_K_M's choice: more bits for the logits, and in the layers that need them for values and the way down."""
    if name == ("token_embd.weight" if shape.is_tied else "output.weight"):
        return "Q6_K"
    if name.startswith("blk.") and name.split(".")[2] in ("attn_v", "ffn_down"):
        return "Q6_K" if _uses_more_bits(int(name.split(".")[1]), shape.num_layers) else "Q4_K"
    return "Q4_K"


def _uses_more_bits(layer: int, num_layers: int) -> bool:
    return layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2
