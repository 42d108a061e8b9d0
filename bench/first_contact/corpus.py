"""Forged GGUF files: a tiny sound model, changed in one place, in every kind of place that llama.cpp reads."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOCAB, WIDTH, HEADS, HEAD_DIM, FFN = 272, 32, 2, 16, 32
CODES = "BbHhIif?sAQqd"  # by GGUF value type; "s" string, "A" array
ALIGNMENT = 32
ODD_NUMBERS: tuple[tuple[str, Any], ...] = (
    *(
        ("I", value)
        for value in (0, 1, 2, 3, 5, 7, 8, 31, 33, 63, 128, 255, 257, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
    ),
    *(("i", value) for value in (-1, -(2**31))),
    *(("Q", value) for value in (2**32, 2**63, 2**64 - 1)),
    *(("f", value) for value in (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"))),
    ("?", True),
    ("s", "many"),
    ("A", ("I", [])),
    ("A", ("I", [1, 2, 3])),
    ("A", ("i", [-1] * 600)),
)
ODD_TEXTS = (
    "",
    "\0",
    "\0" * 64,
    "none\0",
    "linear\0x",
    "yarn",
    "longrope",
    "\u00e4\U0001f600",
    "x" * 5000,
    "%s%n",
    "../x",
    "llama",
)
TOKENIZERS = ("gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "hybriddna", "no_vocab", "none", "", "replit")
PRE_TOKENIZERS = [
    "default",
    "llama3",
    "llama-bpe",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "falcon",
    "falcon3",
    "mpt",
    "starcoder",
    "gpt-2",
    "jina-v2-de",
    "jina-v2-code",
    "refact",
    "command-r",
    "qwen2",
    "qwen35",
    "stablelm2",
    "olmo",
    "dbrx",
    "smaug-bpe",
    "poro-chat",
    "chatglm-bpe",
    "viking",
    "jais",
    "tekken",
    "smollm",
    "codeshell",
    "bloom",
    "gpt3-finnish",
    "exaone",
    "chameleon",
    "minerva-7b",
    "megrez",
    "gpt-4o",
    "superbpe",
    "trillion",
    "bailingmoe",
    "llama4",
    "pixtral",
    "seed-coder",
    "a.x-4.0",
    "kimi-k2",
    "hunyuan",
    "grok-2",
    "unheard-of",
]


@dataclass
class Model:
    """A GGUF file as its parts.

    Attributes:
        metadata: key -> (code of ``CODES``, value); an array's value is (code, values).
        tensors: name -> (dimensions in the file's order, ggml type, data).
    """

    metadata: dict[str, tuple[str, Any]] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = field(default_factory=dict)

    def data(self) -> bytes:
        """The file."""
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))]
        for key, (code, value) in self.metadata.items():
            out += [_string(key), struct.pack("<I", CODES.index(code)), _value(code, value)]
        offset = 0
        for name, (shape, kind, content) in self.tensors.items():
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            out += [_string(name), dimensions, struct.pack("<IQ", kind, offset)]
            offset += -(-len(content) // ALIGNMENT) * ALIGNMENT
        head = b"".join(out)
        parts = [head.ljust(-(-len(head) // ALIGNMENT) * ALIGNMENT, b"\0")]
        parts += [
            content.ljust(-(-len(content) // ALIGNMENT) * ALIGNMENT, b"\0") for _, _, content in self.tensors.values()
        ]
        return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(code: str, value: Any) -> bytes:
    if code == "s":
        return _string(value)
    if code == "A":
        inner, values = value
        return struct.pack("<IQ", CODES.index(inner), len(values)) + b"".join(_value(inner, v) for v in values)
    return struct.pack("<" + code, value)


def sound_model(seed: int = 0) -> Model:
    """One layer of plain attention over a vocabulary of bytes, in float32."""
    rng, model = np.random.default_rng(seed), Model()
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [*map(chr, letters), *(chr(256 + n) for n in range(68)), "th"]
    specials = [f"<s{i}>" for i in range(VOCAB - len(tokens))]
    numbers = {
        "context_length": 128, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM, "vocab_size": VOCAB,
    }  # fmt: skip
    model.metadata = {
        "general.architecture": ("s", "llama"),
        "general.name": ("s", "tiny"),
        "general.file_type": ("I", 0),
        **{f"llama.{name}": ("I", value) for name, value in numbers.items()},
        "llama.rope.freq_base": ("f", 10000.0),
        "llama.attention.layer_norm_rms_epsilon": ("f", 1e-6),
        "tokenizer.ggml.model": ("s", "gpt2"),
        "tokenizer.ggml.pre": ("s", "gpt-2"),
        "tokenizer.ggml.tokens": ("A", ("s", tokens + specials)),
        "tokenizer.ggml.token_type": ("A", ("i", [1] * len(tokens) + [3] * len(specials))),
        "tokenizer.ggml.merges": ("A", ("s", ["t h"])),
        "tokenizer.ggml.bos_token_id": ("I", VOCAB - 2),
        "tokenizer.ggml.eos_token_id": ("I", VOCAB - 1),
        "tokenizer.ggml.add_bos_token": ("?", False),
        "tokenizer.chat_template": ("s", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    }
    matrices = {
        "token_embd": (WIDTH, VOCAB), "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (WIDTH, WIDTH),
        "blk.0.attn_v": (WIDTH, WIDTH), "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (WIDTH, FFN),
        "blk.0.ffn_up": (WIDTH, FFN), "blk.0.ffn_down": (FFN, WIDTH), "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
    }  # fmt: skip
    for name, shape in matrices.items():
        values = rng.standard_normal(shape[::-1]) * 0.15 + (len(shape) == 1)
        model.tensors[f"{name}.weight"] = (shape, 0, values.astype("<f4").tobytes())
    return model


Forgery = Callable[[np.random.Generator], Iterator[bytes]]


def corpus(seed: int = 12) -> Iterator[tuple[str, bytes]]:
    """(kind, file) of more than 2,000 forged files, the same for the same seed."""
    for kind, forgery in KINDS.items():
        rng = np.random.default_rng([seed, *kind.encode()])
        for data in forgery(rng):
            yield kind, data


def _changed(change: Callable[[Model], object]) -> bytes:
    model = copy.deepcopy(sound_model())
    change(model)
    return model.data()


def _truncated(rng: np.random.Generator) -> Iterator[bytes]:
    data = sound_model().data()
    for length in rng.integers(0, len(data), 150):
        yield data[:length]


def _header_length() -> int:
    model = sound_model()
    return len(model.data()) - sum(-(-len(c) // ALIGNMENT) * ALIGNMENT for _, _, c in model.tensors.values())


def _flipped(rng: np.random.Generator) -> Iterator[bytes]:
    """A bit of the header."""
    data, end = sound_model().data(), _header_length()
    for bit in rng.integers(0, 8 * end, 420):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << int(bit % 8)
        yield bytes(changed)


def _lengths(rng: np.random.Generator) -> Iterator[bytes]:
    """Eight bytes anywhere in the header become a huge or a small number."""
    data, end = sound_model().data(), _header_length()
    for position in rng.integers(4, end - 8, 160):
        value = int(rng.choice(np.array([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1], dtype=np.uint64)))
        yield data[:position] + struct.pack("<Q", value) + data[position + 8 :]


def _numbers(rng: np.random.Generator) -> Iterator[bytes]:
    """Every number of the architecture and of the tokenizer, with odd values and of odd types."""
    for key, (code, _) in sound_model().metadata.items():
        if code in "If?":
            for odd in ODD_NUMBERS:
                yield _changed(lambda model, key=key, odd=odd: model.metadata.update({key: odd}))  # type: ignore[misc]


def _more_keys(rng: np.random.Generator) -> Iterator[bytes]:
    """Numbers that the sound file does not have."""
    names = [
        "llama.expert_count",
        "llama.expert_used_count",
        "llama.attention.sliding_window",
        "llama.rope.scaling.factor",
        "llama.vocab_size",
        "llama.attention.kv_lora_rank",
        "llama.nextn_predict_layers",
        "llama.leading_dense_block_count",
        "llama.ssm.state_size",
        "llama.rope.dimension_sections",
        "llama.attention.causal",
        "llama.pooling_type",
        "llama.decoder_start_token_id",
        "llama.logit_scale",
        "llama.attention.clamp_kqv",
        "llama.expert_weights_scale",
        "general.alignment",
        "general.quantization_version",
        "split.count",
        "split.no",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.token_type_count",
        "tokenizer.ggml.precompiled_charsmap",
    ]
    for name in names:
        for i in rng.choice(len(ODD_NUMBERS), 9, replace=False):
            yield _changed(lambda model, name=name, i=i: model.metadata.update({name: ODD_NUMBERS[i]}))  # type: ignore[misc]


def _texts(rng: np.random.Generator) -> Iterator[bytes]:
    """Settings that are texts, with NULs, beyond ASCII, or of a type that is none."""
    keys = [
        "general.architecture",
        "general.name",
        "llama.rope.scaling.type",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.chat_template",
    ]
    for key in keys:
        for text in (*ODD_TEXTS, 7):
            value = ("s", text) if isinstance(text, str) else ("I", text)
            yield _changed(lambda model, key=key, value=value: model.metadata.update({key: value}))  # type: ignore[misc]


def _architectures(rng: np.random.Generator) -> Iterator[bytes]:
    """The tensors of a Llama under the name of every other architecture."""
    import gguf

    for name in sorted(set(gguf.MODEL_ARCH_NAMES.values())):

        def rename(model: Model, name: str = name) -> None:
            model.metadata = {key.replace("llama.", f"{name}.", 1): value for key, value in model.metadata.items()}
            model.metadata["general.architecture"] = ("s", name)

        yield _changed(rename)


def _weight_types(rng: np.random.Generator) -> Iterator[bytes]:
    """Types that are unknown, or that no such tensor has; the data is as long as before, or much longer."""
    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output_norm.weight")
    for name in names:
        for kind in (*range(45), 1000, 2**31, 2**32 - 1):

            def retype(model: Model, name: str = name, kind: int = kind) -> None:
                shape, _, content = model.tensors[name]
                model.tensors[name] = (shape, kind, content * int(rng.integers(1, 3)))

            yield _changed(retype)


def _shapes(rng: np.random.Generator) -> Iterator[bytes]:
    """Dimensions that are swapped, doubled, halved, one more or fewer, 0 or huge; data of the old length."""
    changes: list[Callable[[tuple[int, ...]], tuple[int, ...]]] = [
        lambda s: s[::-1],
        lambda s: (*s, 2),
        lambda s: (1, *s),
        lambda s: s[:-1] or (1,),
        lambda s: (s[0] // 2, *s[1:]),
        lambda s: (*s[:-1], s[-1] // 2),
        lambda s: (*s[:-1], s[-1] - 1),
        lambda s: (0, *s[1:]),
        lambda s: (2**40, *s[1:]),
        lambda s: (*s[:-1], 2**63),
        lambda s: (int(np.prod(s)),),
    ]
    for name in sound_model().tensors:
        for change in changes:

            def reshape(model: Model, name: str = name, change: Any = change) -> None:
                shape, kind, content = model.tensors[name]
                model.tensors[name] = (change(shape), kind, content)

            yield _changed(reshape)


def _tensors(rng: np.random.Generator) -> Iterator[bytes]:
    """A tensor is missing, has another name, or is there twice under two names."""
    for name in sound_model().tensors:
        yield _changed(lambda model, name=name: model.tensors.pop(name))  # type: ignore[misc]
        for other in (
            "output.weight",
            "rope_freqs.weight",
            "blk.1.attn_q.weight",
            "blk.0.ffn_gate_exps.weight",
            "\0",
            "x" * 70,
        ):
            yield _changed(lambda m, n=name, o=other: m.tensors.update({o: m.tensors[n]}))  # type: ignore[misc]


def _tokenizers(rng: np.random.Generator) -> Iterator[bytes]:
    """Other kinds of vocabularies, with scores and without."""
    for name in TOKENIZERS:
        for pre in rng.choice(PRE_TOKENIZERS, 4, replace=False):

            def change(model: Model, name: str = name, pre: str = str(pre)) -> None:
                model.metadata["tokenizer.ggml.model"] = ("s", name)
                model.metadata["tokenizer.ggml.pre"] = ("s", pre)
                if rng.random() < 0.5:
                    scores = [float(s) for s in rng.standard_normal(VOCAB)]
                    model.metadata["tokenizer.ggml.scores"] = ("A", ("f", scores))

            yield _changed(change)
    for name in PRE_TOKENIZERS:
        yield _changed(lambda model, name=name: model.metadata.update({"tokenizer.ggml.pre": ("s", name)}))  # type: ignore[misc]


def _vocabularies(rng: np.random.Generator) -> Iterator[bytes]:
    """Tokens, types, scores and merges that are odd, too many or too few."""
    for number in range(170):

        def change(model: Model, number: int = number) -> None:
            tokens = list(model.metadata["tokenizer.ggml.tokens"][1][1])
            types = list(model.metadata["tokenizer.ggml.token_type"][1][1])
            if number % 3 == 0:  # a SentencePiece vocabulary of the same tokens
                model.metadata["tokenizer.ggml.model"] = ("s", "llama")
            if number % 2:
                for i in rng.integers(0, VOCAB, 12):
                    tokens[i] = str(
                        rng.choice(
                            ["", "\0", "<0xZZ>", "<0x", "<0x41>", "\U0001f600", "th", "a b", "x" * 3000, "\udcff"]
                        )
                    )
            for i in rng.integers(0, VOCAB, int(rng.choice([0, 20, VOCAB]))):
                types[i] = int(rng.choice([-1, 0, 1, 2, 3, 4, 5, 6, 7, 255, 2**31 - 1]))
            size = int(rng.choice([VOCAB, VOCAB, VOCAB, 0, 1, VOCAB - 1, VOCAB + 1]))
            model.metadata["tokenizer.ggml.tokens"] = ("A", ("s", (tokens * 2)[:size]))
            model.metadata["tokenizer.ggml.token_type"] = (
                "A",
                ("i", (types * 2)[: int(rng.choice([size, size, VOCAB, 3]))]),
            )
            scores = [
                float(s) for s in rng.choice([0.0, -1.0, np.nan, np.inf, -np.inf, 1e38], int(rng.choice([VOCAB, 3])))
            ]
            if number % 5 == 0:
                model.metadata["tokenizer.ggml.scores"] = ("A", ("f", scores))
            merges = [
                str(m)
                for m in rng.choice(["t h", "", " ", "th", "t  h", "a b c", "\0 t", "th th"], int(rng.integers(0, 5)))
            ]
            model.metadata["tokenizer.ggml.merges"] = ("A", ("s", merges))

        yield _changed(change)


def _templates(rng: np.random.Generator) -> Iterator[bytes]:
    """Chat templates that loop, nest or grow."""
    loop = "{% for i in range(99999) %}"
    texts = [
        loop * 6 + "x" + "{% endfor %}" * 6,
        "{{ 'x' * 10 ** 9 }}",
        "{% if 1 %}" * 900 + "{% endif %}" * 900,
        "{{" * 5000,
        "(" * 9999,
    ]
    texts += ["{{ " + "(" * n + "1" + ")" * n + " }}" for n in (50, 500, 5000)] + [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    ]
    for text in texts:
        yield _changed(lambda model, text=text: model.metadata.update({"tokenizer.chat_template": ("s", text)}))  # type: ignore[misc]


def _weights(rng: np.random.Generator) -> Iterator[bytes]:
    """Weights that are no numbers, or huge."""
    for name in sound_model().tensors:
        for value in (np.nan, np.inf, 3e38, 0.0):

            def fill(model: Model, name: str = name, value: float = value) -> None:
                shape, kind, content = model.tensors[name]
                values = np.frombuffer(content, "<f4").copy()
                values[rng.integers(0, len(values), max(1, len(values) // 2))] = value
                model.tensors[name] = (shape, kind, values.tobytes())

            yield _changed(fill)


KINDS: dict[str, Forgery] = {
    "truncated": _truncated,
    "a bit of the header": _flipped,
    "lengths": _lengths,
    "numbers": _numbers,
    "more keys": _more_keys,
    "texts": _texts,
    "architectures": _architectures,
    "weight types": _weight_types,
    "shapes": _shapes,
    "tensors": _tensors,
    "tokenizers": _tokenizers,
    "vocabularies": _vocabularies,
    "templates": _templates,
    "weights": _weights,
}
