"""A GGUF file of any quantization as an ordinary Transformers folder, and as a GGUF file in full precision.

Everything else that is made of a model is made from one of the two. Weights go through memory a piece at a time, so a model may
be larger than it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters.checkpoints import DTYPES, CheckpointTensor, write_weights
from edgepatch.converters.gguf import encoding, vocabularies
from edgepatch.converters.gguf import models as gguf_models
from edgepatch.converters.gguf import weights as gguf_weights
from edgepatch.converters.gguf.configs import as_saved, config_of, is_plain
from edgepatch.converters.gguf.encoding import TensorEntry
from edgepatch.converters.gguf.header import GGUFHeader, read_header
from edgepatch.converters.gguf.specs import spec_of
from edgepatch.converters.gguf.writer import quantize
from edgepatch.converters.hf import folders
from edgepatch.converters.origins import CONFIG_KEY, Origin
from edgepatch.errors import InputError
from edgepatch.files.writing import FolderKind, folder_beside, replacing_folder, require_new_folder, require_space
from edgepatch.progress import Progress, silent
from edgepatch.tensors import ModelSpec

NORMALLY_F16_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}
TRANSFORMERS_FOLDER = FolderKind("a Transformers folder", "config.json")
QUANTIZED_BYTES = 1.07  # of a value in Q8_0, the widest type but these


def num_weights(header: GGUFHeader) -> int:
    """How many values a file's tensors have together."""
    return sum(prod(info.shape) for info in header.tensors.values())


