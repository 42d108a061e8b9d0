"""A GGUF file as a Transformers model: dequantized weights, the config that its header describes, and its tokenizer.

Transformers reads both, but drops what its own tables do not list: Llama 3.1's rotary scaling, Gemma's attention scale, biases,
sizes of heads. So the config is completed from the header, nothing in the file may be left over, and the tokenizer must give
llama.cpp's ids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.converters.gguf_header import GGUFHeader, read_header
from edgepatch.converters.gguf_specs import spec_of, vocabulary
from edgepatch.converters.gguf_vocabulary import Vocabulary
from edgepatch.converters.rope_parameters import GEMMA3_LOCAL_THETA
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.tensors import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HINT = "train on the Transformers folder that the file was made from"

LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Gemma's largest models divide attention by the root of D / heads instead of H; llama.cpp knows them by their depth."""

COPIED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "layer_norm_eps": "attention.layer_norm_epsilon",
}
"""Setting of a config -> key in GGUF, where Transformers reads none."""

BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
BESIDE_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that became settings."""

PROBES = (
    "The quick brown fox, isn't it?",
    "  spaces  and\ttabs\n\nlines ",
    "Grüße 日本語 🙂 e\u0301",
    "12345 3.14 x**2 // {'a': 1}",
    "HELLO'S",
    " a<|im_start|>b</s> <s>[INST] <unk>",
    "<end_of_turn>\n<|eot_id|>x",
)
"""Texts on which tokenizers are compared."""


def _rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """The spec's rotary embedding as Transformers' ``rope_parameters``."""
    scaling = {"rope_type": "default", **spec.rope_scaling}
    local_theta = scaling.pop("local_rope_theta", None)
    if scaling["rope_type"] == "divisors":
        raise InputError("this model's rotary frequencies have divisors that no Transformers scaling gives", hint=HINT)
    settings = {"rope_theta": spec.rope_theta, **scaling}
    if spec.model_type != "gemma3":
        return settings
    local = {"rope_type": "default", "rope_theta": local_theta or GEMMA3_LOCAL_THETA}
    return {"full_attention": settings, "sliding_attention": local}


def _layer_types(pattern: Any, num_layers: int) -> list[str]:
    """Kind of attention in every layer; the pattern says how many layers there are for one with full attention, or lists them."""
    slides = (
        [(i + 1) % pattern != 0 for i in range(num_layers)] if isinstance(pattern, int) else list(pattern)[:num_layers]
    )
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _complete(config: Any, header: GGUFHeader, spec: ModelSpec) -> None:
    """Sets what Transformers did not read from the header."""
    old = getattr(config, "rope_parameters", None) or {}
    config.rope_parameters = {
        **{k: old[k] for k in ("mrope_section", "mrope_interleaved") if k in old},
        **_rope_parameters(spec),
    }
    config.vocab_size, config.head_dim = spec.vocab_size, spec.head_dim
    if "original_max_position_embeddings" in spec.rope_scaling:
        config.original_max_position_embeddings = spec.rope_scaling["original_max_position_embeddings"]
    for name, key in COPIED.items():
        if hasattr(config, name):
            value = header.find(key)
            if value or name == "sliding_window":  # llama.cpp has no window where the file names none
                setattr(config, name, value or None)
    for name, suffix in BIASES.items():
        if hasattr(config, name):
            setattr(config, name, any(tensor.endswith(suffix) for tensor in header.tensors))
    if (pattern := header.find("attention.sliding_window_pattern")) is not None and hasattr(config, "layer_types"):
        config.layer_types = _layer_types(pattern, spec.num_hidden_layers)
    if hasattr(config, "query_pre_attn_scalar"):
        deep = spec.num_hidden_layers == LAYERS_OF_27B.get(spec.model_type)
        config.query_pre_attn_scalar = spec.hidden_size // config.num_attention_heads if deep else spec.head_dim


def _require_whole(model: Any, loading: dict[str, Any], header: GGUFHeader) -> None:
    """Every weight of the model came from the file, and every weight in the file went into the model."""
    missing = sorted({str(key) for name in ("missing_keys", "mismatched_keys") for key in loading.get(name) or ()})
    if missing:
        raise InputError(f"{header.path}: Transformers finds no weights for {', '.join(missing[:4])}", hint=HINT)
    have = sum(p.numel() for p in model.parameters())
    want = sum(prod(info.shape) for name, info in header.tensors.items() if name not in BESIDE_WEIGHTS)
    if have != want:
        raise InputError(f"{header.path}: expected {want} weights in the model, Transformers takes {have}", hint=HINT)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keeps Transformers' table of missing weights from the terminal: it becomes an error of ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_model(path: Path) -> PreTrainedModel:
    """The causal LM in a GGUF file, dequantized to float32.

    Raises:
        InputError: the file is damaged, or Transformers cannot load its architecture faithfully.
        MissingExtraError: torch, transformers or gguf is not installed.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from None
    header = read_header(path)
    spec = spec_of(header)
    source = {"pretrained_model_name_or_path": path.parent.resolve(), "gguf_file": path.name, "local_files_only": True}
    try:
        with _errors_only():
            config = AutoConfig.from_pretrained(**source)
            _complete(config, header, spec)
            model, loading = AutoModelForCausalLM.from_pretrained(
                **source, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Transformers cannot load {path} ({header.architecture}): {reason}", hint=HINT) from None
    _require_whole(model, loading, header)
    return model


# Tokenizer.


def _read_tokenizer(path: Path, header: GGUFHeader) -> Any:
    """The file's tokenizer in the tokenizers library, before BOS and EOS."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent.resolve(), gguf_file=path.name, local_files_only=True
        ).backend_tokenizer
    except Exception as error:  # a conversion of the library's own, which fails in any way
        raise InputError(f"Transformers cannot read the tokenizer in {path}: {error}", hint=HINT) from None
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        space = "\u2581"
        steps: list[Any] = [normalizers.Replace(" ", space)]
        if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
            steps.insert(0, normalizers.Prepend(space))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(steps), None
    return tokenizer


def _add_ends(tokenizer: Any, full: Sequence[int], bare: Sequence[int], tokens: Sequence[str]) -> None:
    """Makes the tokenizer put in front of a text and behind it what llama.cpp does."""
    from tokenizers import processors

    first = next(i for i in range(len(full)) if list(full[i : i + len(bare)]) == list(bare))
    before, behind = ([tokens[i] for i in ids] for ids in (full[:first], full[first + len(bare) :]))
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *behind])]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *behind], special_tokens=special)


def _require_same_ids(path: Path, tokenizer: Any, tokenize: Any) -> None:
    for trusted in (False, True):
        tokenizer.encode_special_tokens = not trusted
        for text in PROBES:
            want, have = tokenize(text, True, trusted), list(tokenizer.encode(text).ids)
            if want != have:
                raise InputError(
                    f"{path}: Transformers tokenizes otherwise: {text!r}: expected {want}, found {have}", hint=HINT
                )
    tokenizer.encode_special_tokens = False


def _definition(tokenizer: Any, header: GGUFHeader) -> str:
    """``tokenizer.json`` without what Transformers' classes add to every vocabulary and what fills the embedding matrix up."""
    definition, real = json.loads(tokenizer.to_str()), set(vocabulary(header))
    size = len(header.metadata["tokenizer.ggml.tokens"])
    definition["added_tokens"] = [added for added in definition["added_tokens"] if added["id"] < size]
    fillers = set(header.metadata["tokenizer.ggml.tokens"]) - real
    definition["model"]["vocab"] = {t: i for t, i in definition["model"]["vocab"].items() if t not in fillers}
    return json.dumps(definition, ensure_ascii=False)


@contextmanager
def tokenizer_folder(path: Path) -> Iterator[Path]:
    """A temporary folder with the tokenizer of a GGUF file, as a Transformers folder holds it.

    Raises:
        InputError: the file is damaged, or Transformers tokenizes otherwise than llama.cpp.
        MissingExtraError: transformers, gguf or llama-cpp-python is not installed.
    """
    header = read_header(path)
    tokenizer = _read_tokenizer(path, header)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    with Vocabulary(path) as opened:
        ends, none = opened.tokenize("a", True, False), opened.tokenize("a", False, False)
        _add_ends(tokenizer, ends, none, tokens)
        _require_same_ids(path, tokenizer, opened.tokenize)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and token < len(tokens):
            settings[f"{name}_token"] = tokens[token]
    if isinstance(template := header.metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    with tempfile.TemporaryDirectory(prefix="edgepatch-") as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(_definition(tokenizer, header), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield folder
