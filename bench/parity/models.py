"""Tiny random models of many architectures, and their GGUF and ONNX forms, for the parity table.

Every model has its own random weights, with norms moved away from one: a swapped or dropped tensor cannot go unnoticed. Widths
are multiples of 256, because k-quants store rows in such blocks, and heads are 64 or 128 wide, because llama.cpp rotates the
quantized cache of such heads only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepatch.bench.columns import COMMON_GGUF_TYPES
from edgepatch.errors import InputError
from edgepatch.known_models import find
from edgepatch.processes.programs import run_program

VOCAB_SIZE = 512
CONTEXT_LENGTH = 512
GGUF_TYPES = ("F32", *COMMON_GGUF_TYPES)

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm afternoon sun until the evening.",
    "Patching a model should be as simple as patching software: verify the file, apply it, measure it, roll it back.",
    "Numbers such as 1234 and 3.14, accents like é, à or ü, and an emoji 🙂 must all survive the round trip.",
    "Rivers carry warm water past quiet villages, while children gather bright shells along every sandy bend before dinner.",
    "Engineers measure voltage, pressure and humidity twice a week; auditors compare both columns and sign the yellow form.",
)
"""What the tokenizer is trained on."""

PROMPT = (
    "A seed is the memory that virtual tokens leave behind. If one number of it is in the wrong place, the model still speaks "
    "fluently, and nobody sees that the policy is gone; so every runtime is compared with the reference, number by number."
)
"""What is measured: text that the tokenizer has not seen, so that it gives many short tokens."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GELU_TABLE = 5e-3
"""llama.cpp looks GELU up in a float16 table, so Gemma's logits are never as close as others'."""

HALF_KL = 5e-6
ACTIVE_SHARE = 0.3
"""The divergence must stay below this share of what losing the patch would make."""


@dataclass(frozen=True)
class Architecture:
    """One row group of the table.

    Attributes:
        name: of the group.
        class_name: of the model in Transformers.
        settings: what its config differs in from ``COMMON``.
        own_converter: whether ``converters.gguf`` writes its GGUF; llama.cpp's converter does otherwise.
        stored_route: whether a stored seed can hold all that the virtual tokens leave behind; recurrent state it cannot.
        f32_floor: largest difference of a logit at full precision in llama.cpp.
        exporter: to ONNX; the builder's graph ends where a sliding window would begin to forget.
        scaled_embeddings: what multiplies embeddings by sqrt(D) in llama.cpp: "" nothing, "tokens" only the lookup of tokens,
            "graph" the graph, embeddings that are fed included.
        half_kl: largest divergence where something is float16.
        active_share: how much of the divergence that losing the patch would make may remain.
        gguf_types: the quantizations that are measured.
        limit_s: longest time for all its rows, in seconds.
    """

    name: str
    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_converter: bool = False
    stored_route: bool = True
    f32_floor: float = 5e-5
    exporter: str = "builder"
    scaled_embeddings: str = ""
    half_kl: float = HALF_KL
    active_share: float = ACTIVE_SHARE
    gguf_types: tuple[str, ...] = GGUF_TYPES
    limit_s: int = 1800

    @property
    def has_windows(self) -> bool:
        """Whether some layers see a sliding window alone."""
        return bool(self.settings.get("sliding_window"))


COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TIED = {"tie_word_embeddings": True}
GEMMA = {**TIED, "head_dim": 64, "query_pre_attn_scalar": 64}

