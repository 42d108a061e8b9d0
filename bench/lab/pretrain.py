"""Trains M from scratch: resumable, seeded, logged.

Optimizer: Muon on the matrices of the layers, AdamW on embeddings and norms; warm-up, constant, linear decay to zero.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edgepatch.bench.lab.corpus import Part
from edgepatch.bench.lab.tokenizer import BOS, EOS, PAD, VOCAB_SIZE

CONTEXT_LENGTH = 1024


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes of M and of its training."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    steps: int = 3000
    sequence_length: int = 512
    sequences_per_step: int = 16
    long_share: float = 0.1  # the last share of the steps reads sequences of CONTEXT_LENGTH
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    warmup_steps: int = 50
    decay_share: float = 0.4
    rng_seed: int = 1


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """M with random weights; all row lengths are multiples of 256 so that every k-quant applies."""
    torch.manual_seed(config.rng_seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=CONTEXT_LENGTH,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
            eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        )
    )


def token_stream(parts: list[Part], tokenizer: PreTrainedTokenizerFast, num_tokens: int, rng_seed: int) -> np.ndarray:
    """Tokens of the shuffled mixture, each document between BOS and EOS, repeated until there are ``num_tokens``.

    Returns:
        (num_tokens,) uint16.
    """
    bos, eos = tokenizer.convert_tokens_to_ids(BOS), tokenizer.convert_tokens_to_ids(EOS)
    documents: list[tuple[np.ndarray, float]] = []
    for part in parts:
        encoded = tokenizer(part.texts, add_special_tokens=False)["input_ids"]
        documents += [(np.array([bos, *ids, eos], dtype=np.uint16), part.repeats) for ids in encoded]
    rng = random.Random(rng_seed)
    pieces: list[np.ndarray] = []
    total = 0
    while total < num_tokens:
        epoch = []
        for ids, repeats in documents:
            whole = int(repeats)
            epoch += [ids] * (whole + (rng.random() < repeats - whole))
        rng.shuffle(epoch)
        pieces += epoch
        total += sum(map(len, epoch))
    return np.concatenate(pieces)[:num_tokens]


def _optimizers(model: LlamaForCausalLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Trapezoid: linear warm-up, constant, linear decay to zero over the last ``decay_share`` of the steps."""
    left = (config.steps - step) / (config.steps * config.decay_share)
    return min(1.0, (step + 1) / config.warmup_steps, left)


def pretrain(
    parts: list[Part], tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, out: Path, checkpoint_every: int = 200
) -> LlamaForCausalLM:
    """Trains M, or goes on from ``out/checkpoint.pt``; appends one JSON line a log step to ``out/log.jsonl``.

    Raises:
        OSError: ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    per_step = config.sequence_length * config.sequences_per_step
    stream = torch.from_numpy(token_stream(parts, tokenizer, per_step * config.steps, config.rng_seed).astype(np.int64))
    model = new_model(config, tokenizer).to(device)
    optimizers = _optimizers(model, config)
    forward = torch.compile(model)  # 1.8x on a CPU with AVX-512
    base_lrs = [o.param_groups[0]["lr"] for o in optimizers]
    checkpoint, start = out / "checkpoint.pt", 0
    if checkpoint.exists():  # written by this function on this machine
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    log.write(json.dumps({"start": start, "device": device, "torch": torch.__version__, **asdict(config)}) + "\n")
    began, running = time.monotonic(), 0.0
    for step in range(start, config.steps):
        length = config.sequence_length if step < config.steps * (1 - config.long_share) else CONTEXT_LENGTH
        batch = stream[step * per_step : (step + 1) * per_step].view(-1, length).to(device)  # (B, T)
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, config)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 20 == 0:
            rate = (step + 1 - start) * per_step / (time.monotonic() - began)
            line = {"step": step + 1, "tokens": (step + 1) * per_step, "loss": round(running / 20, 4)}
            log.write(json.dumps({**line, "tokens_per_s": round(rate)}) + "\n")
            log.flush()
            running = 0.0
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    log.close()
    return model
