"""llama.cpp without edgepatch: token ids and logits straight from the library, to compare with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters.gguf import library


@contextmanager
def opened(path: Path, vocab_only: bool = False) -> Iterator[tuple[Any, Any]]:
    """(library, model) of a GGUF file."""
    lib = library.load_library()
    parameters = lib.llama_model_default_params()
    parameters.vocab_only, parameters.n_gpu_layers = vocab_only, 0
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, library.library_errors()
    try:
        yield lib, model
    finally:
        lib.llama_model_free(model)


def tokens_of(path: Path, texts: list[str], bos: bool = True, trusted: bool = False) -> list[list[int]]:
    """Ids of each text; in ``trusted`` text the names of special tokens are the tokens."""
    with opened(path, vocab_only=True) as (lib, model):
        vocab = lib.llama_model_get_vocab(model)
        token_ids = []
        for text in texts:
            data = text.encode()
            ids = (lib.llama_token * (len(data) + 8))()
            count = lib.llama_tokenize(vocab, data, len(data), ids, len(ids), bos, trusted)
            assert count >= 0
            token_ids.append(list(ids[:count]))
        return token_ids


def logits_of(path: Path, tokens: list[int]) -> np.ndarray:
    """(T, V) float32, with a float32 cache and without flash attention."""
    with opened(path) as (lib, model):
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
        parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = lib.llama_init_from_model(model, parameters)
        assert context, library.library_errors()
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        try:
            assert lib.llama_decode(context, batch) == 0, library.library_errors()
            size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
            rows = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * (size * len(tokens))))
            return np.frombuffer(rows.contents, dtype=np.float32).reshape(len(tokens), size).copy()
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)
