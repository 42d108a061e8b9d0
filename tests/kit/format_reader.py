"""A second reader of the patch format, written from docs/reference/format.md alone: nothing of edgepatch, nothing but the standard library.

It is slow, says only "refused", and must accept exactly what ``edgepatch.patch.file`` accepts.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
import math
import re
import struct


class Refused(Exception):
    pass


def need(holds: object) -> None:
    if not holds:
        raise Refused


def number(value: float) -> str:
    """Section 3.2: as ECMAScript writes a double."""
    if value == 0:
        return "0"
    exact, exact_digits = decimal.Decimal(abs(value)), decimal.Context(1200)
    for digits in range(1, 18):  # the fewest that read back as the same double, of these the closest
        step = decimal.Decimal((0, (1,), exact.adjusted() + 1 - digits))
        below = int(exact_digits.divide_int(exact, step))
        near = [c for c in (below, below + 1) if float(exact_digits.multiply(c, step)) == abs(value)]
        if near:
            break
    best = min(near, key=lambda c: (abs(exact_digits.subtract(exact, exact_digits.multiply(c, step))), c % 2))
    figures, n = str(best).rstrip("0"), len(str(best)) + exact.adjusted() + 1 - digits
    sign, k = "-" if value < 0 else "", len(figures)
    if k <= n <= 21:
        return sign + figures + "0" * (n - k)
    if 0 < n <= 21:
        return sign + figures[:n] + "." + figures[n:]
    if -6 < n <= 0:
        return sign + "0." + "0" * -n + figures
    return sign + figures[0] + ("." + figures[1:] if k > 1 else "") + "e" + ("+" if n > 0 else "-") + str(abs(n - 1))


def text(value: str) -> str:
    named = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
    return '"' + "".join(named.get(ord(c), f"\\u{ord(c):04x}" if ord(c) < 32 else c) for c in value) + '"'


def canonical(value: object, depth: int = 0) -> str:
    if isinstance(value, (dict, list)):
        need(depth < 16)
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(text(key) + ":" + canonical(value[key], depth + 1) for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(entry, depth + 1) for entry in value) + "]"
    if isinstance(value, str):
        return text(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else number(value)


def parse(data: str) -> object:
    def double(literal: str) -> float:
        need(math.isfinite(float(literal)))
        return float(literal)

    try:  # every number is a double; what is written twice, or in another form, is caught by writing it again
        value = json.loads(data, parse_int=double, parse_float=double, parse_constant=double)
        need(canonical(value).encode("utf-8") == data.encode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused from None
    return value


def whole(value: object, least: int = -(2**53) + 1, most: int = 2**53 - 1) -> bool:
    return isinstance(value, float) and value == int(value) and least <= value <= most


def match(pattern: str, value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def time(value: object) -> bool:
    if not match("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", value):
        return False
    try:
        return bool(datetime.datetime.strptime(str(value)[:19], "%Y-%m-%dT%H:%M:%S")) and str(value)[17:19] < "60"
    except ValueError:
        return False


def printable(value: object, most: int) -> bool:
    refused = [*range(10), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    return isinstance(value, str) and len(value) <= most and not any(ord(c) in refused for c in value)


DIGEST = "[0-9a-f]{64}"
PRE = "(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
VERSION = rf"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){{2}}(-{PRE}(\.{PRE})*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?"
KEYS = "base canary channel chat_template created evaluation expires format_version license name num_virtual_tokens parts sequence"
KEYS += " summary supersedes tensors training version weight_sketch"
MOVING_KEYS = " rotation anchoring"
PROBE_KEY = " tokenizer_probe"
BASE = ["head_dim", "hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"]
NAMES = ["model_type", "tokenizer_digest", "weight_fingerprint"]


def check_base(base: object) -> None:
    need(isinstance(base, dict) and set(base) == {*BASE, *NAMES, "rope_theta", "rope_scaling"})
    need(all(whole(base[key]) for key in BASE) and all(isinstance(base[key], str) for key in NAMES))
    need(isinstance(base["rope_theta"], float) and isinstance(base["rope_scaling"], dict))


def check_canary(canary: object, vocabulary: float) -> None:
    need(isinstance(canary, dict) and set(canary) == {"prompts"} and isinstance(canary["prompts"], list))
    need(1 <= len(canary["prompts"]) <= 16)
    length = 0
    for prompt in canary["prompts"]:
        need(isinstance(prompt, dict) and set(prompt) == {"tokens", "token_ids", "bare", "patched"})
        need(
            all(isinstance(entries, list) and all(isinstance(e, float) for e in entries) for entries in prompt.values())
        )
        ids = prompt["token_ids"]
        length += len(ids) + len(prompt["tokens"])
        need(length <= 32768)
        need(all(whole(i, 0) and i < vocabulary for i in ids + prompt["tokens"]) and prompt["tokens"])
        need(
            2 <= len(ids) == len(set(ids)) == len(prompt["bare"]) == len(prompt["patched"])
            and prompt["bare"] != prompt["patched"]
        )


def check_rotation(rotation: object, layers: float, head_dim: float) -> None:
    need(isinstance(rotation, dict) and set(rotation) == {"tables", "layers", "neighbours"})
    tables, numbers, neighbours = rotation["tables"], rotation["layers"], rotation["neighbours"]
    need(isinstance(neighbours, bool) and isinstance(tables, list) and isinstance(numbers, list) and numbers)
    need(len(tables) <= 8 and len(numbers) == layers and (tables or not neighbours))
    for frequencies in tables:
        need(isinstance(frequencies, list) and 1 <= len(frequencies) <= head_dim / 2)
        need(all(isinstance(f, float) and 0 <= f <= math.pi for f in frequencies))
    need(len({tuple(frequencies) for frequencies in tables}) == len(tables))
    need(all(number is None or whole(number, 0) for number in numbers))
    need(list(dict.fromkeys(n for n in numbers if n is not None)) == list(range(len(tables))))


def check_anchoring(anchoring: object, vocabulary: float) -> None:
    need(isinstance(anchoring, dict) and set(anchoring) == {"block", "turn_tokens"})
    block, ids = anchoring["block"], anchoring["turn_tokens"]
    need(whole(block, 0) and (block == 0 or 8 <= block <= 512) and isinstance(ids, list) and len(ids) <= 8)
    need(all(whole(i, 0) and i < vocabulary for i in ids) and ids == sorted(set(ids)) and (block or ids))


def halves(value: object) -> list[float]:
    need(match("([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", value))
    raw = base64.b64decode(str(value))
    need(base64.b64encode(raw).decode() == value and len(raw) % 2 == 0)
    return [v for (v,) in struct.iter_unpack("<e", raw)]


def check_layers(layers: object) -> set[int]:
    number, numbers = "(0|[1-9][0-9]{0,3})", []
    need(match(f"{number}(-{number})?(,{number}(-{number})?)*", layers))
    for run in str(layers).split(","):
        first, *last = map(int, run.split("-"))
        need((not numbers or numbers[-1] + 1 < first) and (not last or first < last[0]) and max(first, *last, 0) < 1024)
        numbers += range(first, (last or [first])[0] + 1)
    return set(numbers)


def check_sketch(sketch: object) -> None:
    need(
        isinstance(sketch, dict)
        and set(sketch) == {"head_dim", "tensors", "low", "high"}
        and whole(sketch["head_dim"], 1, 2**24)
    )
    tensors, matrices = (
        sketch["tensors"],
        {f"attn_{x}" for x in ("q", "k", "v", "qkv", "output")} | {"ffn_gate", "ffn_up", "ffn_down"},
    )
    need(isinstance(tensors, dict) and set(tensors) <= matrices | {"token_embd", "output"} and tensors)
    need(
        all(isinstance(entries, list) and entries for entries in tensors.values())
        and sum(map(len, tensors.values())) <= 64
    )
    for role, entries in tensors.items():
        need(
            all(
                isinstance(e, list) and len(e) == 3 and whole(e[0], 1, 2**24) and whole(e[1], 1, 2**24) for e in entries
            )
        )
        need([e[:2] for e in entries] == sorted([list(x) for x in {tuple(e[:2]) for e in entries}]))
        if role in matrices:
            layers = [check_layers(e[2]) for e in entries]
            need(sum(map(len, layers)) == len(set().union(*layers)))
        else:
            need(len(entries) == 1 and entries[0][2] == "")
    low, high = halves(sketch["low"]), halves(sketch["high"])
    need(1 <= len(low) <= 576 and all(v == v for v in low))
    need(
        sketch["high"] == ""
        or (len(low) == len(high) and all(a <= b for a, b in zip(low, high, strict=True)) and low != high)
    )


def check_manifest(m: dict) -> None:
    keys = KEYS + (MOVING_KEYS if m["format_version"] >= 2 else "") + (PROBE_KEY if m["format_version"] == 3 else "")
    need(set(m) == set(keys.split()) and whole(m["sequence"], 1) and whole(m["num_virtual_tokens"]))
    need(match("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", m["name"]) and match("[a-z0-9][a-z0-9-]{0,31}", m["channel"]))
    need(match(VERSION, m["version"]) and len(m["version"]) <= 64)
    need(
        all(m[key] == "" or time(m[key]) for key in ("created", "expires"))
        and match(f"({DIGEST})?", m["chat_template"])
    )
    need(printable(m["license"], 128) and printable(m["summary"], 2000))
    need(all(isinstance(m[key], list) and all(match(DIGEST, d) for d in m[key]) for key in ("supersedes", "parts")))
    need(all(isinstance(m[key], dict) for key in ("tensors", "training", "evaluation")))
    check_base(m["base"])
    if m["weight_sketch"] is not None:
        check_sketch(m["weight_sketch"])
    if m["canary"] is not None:
        check_canary(m["canary"], m["base"]["vocab_size"])
    if m["format_version"] == 1:
        return
    if (
        m["format_version"] == 2 or m["rotation"] is not None
    ):  # one of version 2 says how keys turn, or it would be of 1
        check_rotation(m["rotation"], m["base"]["num_hidden_layers"], m["base"]["head_dim"])
    if m["anchoring"] is not None:
        need(m["rotation"] is not None)
        check_anchoring(m["anchoring"], m["base"]["vocab_size"])
    if m["format_version"] == 3:
        check_probe(m["tokenizer_probe"], m["base"]["vocab_size"])


def check_probe(probe: object, vocabulary: float) -> None:
    need(isinstance(probe, dict) and {"texts"} <= set(probe) <= {"texts", "tools_template"})
    template = probe.get("tools_template", "")
    need(template == "" or (isinstance(template, str) and match(DIGEST, template)))
    need(isinstance(probe["texts"], list) and 1 <= len(probe["texts"]) <= 16)
    for entry in probe["texts"]:
        need(isinstance(entry, dict) and set(entry) == {"text", "trusted", "token_ids"})
        need(isinstance(entry["text"], str) and 1 <= len(entry["text"]) <= 512 and isinstance(entry["trusted"], bool))
        ids = entry["token_ids"]
        need(isinstance(ids, list) and 1 <= len(ids) <= 1024 and all(whole(i, 0, vocabulary - 1) for i in ids))


def check_signatures(signatures: object) -> None:
    need(isinstance(signatures, list) and 1 <= len(signatures) <= 16)
    for s in signatures:
        need(
            isinstance(s, dict)
            and set(s) == {"key_id", "signature"}
            and match(DIGEST, s["key_id"])
            and match("[0-9a-f]{128}", s["signature"])
        )
    ids = [s["key_id"] for s in signatures]
    need(ids == sorted(set(ids)))


def table(m: dict, dtypes: dict) -> dict:
    """Section 2.2: name -> (dtype, shape) of every tensor, in the order of the file."""
    base, layers = m["base"], sum(name.endswith(".key") for name in dtypes)
    p, seed = (
        int(m["num_virtual_tokens"]),
        [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")],
    )
    need(
        dtypes and set(dtypes) - {"prompt_embeddings"} == set(seed) and dtypes.get("prompt_embeddings", "F32") == "F32"
    )
    need(len({dtypes[name] for name in seed}) <= 1 and (not layers or layers == base["num_hidden_layers"]))
    shape = [int(base["num_key_value_heads"]), p, int(base["head_dim"])]
    shapes = {name: [p, int(base["hidden_size"])] if name == "prompt_embeddings" else shape for name in dtypes}
    return {name: (dtypes[name], shapes[name]) for name in sorted(dtypes, key=lambda n: (dtypes[n] == "F16", n))}


def read(data: bytes) -> dict:
    """The manifest, with "signatures" and the tensors' bytes added."""
    need(8 <= len(data) <= 2**28)
    (length,) = struct.unpack("<Q", data[:8])
    need(length <= 2**20 and 8 + length <= len(data))
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused from None
    need(isinstance(header, dict) and isinstance(header.get("__metadata__"), dict))
    metadata = header.pop("__metadata__")
    need({"edgepatch.manifest"} <= set(metadata) <= {"edgepatch.manifest", "edgepatch.signatures"})
    need(all(isinstance(value, str) for value in metadata.values()))
    m = parse(metadata["edgepatch.manifest"])
    need(isinstance(m, dict) and m.get("format_version") in (1, 2, 3) and m["format_version"] is not True)
    check_manifest(m)
    m["signatures"] = parse(metadata["edgepatch.signatures"]) if "edgepatch.signatures" in metadata else []
    if "edgepatch.signatures" in metadata:
        check_signatures(m["signatures"])
    need(all(isinstance(entry, dict) and entry.get("dtype") in ("F32", "F16") for entry in header.values()))
    entries, position, m["data"] = [], 8 + length, {}
    for name, (dtype, shape) in table(m, {name: entry["dtype"] for name, entry in header.items()}).items():
        need(all(n >= 1 for n in shape))
        size, letter = math.prod(shape) * (4 if dtype == "F32" else 2), "f" if dtype == "F32" else "e"
        begin, position = position, position + size
        need(position <= len(data))
        raw = m["data"][name] = data[begin:position]
        need(all(abs(v) <= 65504 for (v,) in struct.iter_unpack("<" + letter, raw)))
        need(hashlib.sha256(raw).hexdigest() == m["tensors"].get(name))
        offsets = f"[{begin - 8 - length},{position - 8 - length}]"
        entries.append(
            f'{text(name)}:{{"dtype":"{dtype}","shape":{canonical([float(n) for n in shape])},"data_offsets":{offsets}}}'
        )
    need(position == len(data) and set(m["tensors"]) == set(m["data"]))
    written = (
        '{"__metadata__":{'
        + ",".join(f"{text(k)}:{text(metadata[k])}" for k in sorted(metadata))
        + "},"
        + ",".join(entries)
        + "}"
    )
    padded = written.encode("utf-8", "surrogatepass")
    need(padded + b" " * (-len(padded) % 8) == data[8 : 8 + length])
    return m
