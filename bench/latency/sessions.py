"""The arms of each runtime on one loaded model, and the columns that all their rows share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edgepatch.bench.latency.arms import Arm, DecodedPromptArm, LibraryArm, RuntimeArm, Snapshots
from edgepatch.bench.latency.genai import NAME as GENAI
from edgepatch.bench.latency.genai import GenaiArm, is_installed, load_genai
from edgepatch.bench.latency.genai_lora import write_lora_graph, write_random_adapter
from edgepatch.bench.latency.random_patches import Adapters, make_patch, random_tokens
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.context import CHUNK
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session

LORA_RANKS = (8, 16)
STACKS = (2, 4)
LORA_FOLDER = "lora-onnx"
BARE_PLAIN, SEED_PLAIN = "bare plain attention", "seed plain attention"
"""Arms on a second copy of the model, which is loaded only where somebody names them."""


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how much of it.

    Attributes:
        prompts: tokens of the prompts of a first token.
        depths: tokens in front of what is decoded.
        num_new: tokens decoded.
        texts: tokens of the safety texts that stand in for a patch.
        num_virtual_tokens: P of the patch.
        turns: of a conversation.
        sequences: conversations at once.
        context_length: the most positions to load.
    """

    prompts: tuple[int, ...] = (32, 128, 512)
    depths: tuple[int, ...] = (0, 512, 2048)
    num_new: int = 32
    texts: tuple[int, ...] = (50, 300, 1000)
    num_virtual_tokens: int = 50
    turns: int = 10
    sequences: tuple[int, ...] = (1, 2, 4, 8)
    context_length: int = 4096

    def within(self, num_positions: int) -> Sizes:
        """What a model of so many positions has room for: no text of any kind takes more than half of a shorter context."""
        if num_positions >= self.context_length:
            return self

        def shorter(lengths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(length for length in lengths if length <= num_positions // 2) or (num_positions // 2,)

        prompts, depths, texts = map(shorter, (self.prompts, self.depths, self.texts))
        return replace(self, prompts=prompts, depths=depths, texts=texts, context_length=num_positions)


FULL = Sizes()
QUICK = Sizes(
    prompts=(32, 128), depths=(0, 512), num_new=16, texts=(50, 300), turns=3, sequences=(1, 2), context_length=2048
)
TINY = Sizes((8, 16), (0, 32), 4, (10, 20), 4, 2, (1, 2), 256)
"""For models of a test's size."""


class Workbench(ABC):
    """A loaded model with its patches and arms.

    Args:
        model: GGUF file or ONNX folder.
        patch: instead of a random one.
        sizes: of the measures.
        patterns: of arms' names; empty for all.
        num_threads: of a forward pass.
        device: "cpu" or "cuda".
        folder: for files of adapters.
        options: further ones of the runtime.
    """

    def __init__(
        self,
        model: Path,
        patch: Patch | None,
        sizes: Sizes,
        patterns: Sequence[str],
        num_threads: int,
        device: str,
        folder: Path,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.sizes, self.num_threads, self.device, self._patterns = (
            model,
            sizes,
            num_threads,
            device,
            patterns,
        )
        self.context_length, self.options = sizes.context_length, options
        self.runtime = self.load(self.context_length)
        self.patch = patch or make_patch(self.runtime, sizes.num_virtual_tokens)
        self.num_virtual_tokens = self.patch.num_virtual_tokens
        self.stacked = {
            count: make_patch(self.runtime, count * self.num_virtual_tokens, f"stack-{count}") for count in STACKS
        }
        self._snapshots, self._folder = Snapshots(self.runtime), folder

    def load(self, context_length: int, num_sequences: int = 1) -> Session:
        """The model, bare."""
        options = {
            "context_length": context_length,
            "num_threads": self.num_threads,
            "num_sequences": num_sequences,
            **self.options,
        }
        return load_runtime(self.model, None, **options)

    @abstractmethod
    def detach(self) -> None:
        """Takes every adapter off."""

    @abstractmethod
    def other_arms(self) -> list[Arm]:
        """Arms of this runtime alone."""

    @abstractmethod
    def absent(self) -> dict[str, tuple[str, str]]:
        """Arm that cannot be measured -> (status, reason)."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """Of every row, by llama-bench's names."""

    @abstractmethod
    def artefacts(self) -> dict[str, int]:
        """Arm -> bytes of the file that it ships, without the patch's."""

    def wants(self, name: str) -> bool:
        """Whether an arm is to be measured; what the ratios divide by always is."""
        return not self._patterns or name == "bare" or any(fnmatch(name, pattern) for pattern in self._patterns)

    def texts(self) -> dict[int, list[int]]:
        """Length -> safety text."""
        return {length: random_tokens(self.runtime.spec.vocab_size, length, rng_seed=2) for length in self.sizes.texts}

    def arms(self) -> list[Arm]:
        """All arms that are wanted, the bare model first."""
        arms: list[Arm] = [self._arm("bare"), self._arm("seed", self.patch)]
        for length, text in self.texts().items():
            arms.append(self._arm(f"text-{length} cold", prefix=text, decodes=False))
            arms.append(self._arm(f"text-{length} warm", prefix=text, is_warm=True))
        arms += [self._arm(f"{count} patches", patch) for count, patch in self.stacked.items()]
        return [arm for arm in [*arms, *self.other_arms()] if self.wants(arm.name)]

    def _arm(self, name: str, patch: Patch | None = None, **options: Any) -> RuntimeArm:
        return RuntimeArm(
            name, self.runtime, self._snapshots, patch, attach=options.pop("attach", self.detach), **options
        )

    def arm_columns(self, arm: str) -> dict[str, Any]:
        """Columns that tell what an arm holds."""
        patch = {"seed": (self.patch, 1), **{f"{n} patches": (p, n) for n, p in self.stacked.items()}}.get(arm)
        if patch is None:
            return {"n_prefix": int(arm.split()[0].removeprefix("text-"))} if arm.startswith("text-") else {}
        return {"num_virtual_tokens": patch[0].num_virtual_tokens, "num_patches": patch[1]}

    def close(self) -> None:
        """Frees the model."""
        self.runtime.close()


class LlamaCppWorkbench(Workbench):
    """The arms of llama.cpp: one model and one context, on which adapters are put and taken off."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        backend = self.runtime.backend
        assert isinstance(backend, LlamaCppRuntime)
        self._model, self._adapters = backend.model, Adapters(backend, self._folder, LORA_RANKS)
        self._plain: Session | None = None

    def detach(self) -> None:
        self._adapters.attach("")

    def close(self) -> None:
        super().close()
        if self._plain is not None:
            self._plain.close()

    def other_arms(self) -> list[Arm]:
        arms: list[Arm] = [self._arm(name, attach=self._attaching(name)) for name in self._adapters.files]
        arms.append(LibraryArm(self.runtime, self._snapshots, self.detach))
        if self.patch.soft_prompt is not None:
            arms.append(DecodedPromptArm(self.runtime, self._snapshots, self.patch, self.detach))
        return arms + self._plain_arms()

    def _plain_arms(self) -> list[Arm]:
        """Bare model and seed where llama.cpp multiplies attention out instead of fusing it."""
        named = [name for name in (BARE_PLAIN, SEED_PLAIN) if self._patterns and self.wants(name)]
        if not named or not self.options["flash_attention"]:
            return []
        options = {**self.options, "flash_attention": False, "context_length": self.context_length}
        self._plain = load_runtime(self.model, None, num_threads=self.num_threads, **options)
        snapshots, patches = Snapshots(self._plain), {BARE_PLAIN: None, SEED_PLAIN: self.patch}
        return [RuntimeArm(name, self._plain, snapshots, patches[name]) for name in named]

    def arm_columns(self, arm: str) -> dict[str, Any]:
        if arm in (BARE_PLAIN, SEED_PLAIN):
            return {**super().arm_columns(arm.split()[0]), "flash_attn": False}
        return super().arm_columns(arm)

    def _attaching(self, name: str) -> Callable[[], None]:
        return lambda: self._adapters.attach(name)

    def absent(self) -> dict[str, tuple[str, str]]:
        if self.patch.soft_prompt is None:
            return {"soft prompt decoded": ("not supported", "the patch holds no soft prompt")}
        return {}

    def columns(self) -> dict[str, Any]:
        import ctypes

        lib, model = self._model.lib, self._model.handle
        buffer = ctypes.create_string_buffer(128)
        lib.llama_model_desc(model, buffer, 128)
        return {
            "runtime": "llamacpp",
            "backends": "CUDA" if self.device == "cuda" else "CPU",
            "model_filename": self.model.name,
            "model_type": buffer.value.decode(),
            "model_size": int(lib.llama_model_size(model)),
            "model_n_params": int(lib.llama_model_n_params(model)),
            "n_batch": CHUNK,
            "n_ubatch": CHUNK,
            "n_threads": self.num_threads,
            "type_k": self.runtime.kv_type,
            "type_v": self.runtime.kv_type,
            "n_gpu_layers": -1 if self.device == "cuda" else 0,
            "flash_attn": self.options["flash_attention"],
            "quantization": self.runtime.quantization,
        }

    def artefacts(self) -> dict[str, int]:
        return {name: path.stat().st_size for name, path in self._adapters.files.items()}


class OnnxWorkbench(Workbench):
    """The arms of ONNX Runtime, and onnxruntime-genai on the same folder."""

    def detach(self) -> None:
        pass

    def other_arms(self) -> list[Arm]:
        if not is_installed():
            return []
        vocab_size = self.runtime.spec.vocab_size
        arms: list[Arm] = []
        if self.wants(GENAI):
            model = load_genai(self.model, self.num_threads, self.device)
            arms.append(GenaiArm(model, vocab_size, self.context_length))
        adapters = self._adapters()
        if adapters:
            model = load_genai(self._folder / LORA_FOLDER, self.num_threads, self.device)
            arms += [GenaiArm(model, vocab_size, self.context_length, name, file) for name, file in adapters.items()]
        return arms

    def _adapters(self) -> dict[str, Path]:
        """Name -> file of each adapter that is wanted; made with the graph that takes them."""
        ranks = {f"{GENAI} lora-r{rank}": rank for rank in LORA_RANKS if self.wants(f"{GENAI} lora-r{rank}")}
        if not (is_installed() and ranks):
            return {}
        files = {name: self._folder / f"{name.split()[-1]}.onnx_adapter" for name in ranks}
        if not (self._folder / LORA_FOLDER).exists():
            layers = write_lora_graph(self.model, self._folder / LORA_FOLDER)
            for name, rank in ranks.items():
                write_random_adapter(layers, rank, files[name])
        return files

    def absent(self) -> dict[str, tuple[str, str]]:
        names = (GENAI, *(f"{GENAI} lora-r{rank}" for rank in LORA_RANKS))
        return {} if is_installed() else dict.fromkeys(names, ("not installed", "pip install onnxruntime-genai"))

    def columns(self) -> dict[str, Any]:
        spec = self.runtime.spec
        return {
            "runtime": "onnx",
            "backends": "CUDA" if self.device == "cuda" else "CPU",
            "model_filename": self.model.name,
            "model_type": f"{spec.model_type} {self.runtime.quantization}",
            "model_size": sum(file.stat().st_size for file in self.model.glob("model.onnx*")),
            "model_n_params": 0,
            "n_batch": 256,
            "n_ubatch": 256,
            "n_threads": self.num_threads,
            "type_k": self.runtime.kv_type,
            "type_v": self.runtime.kv_type,
            "n_gpu_layers": -1 if self.device == "cuda" else 0,
            "flash_attn": True,
            "quantization": self.runtime.quantization,
        }

    def artefacts(self) -> dict[str, int]:
        return {name: file.stat().st_size for name, file in self._adapters().items()}
