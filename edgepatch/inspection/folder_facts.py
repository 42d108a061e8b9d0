"""The facts of a Transformers folder, from its JSON files and the tables at the start of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepatch.converters import architectures
from edgepatch.converters.hf import specs
from edgepatch.converters.hf.specs import FolderHeader
from edgepatch.converters.peft.adapters import PICKLES
from edgepatch.decoding import defaults
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.files.reading import read_bounded
from edgepatch.inspection.facts import (
    CacheFacts,
    ChatTemplate,
    ModelFacts,
    Origin,
    Shape,
    Vocabulary,
    printable,
    tensor_types,
)
from edgepatch.tensors import ModelSpec
from edgepatch.text.tokenizers import default_template

MAX_CARD_BYTES = 64 * 1024
MAX_TEMPLATE_BYTES = 4 * 2**20
FLOATS = ("F64", "F32", "F16", "BF16")


def read_model_folder(folder: Path, asks_transformers: bool = False) -> ModelFacts:
    """The facts of a Transformers folder.

    Args:
        folder: the model's.
        asks_transformers: whether Transformers may be loaded for what the config leaves open.

    Raises:
        InputError: a file is missing, truncated or damaged.
    """
    header = specs.read_folder(folder)
    tensors = header.tensors
    spec, no_spec = _spec(header, asks_transformers)
    shape = _shape(header, spec)
    num_values = sum(tensor.num_values for tensor in tensors.values())
    types = tensor_types((tensor.dtype, tensor.num_bytes) for tensor in tensors.values())
    return ModelFacts(
        path=folder,
        kind="Transformers folder",
        runtime="torch",
        origin=read_origin(folder, header.whole_config),
        architecture=printable(spec.model_type if spec else architectures.gguf_name(header.config["model_type"])),
        num_parameters=num_values if all(kind.name in FLOATS for kind in types) else None,
        files=folder_files(folder),
        quantization=_quantization(header, types[0].name if types else ""),
        tensor_types=types,
        shape=shape,
        vocabulary=read_vocabulary(header),
        chat_template=read_template(folder, header.tokenizer_config),
        spec=spec,
        no_spec=no_spec,
        cache=cache_facts(spec, {"f32": 4.0}, shape.context_length),
        weight_bytes=4 * num_values,  # PyTorch computes in float32
        sampling=defaults.of_folder(folder),
        also=other_models(folder, "safetensors"),
        more=_more(header),
    )


def _spec(header: FolderHeader, asks_transformers: bool) -> tuple[ModelSpec | None, str]:
    try:
        return specs.spec_of(header), ""
    except EdgepatchError as error:
        if not asks_transformers:
            return None, f"{error}" + (f"; {error.hint}" if error.hint else "")
    from edgepatch.converters.hf import folders

    try:
        return folders.read_spec(header.path), ""
    except EdgepatchError as error:
        return None, str(error)


def _quantization(header: FolderHeader, commonest: str) -> str:
    """What the config says of a quantizer, else the type of most of the weights."""
    settings = header.whole_config.get("quantization_config")
    if isinstance(settings, dict):
        bits = settings.get("bits") or ("4" if settings.get("load_in_4bit") else "")
        return printable(f"{settings.get('quant_method', 'quantized')} {bits}")
    return commonest


def _shape(header: FolderHeader, spec: ModelSpec | None) -> Shape:
    def number(name: str) -> int | None:
        value = header.config.get(name)
        return value if type(value) is int and value > 0 else None

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    usual = hidden // heads if hidden and heads else None
    return Shape(
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=spec.num_key_value_heads if spec else number("num_key_value_heads") or heads,
        head_dim=spec.head_dim if spec else number("head_dim") or usual,
        feed_forward=number("intermediate_size"),
        context_length=number("max_position_embeddings"),
        rope_theta=spec.rope_theta if spec else None,
        rope_scaling=spec.rope_scaling if spec else {},
        has_tied_head=not any(name.endswith("lm_head.weight") for name in header.tensors),
    )


def cache_facts(spec: ModelSpec | None, types: Mapping[str, float], positions: int | None) -> CacheFacts | None:
    """Keys and values of all layers."""
    if spec is None or positions is None:
        return None
    return CacheFacts(2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim, types, positions)


def folder_files(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files of a folder, those in its own folders left out."""
    try:
        return {printable(path.name): path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}", hint="check the path and its rights") from error