def dequantize(
    source: Path, target: Path, dtype: str = "float32", force: bool = False, progress: Progress = silent
) -> Origin:
    """Writes a Transformers folder of a GGUF file: weights, config, tokenizer, chat template, end tokens.

    Args:
        source: GGUF file of any type that the gguf package dequantizes.
        target: the folder; it appears complete or not at all.
        dtype: "float32", in which every weight is exactly what gguf-py makes of the file; or "bfloat16", half as large.
        force: replace a Transformers folder that is there already.
        progress: told how many bytes are written.

    Returns:
        What the folder was made from; its ``config.json`` says so too.

    Raises:
        InputError: the file is damaged, holds no language model or one that no Transformers folder holds faithfully; there is
            no room; or the target exists.
        MissingExtraError: a package of the extras "convert" and "gguf" is missing.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"type of a Transformers folder: expected one of {', '.join(DTYPES)}, found {dtype!r}", hint="take float32"
        )
    header = read_header(source)
    require_new_folder(target, TRANSFORMERS_FOLDER, force)
    spec = spec_of(header)
    gguf_weights.require_readable(header)
    require_space(target, _folder_bytes(header, dtype))
    with replacing_folder(target) as folder:
        return _write_folder(header, spec, folder, dtype, progress)


def _folder_bytes(header: GGUFHeader, dtype: str) -> int:
    vocabulary_bytes = sum(end - start for start, end in header.spans.values())
    return num_weights(header) * DTYPES[dtype][1] + 3 * vocabulary_bytes  # JSON is wordier


def _write_folder(header: GGUFHeader, spec: ModelSpec, folder: Path, dtype: str, progress: Progress) -> Origin:
    origin = Origin.of_header(header)
    config = config_of(header, spec)
    ends = vocabularies.write_tokenizer(header, folder)
    gguf_models.write_generation_config(header, ends, folder)
    tensors = _tensors(header, spec, config)
    settings = as_saved(config, dtype) | {CONFIG_KEY: asdict(origin)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(origin), encoding="utf-8")
    write_weights(folder, tensors, dtype, progress)
    actual = folders.read_spec(folder)
    if actual != spec:
        wrong = [name for name, value in spec.as_dict().items() if actual.as_dict()[name] != value]
        raise InputError(
            f"{header.path}: the Transformers folder would be another model: {', '.join(wrong)} would differ",
            hint="take the Transformers folder that the file was made from",
        )
    return origin


def _tensors(header: GGUFHeader, spec: ModelSpec, config: Any) -> dict[str, CheckpointTensor]:
    """Name -> tensor, of everything that a folder with this config holds; sets what class the config is for."""
    if is_plain(header):
        weights = gguf_weights.plan(header, spec, config)
        config.architectures = [gguf_weights.model_class(config).__name__]
        return {
            name: CheckpointTensor(weight.shape, lambda weight=weight: gguf_weights.checkpoint_pieces(header, weight))  # type: ignore[misc]
            for name, weight in weights.items()
        }
    model = gguf_models.load_model(header.path)  # of these, Transformers alone knows how the weights are ordered
    config.architectures = [type(model).__name__]
    tied = "lm_head.weight" if config.tie_word_embeddings else ""
    return {
        name: CheckpointTensor(tuple(value.shape), lambda value=value: iter([value.float().numpy()]))  # type: ignore[misc]
        for name, value in model.state_dict().items()
        if name != tied
    }


def _card(origin: Origin) -> str:
    front = f"---\nlicense: {origin.license}\n---\n\n" if origin.license else ""
    return (
        f"{front}# {origin.name or origin.file}\n\n"
        f"Dequantized by edgepatch from `{origin.file}` ({origin.quantization}). The weights are those of that file, widened: "
        "what its quantization has lost is lost here too.\n"
    )


# What is made through them.


@contextmanager
def dequantized(
    source: Path, target: Path, more_bytes_per_weight: float, progress: Progress = silent
) -> Iterator[Path]:
    """A Transformers folder of a model: itself, or a temporary one of a GGUF file.

    Args:
        source: folder or GGUF file.
        target: what will be made of it; the temporary folder lies beside it.
        more_bytes_per_weight: what the target will take.
        progress: as for ``dequantize``.

    Raises:
        InputError: as for ``dequantize``.
    """
    if not source.is_file():
        yield source
        return
    header = read_header(source)
    require_space(target, _folder_bytes(header, "float32") + int(more_bytes_per_weight * num_weights(header)))
    with folder_beside(target) as beside:
        dequantize(source, beside / target.name, progress=progress)
        yield beside / target.name


def requantize(source: Path, target: Path, type_name: str, progress: Progress = silent) -> Origin:
    """Another quantization of a quantized GGUF file, through full precision.

    Everything that the header says stays, and what the file was made from is added.

    Args:
        source: GGUF file of any type that the gguf package dequantizes, of any architecture.
        target: the new file; it appears complete or not at all.
        type_name: as for ``gguf.writer.quantize``.
        progress: told how many bytes are dequantized.

    Raises:
        InputError: as for ``dequantize`` and ``quantize``.
        MissingExtraError: gguf or llama-cpp-python is not installed.
    """
    header = read_header(source)
    spec_of(header)
    gguf_weights.require_readable(header)
    origin = Origin.of_header(header)
    per_weight = 4 + NORMALLY_F16_BYTES.get(type_name, QUANTIZED_BYTES)
    require_space(target, int(num_weights(header) * per_weight))
    with folder_beside(target) as beside:
        full = beside / "F32.gguf"
        _write_full(header, origin, full, progress)
        quantize(full, target, type_name, progress=progress)
    return origin


def _write_full(header: GGUFHeader, origin: Origin, target: Path, progress: Progress) -> None:
    """The same GGUF file with all weights in float32."""
    added: dict[str, str | int] = {**origin.metadata(), "general.file_type": 0}
    alignment = int(header.metadata.get("general.alignment", 32))
    entries = [b for key, b in _entries(header) if key not in added]
    entries += [encoding.entry(key, value) for key, value in added.items()]
    total, done = num_weights(header) * 4, 0
    tensors = {name: TensorEntry(info.shape, 0, prod(info.shape) * 4) for name, info in header.tensors.items()}
    with target.open("wb") as stream:
        stream.write(encoding.file_start(entries, tensors, alignment))
        for name in header.tensors:
            for piece in gguf_weights.pieces(header, name):
                done += stream.write(np.ascontiguousarray(piece, "<f4").tobytes())
                progress("dequantize", done, total)
            stream.write(encoding.padding(stream.tell(), alignment))


def _entries(header: GGUFHeader) -> Iterator[tuple[str, bytes]]:
    """The metadata as the file spells it."""
    with header.path.open("rb") as file:
        for key, (start, end) in header.spans.items():
            file.seek(start)
            yield key, file.read(end - start)
