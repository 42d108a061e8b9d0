"""What ``edgepatch export`` writes for llama-server, and models whose prompts begin in other ways."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an export says of itself."""
    return dict(json.loads((folder / "manifest.json").read_text("utf-8")))


def without_bos(model: Path, target: Path) -> Path:
    """The same file, whose tokenizer puts nothing in front of a text."""
    field = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)  # 7: a truth value
    data = model.read_bytes()
    assert data.count(field + b"\1") == 1
    target.write_bytes(data.replace(field + b"\1", field + b"\0"))
    return target
