"""Damaged and crafted files, made from good ones: bytes changed anywhere, or the parts of a patch changed so that the rest fits.

Most random changes of a patch break a digest or the canonical form. What lies behind those checks is reached by changing one
value and then writing everything around it anew.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from edgepatch.errors import PatchFormatError
from edgepatch.files.canonical import canonical_json, parse_json
from edgepatch.patch.file import METADATA_KEY, SIGNATURES_KEY

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    0.5,
    -0.0,
    1e-7,
    1e21,
    1e308,
    3.141592653589793,
    7,
    512,
    65504,
    2**31,
    2**32,
    2**53 - 1,
    2**53,
    2**63,
    10**400,
    float("inf"),
    float("nan"),
    "",
    "x",
    "1.0.0",
    "0" * 64,
    "g" * 64,
    "a" * 65,
    "F32",
    "F16",
    "F64",
    "F8_E4M3",
    "2026-11-21T10:00:00Z",
    "2026-02-30T24:00:60Z",
    "\ud800",
    "\u202e",
    "\n",
    "\0",
    "0-1023,0-1023",
    "AAA=",
    "/w==",
    [],
    [0],
    [1, 2, 3],
    [[]],
    [None],
    {},
    {"": {}},
    {"a": 1, "b": 2},
    "prompt_embeddings",
)
PIECES = (
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\\ud800",
    b"[[[[[[[[",
    b"1e400",
    b"NaN",
    b"-0",
    b"0.10",
    b",",
    b" ",
    b"999999999999999999999",
)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a cut, a repeated, moved or inserted piece."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 8, 64, 1000))
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            source = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[source : source + length]
        elif kind == 4:
            changed[at:at] = rng.choice(PIECES)
        else:
            del changed[at if rng.random() < 0.1 else len(changed) - min(length, len(changed)) :]
    return bytes(changed)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed, renamed or repeated."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return _replacement(value, rng)
    if isinstance(value, list):
        at, copy = rng.randrange(len(value)), list(value)
        kind = rng.randrange(8)
        if kind == 0:
            del copy[at]
        elif kind == 1:
            copy.insert(at, copy[-1])
        elif kind == 2:
            rng.shuffle(copy)
        else:
            copy[at] = mutated_json(copy[at], rng)
        return copy
    key, entries = rng.choice(sorted(value)), dict(value)
    kind = rng.randrange(10)
    if kind == 0:
        del entries[key]
    elif kind == 1:
        entries[str(rng.choice(VALUES))[:80]] = entries.pop(key)
    elif kind == 2:
        entries[str(rng.choice(VALUES))[:80]] = rng.choice(VALUES)
    else:
        entries[key] = mutated_json(entries[key], rng)
    return entries


def _replacement(value: Any, rng: random.Random) -> Any:
    if isinstance(value, str) and value and rng.random() < 0.4:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("09afAZ.-+ \x7f\u2028\u202eé\U0001f642") + value[at + rng.randrange(2) :]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((1, -1, 0.5, 1e-9, 2**40))
    if rng.random() < 0.02:
        return json.loads("[" * 40 + "]" * 40)
    return rng.choice(VALUES)


def _written(value: Any, rng: random.Random) -> str:
    """Mostly canonical, so that the reader gets past that check."""
    try:
        if rng.random() < 0.9:
            return canonical_json(value).decode("utf-8")
    except PatchFormatError:
        pass  # canonical JSON has no such value
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=rng.random() < 0.5)


def assembled(header: Any, body: bytes) -> bytes:
    """A file from its header's value and its tensors' bytes, with the right length and padding."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def mutated_patch(data: bytes, rng: random.Random) -> bytes:
    """A good patch file with one thing changed: its bytes, manifest, signatures, header, or tensors with digests that fit them."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), data[start:]
    metadata = header["__metadata__"]
    part = rng.choice(("bytes", "manifest", "manifest", "manifest", "signatures", "header", "tensors"))
    if part == "bytes":
        return mutated_bytes(data, rng)
    if part == "header":
        return assembled(mutated_json(header, rng), body)
    if part == "signatures":
        metadata[SIGNATURES_KEY] = _written(mutated_json(json.loads(metadata.get(SIGNATURES_KEY, "[]")), rng), rng)
    else:
        manifest = parse_json(metadata[METADATA_KEY].encode("utf-8"), "manifest")
        if part == "tensors":
            body = mutated_bytes(body, rng)
            for name, entry in header.items():
                if name in manifest["tensors"]:
                    manifest["tensors"][name] = hashlib.sha256(body[slice(*entry["data_offsets"])]).hexdigest()
        else:
            manifest = mutated_json(manifest, rng)
        metadata[METADATA_KEY] = _written(manifest, rng)
    header["__metadata__"] = dict(sorted(metadata.items()))
    return assembled(header, body)
