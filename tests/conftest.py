"""Fixtures: tiny random models built from a config, with a real tokenizer; no download."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepatch.errors import InputError
from edgepatch.judges.embeddings import SentenceEmbedder
from edgepatch.patch.file import Patch
from edgepatch.tensors import SoftPrompt
from kit import artefacts as artefacts_kit
from kit.artefacts import Artefacts, Lazy, gguf_files
from kit.forks import Workers, run_program
from kit.real_model import smollm2_file

TEXT = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm afternoon sun.",
    "Patching a model should be as simple as patching software: verify, apply, roll back.",
    "<b>Numbers</b> 1234, accents é à ü, and emoji 🙂 must survive the round trip.",
]


LONGEST = ("test_docs.py",)
"""Files that take longest. They start first, so that no worker has one left when all others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    root = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(root).as_posix(), len(order)))


# A suite started in the background, or by nohup, inherits ignored signals, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measurements of other runs, and patches of this machine's user, must not decide a test's outcome."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EDGEPATCH_CACHE_DIR", str(folder))
        (folder / "store").mkdir()
        patched.setenv("EDGEPATCH_STORE", str(folder / "store"))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def forked_exporters() -> Iterator[None]:
    """An exporter's imports take ten times as long as its work on a tiny model. Programs that tests start export as users do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("edgepatch.converters.onnx.exporters.run_program", run_program)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """What a worker imports takes longer than what it measures of a tiny model. Programs that tests start have workers as users do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("edgepatch.bench.evidence.workers.multiprocessing", Workers())
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: that of ``make smollm2``, or the one that ``EDGEPATCH_SMOLLM2`` names."""
    return smollm2_file()


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """What all workers of this run share."""
    return artefacts_kit.of_this_run(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_folder(artefacts: Artefacts) -> Path:
    """A random Llama (2 layers, D 256, GQA 4/2, H 64, V 512) with tokenizer and chat template, in float32."""
    return artefacts.path("tiny", _make_tiny_folder)


def _make_tiny_folder(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from edgepatch.bench.lab.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(TEXT * 3, context_length=512, vocab_size=512)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_ggufs(artefacts: Artefacts, tiny_folder: Path) -> Lazy:
    """Type -> GGUF file of the tiny model."""
    return gguf_files(artefacts, "tiny", tiny_folder)


@pytest.fixture(scope="session")
def lab_ggufs(artefacts: Artefacts) -> Lazy:
    """Type -> GGUF file of the lab model."""
    from edgepatch.bench.lab import LAB_FOLDER

    return gguf_files(artefacts, "lab", LAB_FOLDER / "base")


@pytest.fixture(scope="session")
def tiny_patch(tiny_folder: Path) -> Patch:
    """A random patch for the tiny model: P 10, with its seed; strong enough to move every logit."""
    from edgepatch.converters import weight_sketches
    from edgepatch.converters.hf import folders, seeds

    spec = folders.read_spec(tiny_folder)
    rng = np.random.default_rng(3)
    soft_prompt = SoftPrompt((rng.standard_normal((10, spec.hidden_size)) * 0.3).astype(np.float32))
    model = folders.load_model(tiny_folder)
    seed, canary = seeds.compute_kv_seed(model, soft_prompt), seeds.compute_canary(model, soft_prompt)
    return Patch(
        "tiny", "1.0.0", spec, soft_prompt, seed, canary=canary, weight_sketch=weight_sketches.sketch_of(tiny_folder)
    )


@pytest.fixture(scope="session")
def oracle(tiny_folder: Path):  # type: ignore[no-untyped-def]
    """(token ids, soft prompt or None) -> (T, V) float32 logits of Transformers fed ``inputs_embeds``."""
    import torch

    from edgepatch.converters.hf import folders

    model = folders.load_model(tiny_folder)

    def logits(tokens: list[int], soft_prompt: SoftPrompt | None) -> np.ndarray:
        embeddings = model.get_input_embeddings()(torch.tensor([tokens]))
        if soft_prompt is not None:
            embeddings = torch.cat([torch.from_numpy(soft_prompt.embeddings)[None], embeddings], dim=1)
        with torch.inference_mode():
            return model(inputs_embeds=embeddings).logits[0, -len(tokens) :].numpy()

    return logits


@pytest.fixture(scope="session")
def onnx_folders(artefacts: Artefacts, tiny_folder: Path) -> Lazy:
    """Precision -> ONNX folder of the tiny model, by onnxruntime-genai's builder."""
    from edgepatch.converters.onnx import conversion as onnx

    def make(precision: str) -> Path:
        return artefacts.path(f"tiny-onnx/{precision}", lambda path: onnx.export(tiny_folder, path, precision))

    return Lazy(tuple(onnx.QUANTIZATIONS), make)


@pytest.fixture(scope="session")
def minilm() -> SentenceEmbedder:
    """The embedding model of the semantic judges; the calling test is skipped where its package is not installed."""
    from edgepatch.judges.embeddings import shared_embedder

    try:
        return shared_embedder()
    except InputError as error:
        pytest.skip(f"{error}; {error.hint}")
