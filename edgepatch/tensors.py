"""The three values of edgepatch: ``ModelSpec``, ``SoftPrompt`` and ``KVSeed``.

Shape notation, used in every docstring of the project: **B** batch, **T** sequence, **P** virtual tokens, **D** hidden size,
**L** layers, **K** key/value heads, **H** head size, **V** vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, MismatchError, PatchFormatError

MAX_CANARY_PROMPTS = 16
MAX_CANARY_TOKENS = 2**15
"""Of all prompts together: whoever verifies a patch reads each of them."""


@dataclass(frozen=True)
class ModelSpec:
    """What a patch must know of its base model, and what GGUF, ONNX and Transformers agree on.

    Attributes:
        model_type: architecture by GGUF's name ("llama", also of a Mistral; see converters/architectures.py).
        hidden_size: D.
        num_hidden_layers: L.
        num_key_value_heads: K.
        head_dim: H.
        vocab_size: V, rows of the embedding matrix.
        rope_theta: base of the rotary embedding.
        rope_scaling: its scaling parameters, empty for none.
        tokenizer_digest: ``tokenizer_digest`` of the ordered vocabulary.
        weight_fingerprint: ``weight_fingerprint`` of the norm vectors, which no quantizer touches.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    tokenizer_digest: str
    weight_fingerprint: str
    rope_scaling: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"rope_scaling": copy.deepcopy(self.rope_scaling)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The inverse of ``as_dict``.

        Raises:
            PatchFormatError: a field is missing, unknown or of another type.
        """
        if not isinstance(values, Mapping):
            raise PatchFormatError(f"model spec: expected an object, found {type(values).__name__}")
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise PatchFormatError(f"model spec: expected the fields {sorted(names)}, found {sorted(values)!r:.400}")
        kinds: dict[str, type | tuple[type, ...]] = {
            "str": str,
            "int": int,
            "float": (int, float),
            "dict[str, Any]": dict,
        }
        for f in fields(cls):
            value = values[f.name]
            if isinstance(value, bool) or not isinstance(value, kinds[str(f.type)]):
                raise PatchFormatError(f"model spec: {f.name} must be {f.type}, found {value!r:.80}")
        return cls(**{**values, "rope_theta": float(values["rope_theta"])})

    def require_same(self, model: ModelSpec) -> None:
        """Compares the spec a patch was made for (self) with a model's.

        Raises:
            MismatchError: naming every field that differs.
        """
        want, have = self.as_dict(), model.as_dict()
        differences = {name: (want[name], have[name]) for name in want if want[name] != have[name]}
        if differences:
            raise MismatchError(differences)


def tokenizer_digest(vocabulary: Iterable[str]) -> str:
    """SHA-256 of the ordered vocabulary (id 0, 1, ...), so that Transformers, GGUF and ONNX folders agree.

    SentencePiece's sign for a space counts as a space: some converters write it so in tokens that the user defined.
    """
    digest = hashlib.sha256()
    for token in vocabulary:
        encoded = token.replace("\u2581", " ").encode("utf-8")
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()


def weight_fingerprint(norms: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the norm vectors, which quantizers leave alone, so that a quantized model has its base's fingerprint.

    Args:
        norms: GGUF tensor name ("blk.0.attn_norm.weight") -> (D,) or (H,) of any float dtype; compared as float16.
    """
    digest = hashlib.sha256()
    for name in sorted(norms):
        with np.errstate(over="ignore"):  # what is beyond float16 is infinite in every file of the model
            values = np.ascontiguousarray(norms[name], dtype="<f2")
        digest.update(name.encode("utf-8") + b"\0" + values.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class SoftPrompt:
    """Virtual tokens in front of the whole sequence, BOS included.

    Attributes:
        embeddings: (P, D) float32, in the scale of the model's token embeddings.
    """

    embeddings: NDArray[np.float32]

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 2 or e.dtype != np.float32 or e.shape[0] < 1:
            raise InputError(f"soft prompt: expected (P, D) float32 with P >= 1, found {e.shape} {e.dtype}")
        if not np.isfinite(e).all():
            raise InputError("soft prompt: expected finite values, found NaN or infinity", hint="train it again")

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return int(self.embeddings.shape[0])


@dataclass(frozen=True)
class KVSeed:
    """Keys and values of the virtual tokens in canonical (Transformers') layout.

    Attributes:
        keys: L arrays (K, P, H), float16 or float32; after RoPE at positions 0..P-1, rotate-half order.
        values: L arrays (K, P, H), the same dtype.
    """

    keys: tuple[NDArray[Any], ...]
    values: tuple[NDArray[Any], ...]

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise InputError(f"KV seed: expected L keys and L values, found {len(self.keys)} and {len(self.values)}")
        shape, dtype = self.keys[0].shape, self.keys[0].dtype
        if len(shape) != 3 or dtype not in (np.float16, np.float32):
            raise InputError(f"KV seed: expected (K, P, H) float16 or float32, found {shape} {dtype}")
        for kind, tensors in (("key", self.keys), ("value", self.values)):
            for layer, tensor in enumerate(tensors):
                if tensor.shape != shape or tensor.dtype != dtype:
                    raise InputError(
                        f"KV seed: {kind} of layer {layer}: expected {shape} {dtype}, found {tensor.shape} {tensor.dtype}"
                    )
                if not np.isfinite(tensor).all():
                    raise InputError(
                        f"KV seed: {kind} of layer {layer} holds NaN or infinity", hint="train or convert it again"
                    )

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return int(self.keys[0].shape[1])


@dataclass(frozen=True)
class CanaryPrompt:
    """What a prompt must show when the patch is active, measured on the full-precision model.

    Attributes:
        tokens: ids of the prompt.
        token_ids: (N,) the ids whose next-token logits the patch moves most.
        bare: (N,) their logits after the prompt without the patch, less their mean.
        patched: the same with the patch.
    """

    tokens: tuple[int, ...]
    token_ids: tuple[int, ...]
    bare: tuple[float, ...]
    patched: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.bare), len(self.patched)}
        if (
            not self.tokens
            or len(lengths) != 1
            or len(self.token_ids) < 2
            or len(set(self.token_ids)) != len(self.token_ids)
        ):
            raise InputError(
                f"canary: expected a prompt and two or more ids with two logits each, found {lengths} values"
            )
        if not np.isfinite([*self.bare, *self.patched]).all() or self.bare == self.patched:
            raise InputError("canary: expected finite logits that the patch moves", hint="train the patch again")


