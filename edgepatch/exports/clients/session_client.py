"""llama.cpp's own reader of session files in a fresh context of a stock llama-cpp-python; a program of its own."""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Replies to each prompt; the session file comes first."""
    import llama_cpp

    replies, times = [], []
    settings = request["context"]
    llama: Any = llama_cpp.Llama(
        request["model"], n_ctx=settings["cells"], flash_attn=settings["flash_attention"], n_threads=1, verbose=False
    )
    for prompt in request["prompts"]:
        llama.reset()
        start = time.perf_counter()
        tokens, count = (llama_cpp.llama_token * 64)(), ctypes.c_size_t(0)
        path = str(Path(request["folder"]) / request["seed"]).encode()
        if not llama_cpp.llama_state_load_file(llama.ctx, path, tokens, len(tokens), ctypes.byref(count)):
            raise SystemExit(f"llama.cpp refuses {path.decode()}: another version or other settings of the context")
        times.append(time.perf_counter() - start)
        if list(tokens[: count.value]) != prompt[:1]:
            raise SystemExit(f"expected the label {prompt[:1]}, found {list(tokens[: count.value])}")
        llama.n_tokens, llama.input_ids[0] = 1, prompt[0]
        replies.append(reply(llama, prompt, request["count"]))
    return {"version": llama_cpp.__version__, "replies": replies, "load_ms": 1e3 * min(times)}


def reply(llama: Any, prompt: list[int], count: int) -> dict[str, Any]:
    """The likeliest tokens behind a prompt, whose first token is there already."""
    import llama_cpp
    import numpy as np

    fed, tokens, first = prompt[1:], list[int](), None
    while len(tokens) < count:
        llama.eval(fed)
        pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, (llama.n_vocab(),))
        first = logits.tolist() if first is None else first
        fed = [int(logits.argmax())]
        tokens += fed
    return {"prompt": prompt, "tokens": tokens, "logits": first}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(asked["answer"]).write_text(json.dumps(main(asked)), encoding="utf-8")
