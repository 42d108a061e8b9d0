"""What a model is and how fast, tried before anything long: it is loaded once and asked little."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.bench.evidence.cells import CellKey, EvidenceConfig
from edgepatch.bench.safety.length import has_chat
from edgepatch.bench.safety.probes import Place
from edgepatch.converters.gguf.header import read_header
from edgepatch.decoding.sampling import Sampling
from edgepatch.patch.file import Patch
from edgepatch.progress import Progress, stage
from edgepatch.prompts.sets import load_benign_text, load_prompts
from edgepatch.runtimes import load_runtime, runtime_name
from edgepatch.tensors import ModelSpec

if TYPE_CHECKING:
    from edgepatch.runtimes.session import Session

PROBE_CONTEXT, PROBE_SAMPLES, PROBE_TOKENS = 1024, 8, 12
LOAD_SHARE = 1.5
"""Of the time to load the model bare, that loading and proving it patched takes too."""

TOKENS = {"gender": 50, "harm": 24}
"""Of a greedy reply."""
PROMPT_TOKENS, TEXT_TOKENS, PAIR_TOKENS, SENTENCE_TOKENS = 20, 120, 80, 24
"""Of a prompt, a paragraph, both texts of a pair and both sentences of one, about."""


@dataclass(frozen=True)
class Probe:
    """A model of the user's own.

    Attributes:
        runtime, quantization: what runs it, and what it is.
        spec: which model it is.
        num_positions: of its context, or of as much of it as the runtime takes.
        has_chat: whether it takes conversations.
        load_s: seconds to load it.
        sampled_per_s: tokens a second of several samples of a prompt.
        read_per_s: tokens a second of a text that is read.
    """

    runtime: str
    quantization: str
    spec: ModelSpec
    num_positions: int
    has_chat: bool
    load_s: float
    sampled_per_s: float
    read_per_s: float


def probe_model(model: Path, patches: Sequence[Patch], num_threads: int, progress: Progress) -> Probe:
    """Loads a model with its patches, if any, and times it.

    Raises:
        EdgepatchError: the model or a patch cannot be used, or the patch was made for another model.
    """
    with stage(progress, "try model"):
        began = time.monotonic()
        with load_runtime(model, list(patches) or None, **_options(model, num_threads, patches)) as runtime:
            load_s = time.monotonic() - began
            return Probe(
                runtime.name,
                runtime.quantization,
                runtime.spec,
                _num_positions(model, runtime),
                has_chat(runtime),
                load_s,
                *_rates(runtime),
            )


def _options(model: Path, num_threads: int, patches: Sequence[Patch]) -> dict[str, Any]:
    name = runtime_name(model)
    if name == "torch":
        return {}
    if name == "onnx":
        return {"num_threads": num_threads}
    trained = int(read_header(model).setting("context_length"))
    room = PROBE_CONTEXT + sum(patch.num_virtual_tokens for patch in patches)
    return {"num_threads": num_threads, "num_sequences": PROBE_SAMPLES, "context_length": min(trained, room)}


def _num_positions(model: Path, runtime: Session) -> int:
    """llama.cpp was given a short context; what the model was trained for counts."""
    return int(read_header(model).setting("context_length")) if runtime.name == "llamacpp" else runtime.num_positions


def _rates(runtime: Session) -> tuple[float, float]:
    """(sampled, read) tokens a second."""
    prompt, text = load_prompts("benign", "train")[0], load_benign_text("train")[0]
    sampling = Sampling.plain(PROBE_TOKENS, top_p=0.9, rng_seed=1, ignore_end_tokens=True)
    began = time.monotonic()
    runtime.generate_many(prompt, sampling, PROBE_SAMPLES)
    sampled = PROBE_SAMPLES * PROBE_TOKENS / (time.monotonic() - began)
    tokens = runtime.tokens(text)[: runtime.context_length - 1]
    began = time.monotonic()
    runtime.logits(tokens)
    return sampled, len(tokens) / (time.monotonic() - began)


@dataclass(frozen=True)
class Speed:
    """How long cells take, about: each form as long as the model that was tried.

    Attributes:
        probe: of the model.
        config: how much is measured.
    """

    probe: Probe
    config: EvidenceConfig

    def seconds(self, key: CellKey) -> float:
        """Of a cell."""
        sampled, read = self._tokens(key)
        return sampled / self.probe.sampled_per_s + read / self.probe.read_per_s + 0.5

    def _tokens(self, key: CellKey) -> tuple[int, int]:
        """(sampled, read) tokens of a cell."""
        config = self.config
        if key.measure == "margins":
            most = config.num_items(key) if key.domain == "toxicity" else config.num_margin_pairs
            return 0, min(most, config.num_margin_pairs) * PAIR_TOKENS
        if key.measure == "retained":
            sizes = config.sizes(key)
            read = sizes.num_texts * TEXT_TOKENS + 67 * sizes.num_minimal_pairs * SENTENCE_TOKENS
            return 2 * sizes.num_requests * TOKENS["harm"], read + 2 * sizes.num_requests * PROMPT_TOKENS
        if key.domain != "toxicity":
            count = config.num_items(key)
            return count * TOKENS[key.domain], 2 * count * PROMPT_TOKENS
        count, front = (config.num_fronted, Place.of(key.front)) if key.front else (config.num_items(key), Place())
        in_front = front.front_tokens + 40 * (front.turn - 1)
        per_prompt = config.samples.samples_per_prompt * config.samples.max_new_tokens
        return count * per_prompt, count * (PROMPT_TOKENS + in_front)

    def of_run(self, keys: Sequence[CellKey], num_workers: int) -> float:
        """Of all cells and of loading the models, on so many processes."""
        openings = len({key.opening for key in keys})
        loading = LOAD_SHARE * self.probe.load_s * openings
        return (sum(map(self.seconds, keys)) + loading) / max(1, num_workers)
