"""onnxruntime-genai's Generator as an arm: the same model folder in the library that most ONNX users would take."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.bench.latency_arms import WARMING, Arm
from edgepatch.bench.latency_peers import random_tokens

PACKAGE = "onnxruntime_genai"
NAME = "onnxruntime-genai"


def is_installed() -> bool:
    """Whether there is such an arm."""
    return importlib.util.find_spec(PACKAGE) is not None


class GenaiArm(Arm):
    """The bare model in onnxruntime-genai.

    Its Generator keeps what it has evaluated and is wound back, as ours is; one stands ready for each depth.

    Args:
        folder: of the model; as ``OnnxRuntime`` loads it.
        vocab_size: V.
        num_threads: of one forward pass.
        context_length: positions of the prompts' generator.
        provider: "cpu" or "cuda".
    """

    name = NAME

    def __init__(self, folder: Path, vocab_size: int, num_threads: int, context_length: int, provider: str = "cpu") -> None:
        import onnxruntime_genai

        self._library, self._vocab_size, self._context_length = onnxruntime_genai, vocab_size, context_length
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}}))
        if provider != "cpu":
            config.clear_providers()
            config.append_provider(provider)
        self._model = onnxruntime_genai.Model(config)
        self._prompts = self._generator(context_length)
        self._depths: dict[int, Any] = {}
        self._present: Any = None

    def _generator(self, positions: int) -> Any:
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(max_length=positions, do_sample=False)
        generator = self._library.Generator(self._model, options)
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
