"""The one table of clients that a patch is exported for.

What a target needs is imported where it is written or checked: the command line lists the table without any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepatch.llama_server.export import ExportOptions
    from edgepatch.patch.file import Patch

    Write = Callable[[Patch, Path, Path, ExportOptions], dict[str, Any]]
"""(patch, model, folder, options) -> the manifest of the folder that was written."""


@dataclass(frozen=True)
class Target:
    """What a patch is exported for.

    Attributes:
        summary: which programs read the folder.
        write: writes it.
        clients: names in ``clients.CLIENTS``, which the check runs; none where a check of its own asks a running server.
        moves: whether a seed that moves does so there.
    """

    summary: str
    write: Write
    clients: tuple[str, ...]
    moves: bool = False


def _llama_server(patch: Patch, model: Path, folder: Path, options: ExportOptions) -> dict[str, Any]:
    from edgepatch.llama_server.export import export

    return export(patch, model, folder, options)


def _llama_session(patch: Patch, model: Path, folder: Path, options: ExportOptions) -> dict[str, Any]:
    from edgepatch.exports.seed_files import write

    return write(patch, model, folder, options, "llama-session")


def _node_llama_cpp(patch: Patch, model: Path, folder: Path, options: ExportOptions) -> dict[str, Any]:
    from edgepatch.exports.seed_files import write

    return write(patch, model, folder, options, "node-llama-cpp")


def _transformers_js(patch: Patch, model: Path, folder: Path, options: ExportOptions) -> dict[str, Any]:
    from edgepatch.exports.graphs import write

    return write(patch, model, folder, "transformers.js")


def _onnxruntime_web(patch: Patch, model: Path, folder: Path, options: ExportOptions) -> dict[str, Any]:
    from edgepatch.exports.graphs import write

    return write(patch, model, folder, "onnxruntime-web")


def _mlx(patch: Patch, model: Path, folder: Path, options: ExportOptions) -> dict[str, Any]:
    from edgepatch.exports.mlx import write

    return write(patch, model, folder, options)


TARGETS = {
    "llama-server": Target("an unmodified llama-server", _llama_server, ()),
    "llama-session": Target(
        "llama.rn, llamadart, LLamaSharp, llama-completion", _llama_session, ("llama_state_load_file",)
    ),
    "node-llama-cpp": Target("node-llama-cpp", _node_llama_cpp, ("node-llama-cpp", "LlamaChatSession")),
    "transformers.js": Target("transformers.js", _transformers_js, ("transformers.js",), moves=True),
    "onnxruntime-web": Target(
        "onnxruntime-web, onnxruntime-node", _onnxruntime_web, ("onnxruntime-web", "onnxruntime-web in Chromium"), True
    ),
    "mlx": Target("mlx-lm", _mlx, ("mlx-lm", "mlx_lm generate")),
}
