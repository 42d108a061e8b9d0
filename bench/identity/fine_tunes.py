"""Models that a patch for their base must not run on: fine-tunes of several strengths, and impostors with the same norms.

All keep the norm vectors of the base, so that the digest of those cannot tell them apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgepatch.converters.hf import folders
from edgepatch.files.pretrained import load_pretrained
from edgepatch.prompts.sets import load_benign_text

BATCH, LENGTH = 4, 96
RNG_SEED = 17


def save(model: Any, base: Path, folder: Path) -> Path:
    """Writes a changed model beside the files of its base, in the base's float16."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    model.half().save_pretrained(folder)
    shutil.copyfile(base / "config.json", folder / "config.json")
    return folder


def _matrices(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2]


def train(model: Any, base: Path, parameters: list[Any], steps: int, learning_rate: float) -> None:
    """Supervised fine-tuning with AdamW on benign paragraphs, norms frozen unless listed."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, base)
    tokens = torch.tensor([i for text in load_benign_text("train") for i in tokenizer(text).input_ids])
    optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in parameters], lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(RNG_SEED)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[s : s + LENGTH] for s in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)


def full(steps: int, learning_rate: float) -> Callable[[Any, Path], None]:
    """All matrices, a few steps."""
    return lambda model, base: train(model, base, [p for _, p in _matrices(model)], steps, learning_rate)


def embeddings(steps: int, learning_rate: float) -> Callable[[Any, Path], None]:
    """Token embeddings alone."""
    return lambda model, base: train(model, base, [model.get_input_embeddings().weight], steps, learning_rate)


def lora(rank: int, steps: int, learning_rate: float) -> Callable[[Any, Path], None]:
    """A LoRA on query and value projections, merged."""

    def change(model: Any, base: Path) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(RNG_SEED)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        train(wrapped, base, [p for name, p in wrapped.named_parameters() if "lora_" in name], steps, learning_rate)
        wrapped.merge_and_unload()

    return change


def other_layer(index: int) -> Callable[[Any, Path], None]:
    """The matrices of one layer are those of the layer before."""

    def change(model: Any, _base: Path) -> None:
        import torch

        with torch.no_grad():
            layers = model.model.layers
            for mine, other in zip(layers[index].parameters(), layers[index - 1].parameters(), strict=True):
                if mine.ndim == 2:
                    mine.copy_(other)

    return change


def scaled(factor: float) -> Callable[[Any, Path], None]:
    """All matrices of the layers times a number."""

    def change(model: Any, _base: Path) -> None:
        for name, parameter in _matrices(model):
            if ".layers." in name:
                parameter.data.mul_(factor)

    return change


def noisy(relative: float, rng_seed: int = RNG_SEED) -> Callable[[Any, Path], None]:
    """Gaussian noise on all matrices, of a size relative to each matrix's root mean square."""

    def change(model: Any, _base: Path) -> None:
        import torch

        generator = torch.Generator().manual_seed(rng_seed)
        for _name, parameter in _matrices(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * relative * parameter.data.square().mean().sqrt())

    return change


def shuffled(model: Any, _base: Path) -> None:
    """Another seed of the same architecture: every matrix drawn anew with the same size, under the base's norms."""
    import torch

    generator = torch.Generator().manual_seed(RNG_SEED)
    for _name, parameter in _matrices(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.data.std())


FINE_TUNES: dict[str, Callable[[Any, Path], None]] = {
    "fine-tune, 3 steps at 1e-5": full(3, 1e-5),
    "fine-tune, 30 steps at 1e-5": full(30, 1e-5),
    "fine-tune, 3 steps at 1e-4": full(3, 1e-4),
    "fine-tune, 30 steps at 1e-4": full(30, 1e-4),
    "fine-tune, 3 steps at 1e-3": full(3, 1e-3),
    "LoRA r 1 on q and v, 30 steps at 1e-3": lora(1, 30, 1e-3),
    "LoRA r 4 on q and v, 30 steps at 1e-3": lora(4, 30, 1e-3),
    "LoRA r 16 on q and v, 30 steps at 1e-3": lora(16, 30, 1e-3),
    "LoRA r 16 on q and v, 30 steps at 1e-2": lora(16, 30, 1e-2),
    "embeddings alone, 10 steps at 1e-3": embeddings(10, 1e-3),
    "one layer replaced": other_layer(2),
    "matrices times 1.01": scaled(1.01),
    "another seed under the same norms": shuffled,
}


def relative_change(model: Any, base: Any) -> float:
    """Length of what was added to the matrices over their length."""
    import torch

    changed, total = 0.0, 0.0
    with torch.no_grad():
        for (_, new), (_, old) in zip(_matrices(model), _matrices(base), strict=True):
            changed += float((new.float() - old).square().sum())
            total += float(old.square().sum())
    return float((changed / total) ** 0.5)


def make(
    base: Path, folder: Path, changes: dict[str, Callable[[Any, Path], None]]
) -> Iterator[tuple[str, Path, float]]:
    """(name, folder, relative change) of changed copies of a model, one after the other."""
    original = folders.load_model(base)
    for i, (name, change) in enumerate(changes.items()):
        model = folders.load_model(base)
        change(model, base)
        yield name, save(model, base, folder / str(i)), relative_change(model, original)