ARCHITECTURES = (
    Architecture("llama", "LlamaForCausalLM", own_converter=True),
    Architecture(
        "llama3",
        "LlamaForCausalLM",
        {"hidden_size": 512, "rope_parameters": LLAMA3, "max_position_embeddings": 16384},
        own_converter=True,
    ),
    Architecture(
        "smollm",
        "LlamaForCausalLM",
        {**TIED, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 5},
        own_converter=True,
    ),
    Architecture(
        "mistral",
        "MistralForCausalLM",
        {"sliding_window": None, "head_dim": 128, "intermediate_size": 768},
        own_converter=True,
    ),
    Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        own_converter=True,
    ),
    Architecture("qwen3", "Qwen3ForCausalLM", {**TIED, "head_dim": 128, "num_hidden_layers": 2}, own_converter=True),
    Architecture(
        "gemma", "GemmaForCausalLM", {**TIED, "head_dim": 64}, f32_floor=GELU_TABLE, scaled_embeddings="graph"
    ),
    Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 64, "num_hidden_layers": 4},
        f32_floor=GELU_TABLE,
        exporter="transformers",
        scaled_embeddings="graph",
    ),
    Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window": 32, "num_hidden_layers": 6},
        f32_floor=GELU_TABLE,
        exporter="transformers",
        scaled_embeddings="tokens",
    ),
    Architecture(
        "phi3", "Phi3ForCausalLM", {"num_key_value_heads": 4, "original_max_position_embeddings": CONTEXT_LENGTH}
    ),
    Architecture("smollm3", "SmolLM3ForCausalLM", {**TIED, "num_hidden_layers": 4}),
    Architecture(
        "granite",
        "GraniteForCausalLM",
        {
            **TIED,
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
        },
    ),
    Architecture("stablelm", "StableLmForCausalLM", {"num_key_value_heads": 4, "use_qkv_bias": True}),
    Architecture("cohere", "CohereForCausalLM", {**TIED, "logit_scale": 1.0}),
    Architecture("olmo2", "Olmo2ForCausalLM", {"num_hidden_layers": 2}),
    Architecture(
        "lfm2",
        "Lfm2ForCausalLM",
        {
            **TIED,
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "conv", "full_attention", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        stored_route=False,
    ),
    Architecture(
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        {
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        stored_route=False,
    ),
)


REAL_MODEL = Architecture(
    "smollm2",
    "LlamaForCausalLM",
    own_converter=True,
    f32_floor=1e-4,  # thirty layers, and logits eight times as large as a tiny model's
    half_kl=5e-5,
    active_share=0.8,  # 2 and 4 bits alone cost this model 0.3 to 0.7 nats, which is what a random patch does
    gguf_types=(*GGUF_TYPES, "Q6_K", "Q2_K"),
    limit_s=7200,
)
"""SmolLM2-135M-Instruct: trained weights, and rows of 576 values, which k-quants store in other types tensor by tensor."""

REAL_MODEL_VARIABLE = "EDGEPATCH_SMOLLM2"


def real_model_file() -> Path | None:
    """The GGUF file of the real model, the one that a variable names or that of ``make smollm2``; ``None`` where it is not at hand."""
    named = os.environ.get(REAL_MODEL_VARIABLE)
    if named:
        return Path(named)
    try:
        return find("smollm2")
    except InputError:
        return None


def measured() -> list[Architecture]:
    """What a full run measures: the real model where it is at hand."""
    return [*ARCHITECTURES, *([REAL_MODEL] if real_model_file() else [])]


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        InputError: there is none.
    """
    architectures = (*ARCHITECTURES, REAL_MODEL)
    spec = next((a for a in architectures if a.name == name), None)
    if spec is None:
        raise InputError(f"architecture: expected one of {', '.join(a.name for a in architectures)}, found {name!r}")
    return spec


def build_folder(spec: Architecture, folder: Path) -> None:
    """Writes a Transformers folder with random float32 weights and a tokenizer; of the real model, with its own.

    Raises:
        InputError: the real model is not at hand.
    """
    if spec is REAL_MODEL:
        _write_real_model(folder)
        return
    import torch
    import transformers

    from edgepatch.bench.lab.tokenizer import train_tokenizer

    kind = getattr(transformers, spec.class_name)
    torch.manual_seed(1000 + [a.name for a in ARCHITECTURES].index(spec.name))
    settings = {**COMMON, **spec.settings}
    settings["initializer_range"] = settings["hidden_size"] ** -0.5  # keeps activations at the scale of a trained model
    model = kind(kind.config_class(**settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms start at one, biases at zero
                parameter.add_(torch.randn_like(parameter) * (0.05 if "norm" in name else 0.1))
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(TEXTS * 3, CONTEXT_LENGTH, VOCAB_SIZE)
    assert len(tokenizer) == VOCAB_SIZE  # llama.cpp's converter cuts Gemma's embeddings to the tokenizer's size
    tokenizer.save_pretrained(folder)


def _write_real_model(folder: Path) -> None:
    from edgepatch.converters.dequantization import dequantize

    file = real_model_file()
    if file is None:
        raise InputError("SmolLM2 is not at hand", hint=f"name its GGUF file in {REAL_MODEL_VARIABLE}")
    dequantize(file, folder, force=True)


def convert(spec: Architecture, folder: Path, target: Path, type_name: str, llama_cpp_source: Path) -> None:
    """Writes a GGUF file in full or half precision with the converter that knows the architecture.

    Args:
        spec: the architecture.
        folder: its Transformers folder.
        target: the GGUF file.
        type_name: "F32" or "F16".
        llama_cpp_source: llama.cpp's source tree.

    Raises:
        InputError: the converter failed.
    """
    from edgepatch.converters.gguf import writer

    if spec.own_converter:
        writer.convert_folder(folder, target, type_name)
        return
    script = llama_cpp_source / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise InputError(
            f"no llama.cpp source in {llama_cpp_source}",
            hint="run `edgepatch bench llama-server` once, or name it with --llama-cpp",
        )
    arguments = [str(folder), "--outfile", str(target), "--outtype", type_name.lower(), "--model-name", "tiny"]
    if spec.name == "qwen3_5":
        arguments.append("--no-mtp")  # the tiny model has no layer for multi-token prediction
    command = [sys.executable, "-c", FOREIGN_CONVERTER, script, *arguments]
    done = run_program(command, environment={"OMP_NUM_THREADS": "1"})
    if done.failure or not target.is_file():
        raise InputError(
            f"llama.cpp's converter failed on {spec.name}: {' | '.join(done.complaints.splitlines()[-3:])}"
        )


FOREIGN_CONVERTER = """
import runpy, sys
script, *arguments = sys.argv[1:]
sys.path.insert(0, script.rsplit("/", 1)[0])
sys.path.insert(1, sys.path[0] + "/gguf-py")
import conversion
from conversion import base
# The converter knows published tokenizers by a hash; ours is GPT-2's kind, trained a moment ago.
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
get_model_class = conversion.get_model_class

def with_gpt2_vocabulary(*wanted, **options):
    model = get_model_class(*wanted, **options)
    model.set_vocab = base.TextModel._set_vocab_gpt2
    return model

conversion.get_model_class = with_gpt2_vocabulary
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