@dataclass(frozen=True)
class Canary:
    """Proof that a patch is active: prompts and the logits that tell the patched model from the bare one.

    Attributes:
        prompts: the first is short, for a check after every swap; all are checked after loading.
    """

    prompts: tuple[CanaryPrompt, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("canary: expected a prompt, found none")
        num_tokens = sum(len(prompt.tokens) + len(prompt.token_ids) for prompt in self.prompts)
        if num_tokens > MAX_CANARY_TOKENS:
            raise InputError(f"canary: expected at most {MAX_CANARY_TOKENS} token ids, found {num_tokens}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"prompts": [{name: list(value) for name, value in asdict(prompt).items()} for prompt in self.prompts]}

    @classmethod
    def from_dict(cls, values: Any) -> Canary:
        """The inverse of ``as_dict``.

        Raises:
            PatchFormatError: a field is missing, unknown or of another type.
        """
        kinds: dict[str, type | tuple[type, ...]] = {
            "tokens": int,
            "token_ids": int,
            "bare": (int, float),
            "patched": (int, float),
        }
        prompts = values.get("prompts") if isinstance(values, dict) and set(values) == {"prompts"} else None
        if not isinstance(prompts, list) or len(prompts) > MAX_CANARY_PROMPTS:
            raise PatchFormatError(f"canary: expected an object with a list of at most {MAX_CANARY_PROMPTS} prompts")
        for prompt in prompts:
            if not isinstance(prompt, dict) or set(prompt) != set(kinds):
                raise PatchFormatError(f"canary: expected prompts with the fields {sorted(kinds)}")
            for name, kind in kinds.items():
                entries = prompt[name]
                if not isinstance(entries, list) or any(
                    isinstance(e, bool) or not isinstance(e, kind) for e in entries
                ):
                    raise PatchFormatError(f"canary: {name} must be a list of numbers")
        convert: dict[str, type] = {
            "tokens": int,
            "token_ids": int,
            "bare": float,
            "patched": float,
        }  # JSON writes 2.0 as 2
        try:
            return cls(
                tuple(
                    CanaryPrompt(**{name: tuple(map(convert[name], value)) for name, value in prompt.items()})
                    for prompt in prompts
                )
            )
        except InputError as error:
            raise PatchFormatError(str(error)) from None


def as_float32(logits: Any) -> NDArray[np.float32]:
    """A (T, V) float32 copy, safe to keep after the runtime's own buffer is reused."""
    return np.array(logits, dtype=np.float32, ndmin=2)
