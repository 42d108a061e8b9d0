"""onnxruntime-genai's Generator as an arm: the same model folder in the library that most ONNX users would take."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.bench.latency.arms import WARMING, Arm
from edgepatch.bench.latency.random_patches import random_tokens

PACKAGE = "onnxruntime_genai"
NAME = "onnxruntime-genai"


def is_installed() -> bool:
    """Whether there is such an arm."""
    return importlib.util.find_spec(PACKAGE) is not None


def load_genai(folder: Path, num_threads: int, provider: str = "cpu") -> Any:
    """onnxruntime-genai's model.

    Args:
        folder: of the model; as ``OnnxRuntime`` loads it.
        num_threads: of one forward pass.
        provider: "cpu" or "cuda".
    """
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}}))
    if provider != "cpu":
        config.clear_providers()
        config.append_provider(provider)
    return onnxruntime_genai.Model(config)


class GenaiArm(Arm):
    """A model in onnxruntime-genai, bare or with an adapter.

    Its Generator keeps what it has evaluated and is wound back, as ours is; one stands ready for each depth.

    Args:
        model: of ``load_genai``; for an adapter, of a folder of ``write_lora_graph``.
        vocab_size: V.
        context_length: positions of the prompts' generator.
        name: of the arm.
        adapter: file of a LoRA adapter.
    """

    def __init__(
        self, model: Any, vocab_size: int, context_length: int, name: str = NAME, adapter: Path | None = None
    ) -> None:
        import onnxruntime_genai

        self.name, self._library, self._model = name, onnxruntime_genai, model
        self._vocab_size, self._context_length, self._adapters = vocab_size, context_length, None
        if adapter is not None:
            self._adapters = onnxruntime_genai.Adapters(model)
            self._adapters.load(str(adapter), name)
        self._prompts = self._generator(context_length)
        self._depths: dict[int, Any] = {}
        self._present: Any = None

    def _generator(self, positions: int) -> Any:
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(max_length=positions, do_sample=False)
        generator = self._library.Generator(self._model, options)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, self.name)
        self._append(generator, WARMING)
        return generator

    @staticmethod
    def _append(generator: Any, tokens: Sequence[int]) -> None:
        generator.append_tokens(np.array([tokens], dtype=np.int32))

    def ready(self, prompt: Sequence[int]) -> None:
        self._prompts.rewind_to(0)
        self._append(self._prompts, WARMING)
        self._prompts.rewind_to(0)

    def first(self, prompt: Sequence[int]) -> None:
        self._append(self._prompts, prompt)
        self._prompts.generate_next_token()

    def stand(self, depth: int) -> None:
        if depth not in self._depths:
            self._depths[depth] = self._generator(min(self._context_length, depth + 256))
            self._depths[depth].rewind_to(0)
            if depth:
                self._append(self._depths[depth], random_tokens(self._vocab_size, 1 << 14)[:depth])
        self._present = self._depths[depth]
        self._present.rewind_to(depth)
        self._append(self._present, WARMING)
        self._present.generate_next_token()  # drawn from what is there; from here on a token costs an evaluation

    def decode(self, count: int) -> None:
        for _ in range(count):
            self._present.generate_next_token()

    def go_on(self, count: int) -> None:
        """So many tokens behind the prompt."""
        for _ in range(count):
            self._prompts.generate_next_token()
