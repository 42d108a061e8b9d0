"""A GGUF file is tried by a child with the settings that will be used before llama.cpp opens it in this process.

The child goes through the same classes as the runtime: ``LlamaModel``, ``LlamaContext`` and the vocabulary. Where it dies with
repacked weights (ggml's "extra buffers"), it is tried once more without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import first_contact
from edgepatch.converters.first_contact import Contact, Failure, Proof, Report, Way
from edgepatch.converters.gguf import library, vocabulary
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.machine_identity import cpu_facts
from edgepatch.errors import EdgepatchError, UnfitModelError
from edgepatch.runtimes.llamacpp.context import ContextSettings, LlamaContext, LlamaModel

PROOF_CELLS, PROOF_SEQUENCES, PROMPT_TOKENS = 512, 4, 64
EMBEDDING_STAGE = "evaluating embeddings"

REPACKED: Mapping[str, Any] = {"use_extra_buffers": True, "takes_embeddings": True}
NOT_REPACKED: Mapping[str, Any] = {"use_extra_buffers": False, "takes_embeddings": True}
TOKENS_ALONE: Mapping[str, Any] = {"use_extra_buffers": True, "takes_embeddings": False}

REMEDY = "install another release of llama-cpp-python, or build it for this CPU"


def contact(path: Path, num_gpu_layers: int, settings: ContextSettings) -> Contact:
    """llama.cpp, a file, and all settings that choose its kernels.

    Args:
        path: the GGUF file.
        num_gpu_layers: layers on a GPU.
        settings: of the context. How many cells and sequences it has chooses no kernel, so the trial has few of them; and of
            several threads, whose number may follow the load of the machine, any number is tried for all.
    """
    shared = {
        "num_gpu_layers": num_gpu_layers,
        "kv_type": settings.kv_type,
        "flash_attention": settings.flash_attention,
        "parallel": settings.num_threads > 1,
    }
    details = {"num_threads": settings.num_threads}
    return Contact(library.PACKAGE, f"{__name__}:try_model", (path,), shared, details)


def prove_model(path: Path, num_gpu_layers: int, settings: ContextSettings) -> Proof:
    """The proof of a file, from memory or by a child; its answer says what ``LlamaModel`` is to be opened with.

    Raises:
        InputError: llama.cpp cannot load it, and says so.
        UnfitModelError: llama.cpp dies of it, hangs or computes no numbers, with repacked weights and without.
        MissingExtraError: llama-cpp-python is not installed.
    """
    library.require_installed()
    implied = [vocabulary.contact(path)]
    return first_contact.prove(contact(path, num_gpu_layers, settings), _next_way, implied)


def open_model(proof: Proof, num_gpu_layers: int, settings: ContextSettings) -> LlamaModel:
    """Opens a proved file; where it was changed since, it is proved again.

    Raises:
        InputError: llama.cpp cannot load it, or it is being written to.
        UnfitModelError: it was changed, and llama.cpp dies of what it is now.
    """
    path, proofs = proof.contact.files[0], [proof]

    def proving() -> Proof:
        return proofs.pop() if proofs else prove_model(path, num_gpu_layers, settings)

    def opening(proved: Proof) -> LlamaModel:
        used = {name: proved.answer.get(name) is not False for name in REPACKED}
        model = LlamaModel(path, num_gpu_layers, **used)
        model.notes = (proved.note,) if proved.note else ()
        return model

    model: LlamaModel = first_contact.open_proved(proving, opening)
    return model


def _next_way(failures: Sequence[Failure]) -> Way | None:
    """Repacked weights; then without; then without embeddings, where nothing but a soft prompt needs what died."""
    if not failures:
        return Way(REPACKED)
    if len(failures) == 1:
        return Way(NOT_REPACKED, "without repacked weights", _note_of_repacking)
    if len(failures) == 2 and all(failure.stage == EMBEDDING_STAGE for failure in failures):
        return Way(TOKENS_ALONE, "without embeddings", _note_of_embeddings)
    return None


def _note_of_repacking(failure: Failure) -> str:
    from edgepatch import compilation

    amx = any("amx_tile" in fact for fact in cpu_facts())
    remedy = f"its AMX kernels may be built wrong; `{compilation.COMMAND}` builds it anew" if amx else REMEDY
    return (
        f"llama.cpp {failure.words} with repacked weights on this CPU: they are turned off, which is slower; {remedy}"
    )


def _note_of_embeddings(failure: Failure) -> str:
    return f"llama.cpp {failure.words}: patches that need their soft prompt evaluated cannot be used on this model"


# The child.


def try_model(paths: Sequence[Path], settings: dict[str, Any], report: Report) -> dict[str, Any]:
    """In a child: all that a runtime does with a file, on few tokens.

    Returns:
        The keywords that ``LlamaModel`` was opened with.

    Raises:
        InputError: llama.cpp cannot load it.
        UnfitModelError: logits are not finite.
    """
    used = {name: settings[name] for name in REPACKED}
    report("loading it")
    model = LlamaModel(paths[0], settings["num_gpu_layers"], **used)
    vocabulary.try_vocabulary(model.lib, model.vocab, read_header(paths[0]), report)
    report("making a context")
    context = LlamaContext(model, _settings(settings))
    _try_tokens(context, report)
    if used["takes_embeddings"]:
        report(EMBEDDING_STAGE)
        width = int(model.lib.llama_model_n_embd(model.handle))
        embeddings = np.full((2, width), 0.01, np.float32)
        context.clear()
        with suppress(EdgepatchError):  # what it refuses in good order, it refuses a soft prompt too
            context.evaluate_embeddings(0, embeddings, logits=True)
    return used


def _settings(settings: dict[str, Any]) -> ContextSettings:
    kv_type, flash_attention = settings["kv_type"], settings["flash_attention"]
    return ContextSettings(PROOF_CELLS, PROOF_SEQUENCES, kv_type, flash_attention, settings["num_threads"])


def _try_tokens(context: LlamaContext, report: Report) -> None:
    """A token, a prompt, and a token behind each of several sequences."""
    size = int(context.model.lib.llama_vocab_n_tokens(context.model.vocab))
    tokens = [i * size // PROMPT_TOKENS for i in range(PROMPT_TOKENS)]  # from all over the vocabulary
    report("evaluating 1 token")
    _require_finite(context.evaluate(0, tokens[:1]))
    report(f"evaluating {PROMPT_TOKENS} tokens")
    _require_finite(context.evaluate(1, tokens))
    report("evaluating a token behind a prompt")
    _require_finite(context.evaluate(1, tokens[:1]))
    report("copying its cache")
    context.fork(1, 2)
    with suppress(EdgepatchError):
        context.restore(3, context.state(0))
    if not context.model.has_recurrent_memory:
        report("evaluating several sequences at once")
        _require_finite(context.evaluate_rows([0, 1, 2], tokens[:3]))


def _require_finite(logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits).all():
        raise UnfitModelError("computed logits that are not finite")
