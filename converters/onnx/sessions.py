"""Sessions of onnxruntime: quiet, with errors of ours, and opened by a child first where this machine has never met the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import first_contact
from edgepatch.converters.first_contact import Contact, Proof, Report, require_library
from edgepatch.converters.machine_identity import library_files
from edgepatch.converters.onnx.files import GraphFile, read_graph_file
from edgepatch.converters.onnx.graphs import evaluate, recognise
from edgepatch.converters.onnx.identity import read_identity
from edgepatch.cores import read_allowance
from edgepatch.errors import InputError, MissingExtraError, UnfitModelError
from edgepatch.tensors import ModelSpec

PACKAGE = "onnxruntime"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROMPT_TOKENS = 64
TRIAL_WINDOW = 4096  # any width: it decides what a token sees, not what is computed with


def load_library() -> Any:
    """The ``onnxruntime`` module; a child has loaded it on this CPU before.

    Raises:
        MissingExtraError: it is not installed.
        UnfitModelError: loading it ends a process on this CPU.
    """
    if not library_files(PACKAGE):
        raise MissingExtraError("onnxruntime", "onnx")
    require_library(PACKAGE, f"{__name__}:try_library")
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx") from None
    return onnxruntime


def try_library(_: object, __: object, report: Report) -> dict[str, Any]:
    """In a child: loads the library and nothing else."""
    report("being loaded")
    load_library()
    return {}


def prove_session(
    file: GraphFile,
    *,
    spec: ModelSpec | None = None,
    num_threads: int | None = None,
    provider: str = "cpu",
    trial: str = f"{__name__}:try_graph",
) -> Proof:
    """The proof that onnxruntime opens a graph and computes with it, from memory or by a child.

    Args:
        file: the graph, its folder checked by ``onnx.files.open_folder``.
        spec: the model that it is; by default the one that it names itself.
        num_threads: of one forward pass; one for each core that may be used when ``None``.
        provider: "cpu" or "cuda".
        trial: what the child does.

    Raises:
        InputError: the graph cannot be opened or seeded, or the provider is unknown.
        UnfitModelError: onnxruntime dies of it, hangs or computes no numbers.
        MissingExtraError: onnxruntime, or its build for the provider, is not installed.
    """
    _require_provider(provider)
    weights = {file.path.with_name(tensor.external["location"]) for tensor in file.tensors if tensor.external}
    threads = num_threads or read_allowance().usable
    settings = {"provider": provider, "parallel": threads > 1, "spec": spec.as_dict() if spec else None}
    files = (file.path, *sorted(weights))
    return first_contact.prove(Contact(PACKAGE, trial, files, settings, {"num_threads": threads}))


def open_session(proof: Proof, num_threads: int | None = None) -> Any:
    """The session of a proved graph; where its files were changed since, they are proved again.

    Args:
        proof: of the graph.
        num_threads: of one forward pass; as many as it was proved with when ``None``.

    Raises:
        InputError: the graph is damaged or being written to, or the provider cannot be used.
        UnfitModelError: the files were changed, and onnxruntime dies of what they are now.
    """
    contact, proofs = proof.contact, [proof]
    threads, provider = num_threads or contact.details["num_threads"], contact.settings["provider"]
    return first_contact.open_proved(
        lambda: proofs.pop() if proofs else first_contact.prove(contact),
        lambda _: new_session(contact.files[0], threads, provider),
    )


def new_session(model_file: Path, num_threads: int, provider: str) -> Any:
    """A session of a file that was proved, or of any in a child.

    Raises:
        InputError: the graph is damaged, or the provider cannot be used.
    """
    onnxruntime = load_library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4  # what matters is raised
    # Spinning threads burn the time that the other processes of a small device need: up to half of the speed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(model_file), options, providers=[PROVIDERS[provider]])
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        raise InputError(
            f"{model_file} is damaged or cannot be loaded: {error}", hint="convert the model again"
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise InputError(
            f"provider {provider}: onnxruntime fell back to {session.get_providers()[0]}",
            hint="check the driver and its libraries, or use the CPU",
        )
    return session


def _require_provider(provider: str) -> None:
    if provider not in PROVIDERS:
        raise InputError(f"provider: expected one of {', '.join(PROVIDERS)}, found {provider!r}")
    if not library_files(PACKAGE):
        raise MissingExtraError("onnxruntime", "onnx")
    if provider != "cpu" and PROVIDERS[provider] not in load_library().get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "onnx-gpu")


# The child.


def try_graph(paths: Sequence[Path], settings: dict[str, Any], report: Report) -> dict[str, Any]:
    """In a child: opens a session and evaluates a token and a prompt with plain arrays.

    Raises:
        InputError: the graph cannot be opened or seeded.
        UnfitModelError: logits are not finite.
    """
    file = read_graph_file(paths[0])
    report("opening a session")
    session = new_session(paths[0], settings["num_threads"], settings["provider"])
    spec = spec_of_session(session, file, settings["spec"])
    graph = recognise(session, file, spec)
    for count in (1, PROMPT_TOKENS):
        tokens = [i * spec.vocab_size // count for i in range(count)]
        report(f"evaluating {count} tokens")
        require_finite(evaluate(session, graph, spec, None, tokens, TRIAL_WINDOW))
    return {}


def spec_of_session(session: Any, file: GraphFile, spec: dict[str, Any] | None) -> ModelSpec:
    """The model that a graph is: as given, or as it says itself."""
    if spec is not None:
        return ModelSpec.from_dict(spec)
    return read_identity(file.path.parent, file, session.get_modelmeta().custom_metadata_map)[0]


def require_finite(logits: NDArray[Any]) -> None:
    """Refuses a library that computes no numbers.

    Raises:
        UnfitModelError: one of the logits is none.
    """
    if not np.isfinite(logits).all():
        raise UnfitModelError("computed logits that are not finite")