def other_models(folder: Path, taken: str) -> tuple[str, ...]:
    """Models of other kinds in the same folder.

    Args:
        folder: the model's.
        taken: the kind that is not another one: "safetensors" or "onnx".
    """
    endings = {"safetensors": "*.safetensors", "onnx": "**/*.onnx", "gguf": "*.gguf"}
    files = {kind: sorted(folder.glob(pattern)) for kind, pattern in endings.items() if kind != taken}
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    return tuple(printable(paths[0].relative_to(folder)) for paths in (*files.values(), pickles) if paths)


def read_origin(folder: Path, config: Mapping[str, Any]) -> Origin:
    """Who a model folder says it is: the front matter of its card, else its config."""
    card = _front_matter(folder / "README.md")
    name = str(config.get("_name_or_path") or "").rstrip("/")
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/"))
    return Origin(
        name=printable(card.get("model_name") or (name if is_hub_name else "")),
        author=printable(card.get("model_creator") or (name.split("/")[0] if is_hub_name else "")),
        license=printable(card.get("license_name") or card.get("license", "")),
        base=printable(card.get("base_model", "")),
    )


def _front_matter(card: Path) -> dict[str, str]:
    """The plain lines `key: value` and one-entry lists of a model card's YAML; no YAML is interpreted."""
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        lines = file.read(MAX_CARD_BYTES).decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    entries: dict[str, str] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return entries
        if line.startswith(("- ", "  - ")) and key and not entries[key]:
            entries[key] = line.strip(" -").strip("'\"")
        elif ":" in line and not line.startswith((" ", "-", "#")):
            key, value = (part.strip() for part in line.split(":", 1))
            entries[key] = value.strip("'\"")
    return {}  # without an end it is no front matter


def read_vocabulary(header: FolderHeader) -> Vocabulary:
    """The tokens of a folder with a ``tokenizer.json``; of others what the config says."""
    size = header.config.get("vocab_size")
    try:
        tokens = header.tokens
        model, steps = header.tokenizer["model"], _steps(header.tokenizer.get("pre_tokenizer"))
    except (InputError, KeyError, TypeError):
        tokens, model, steps = [], {}, []
    ends = {number: tokens[number] if number < len(tokens) else "" for number in _end_ids(header, tokens)}
    return Vocabulary(
        size=size if type(size) is int else len(tokens) or None,
        kind=printable(model.get("type", "") if isinstance(model, dict) else ""),
        pre_tokenizer=printable(" + ".join(steps)),
        end_tokens={number: printable(text) for number, text in ends.items()},
    )


def _steps(pre_tokenizer: Any) -> list[str]:
    if not isinstance(pre_tokenizer, dict):
        return []
    inner = pre_tokenizer.get("pretokenizers")
    steps = inner if isinstance(inner, list) else [pre_tokenizer]
    return [str(step.get("type", "")) for step in steps if isinstance(step, dict)]


def _end_ids(header: FolderHeader, tokens: list[str]) -> list[int]:
    """Ids that end a reply, as ``FolderTokenizer`` takes them."""
    ids: set[Any] = set()
    for settings in (header.generation_config, header.whole_config):
        value = settings.get("eos_token_id")
        ids |= set(value if isinstance(value, list) else [value])
    eos = header.tokenizer_config.get("eos_token")
    texts = {eos.get("content") if isinstance(eos, dict) else eos, "<|im_end|>"}
    ids |= {number for number, token in enumerate(tokens) if token in texts}
    return sorted(number for number in ids if type(number) is int and number >= 0)


def read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a folder and further ones in it, wherever Transformers puts them."""
    value = tokenizer_config.get("chat_template")
    named = {
        printable(entry["name"]): str(entry.get("template", ""))
        for entry in (value if isinstance(value, list) else [])
        if isinstance(entry, dict) and entry.get("name") not in (None, "default")
    }
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[printable(path.stem)] = _read_text(path)
    return ChatTemplate.of(_read_text(folder / "chat_template.jinja") or default_template(value), named)


def _read_text(path: Path) -> str:
    if not path.is_file():
        return ""
    data = read_bounded(path, MAX_TEMPLATE_BYTES, "chat template", hint="download the model again")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: {error}", hint="download the model again") from None


def _more(header: FolderHeader) -> dict[str, str]:
    plain = {key: value for key, value in header.config.items() if not isinstance(value, dict)}
    nested = {key: json.dumps(value) for key, value in header.config.items() if isinstance(value, dict)}
    return {key: printable(value) for key, value in sorted({**plain, **nested}.items())}
