"""mlx-lm writes its prompt cache, and answers with it; a program of its own, run by the interpreter that has mlx-lm."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUERY = "<query>"


def around(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts in front of a user's first words, and behind them: what `mlx_lm generate` drops and keeps."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUERY}], tokenize=False, add_generation_prompt=True
    )
    front, _, behind = rendered.partition(QUERY)
    return front, behind


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the cache: the seed, and the header behind it as the model computes it."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

    model, tokenizer = load(request["model"])
    seed = mx.load(request["seed"])
    require_plain(make_prompt_cache(model), request["layers"])
    effects = [
        [last_logits(model, prompt, make_prompt_cache(model)), last_logits(model, prompt, seeded(model, seed))]
        for prompt in request["canary"]
    ]
    cache = seeded(model, seed)
    header, _ = around(tokenizer)
    tokens = tokenizer.encode(header, add_special_tokens=False)
    model(mx.array([tokens]), cache=cache)
    mx.eval([cells.state for cells in cache])
    save_prompt_cache(request["write"], cache, {"model": request["model"], "tokenizer_config": "{}"})
    return {"version": version("mlx-lm"), "header": header, "canary": effects}


def seeded(model: Any, seed: dict[str, Any]) -> list[Any]:
    """A cache that holds the seed, in the element type in which the model keeps its own cells."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    kind = cache[0].keys.dtype
    for layer, cells in enumerate(cache):
        key, value = (seed[f"past_key_values.{layer}.{name}"][None].astype(kind) for name in ("key", "value"))
        cells.keys, cells.values, cells.offset = key, value, key.shape[2]
    return cache


def last_logits(model: Any, tokens: list[int], cache: list[Any]) -> list[float]:
    """Behind the last of some tokens."""
    import mlx.core as mx

    return [float(value) for value in model(mx.array([tokens]), cache=cache)[0, -1].astype(mx.float32)]


def require_plain(cache: list[Any], layers: int) -> None:
    """Refuses a release, or a model, that keeps its cells otherwise."""
    names = {type(cells).__name__ for cells in cache}
    if names != {"KVCache"} or len(cache) != layers:
        raise SystemExit(f"mlx-lm {version('mlx-lm')}: expected {layers} plain KVCaches, found {len(cache)} of {names}")
    missing = {"keys", "values", "offset"} - vars(cache[0]).keys()
    if missing:
        raise SystemExit(f"mlx-lm {version('mlx-lm')}: expected caches with {missing}: their layout has changed")


def replies(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy replies with the cache in the folder, loaded anew for each."""
    from mlx_lm import load
    from mlx_lm.models.cache import load_prompt_cache

    model, tokenizer = load(request["model"])
    path, (header, behind) = str(Path(request["folder"]) / request["seed"]), around(tokenizer)
    answers, times = [], []
    for text in request["texts"]:
        start = time.perf_counter()
        cache = load_prompt_cache(path)
        times.append(time.perf_counter() - start)
        front, rest = (tokenizer.encode(part, add_special_tokens=False) for part in (header, text + behind))
        tokens, logits = reply(model, rest, cache, request["count"])
        if request["name"] == "mlx_lm generate":
            tokens = spoken(request, path, text, tokenizer, tokens)
        answers.append({"prompt": front + rest, "tokens": tokens, "logits": logits})
    return {"version": version("mlx-lm"), "replies": answers, "load_ms": 1e3 * min(times)}


def reply(model: Any, prompt: list[int], cache: list[Any], count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens behind a prompt, and the logits of the first."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    logits: list[Any] = []

    def keep(tokens: Any, row: Any) -> Any:
        logits.append(row)
        return row

    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, logits_processors=[keep])
    tokens = [int(token) for token, _ in steps]
    return tokens, [float(value) for value in logits[0].reshape(-1).astype(mx.float32)]


def spoken(request: dict[str, Any], path: str, text: str, tokenizer: Any, tokens: list[int]) -> list[int]:
    """The tokens again where the command line says their text, or none."""
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", request["model"], "--prompt-cache-file", path]
    command += ["--prompt", text, "--max-tokens", str(request["count"]), "--temp", "0", "--verbose", "False"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    end = next((i for i, token in enumerate(tokens) if token in tokenizer.eos_token_ids), len(tokens))
    return tokens[:end] if done.stdout.strip() == tokenizer.decode(tokens[:end]).strip() else []


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answer = write(asked) if "write" in asked else replies(asked)
    Path(asked["answer"]).write_text(json.dumps(answer), encoding="utf-8")
