"""How much of the text's attention a seed gets, layer by layer: pinned and moving, behind other text and alone.

A seed acts through the share of attention that it gets. What is watched are the last tokens of prompts, which are the same at every
distance. Beside the seed's share stands that of the text's first token, where many models park attention that they do not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.environment import environment
from edgepatch.bench.evidence.forms import given_column, made_columns, make_forms
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.probes import ROOM, Place, ToxicityProbe, choose_texts
from edgepatch.converters.hf.folders import text_config
from edgepatch.errors import InputError
from edgepatch.patch.composition import compose_on_device
from edgepatch.patch.file import Patch
from edgepatch.progress import Progress, published_command, silent
from edgepatch.runtimes import load_runtime, runtime_name
from edgepatch.runtimes.reference import TorchRuntime
from edgepatch.runtimes.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FRONTS = (0, 128, 512, 1500)
"""Tokens in front of the prompt."""

FRONT_KIND = "toxic"
"""As where the gain behind text is measured."""

NUM_TOKENS = 8
"""Last tokens of a prompt that are watched. Each prompt has so many, so none of them is text in front."""

BARE, PINNED, MOVING, TOGETHER = "bare", "pinned", "moving", "all together"
COLUMNS = ("patch", "anchoring", "in front", "on the seed, %", "largest, %", "in layer", "on the first token, %")

Shares = NDArray[np.float32]
"""(..., 2): the part of the attention, from 0 to 1, that goes to the seed's cells together, and to the first token of the text."""


@contextmanager
def watching(model: PreTrainedModel, num_cells: int) -> Iterator[list[list[Shares]]]:
    """Takes down how each layer divides its attention.

    Meanwhile the model computes with Transformers' eager attention, which alone gives its weights (softmax in float32).

    Args:
        model: each of its L layers has an attention called ``self_attn``.
        num_cells: P, the seed's cells, which come first in the cache; 0 for the bare model.

    Yields:
        L lists, each of which gets shares (T, 2) in every forward pass of one row of T tokens: means over the heads.

    Raises:
        InputError: a layer has no such attention, or it gives no weights.
    """
    modules = [module for name, module in model.named_modules() if name.endswith(".self_attn")]
    kind, num_layers = model.config.model_type, int(text_config(model.config).num_hidden_layers)
    if len(modules) != num_layers:
        raise InputError(
            f"{kind}: expected attention in each of {num_layers} layers, found it in {len(modules)}",
            hint="attention is watched in models without recurrent layers, whose attention Transformers calls self_attn",
        )
    layers: list[list[Shares]] = [[] for _ in modules]

    def take_down(layer: int, weights: Any) -> None:
        if weights is None:
            raise InputError(f"{kind}: layer {layer}: its attention gives no weights")
        of_tokens = weights[0].float().mean(dim=0).cpu().numpy()  # (T, P + text)
        layers[layer].append(np.stack([of_tokens[:, :num_cells].sum(axis=1), of_tokens[:, num_cells]], axis=1))

    own = model.config._attn_implementation
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, own)
        model.set_attn_implementation("eager")
        for number, module in enumerate(modules):
            hook = module.register_forward_hook(lambda _, __, output, layer=number: take_down(layer, output[1]))
            stack.callback(hook.remove)
        yield layers


def shares_of(runtime: Session, tokens: Sequence[int]) -> Shares:
    """(L, 2) shares behind the active patch: means over the heads and the last tokens of a text, all but its first at most.

    Raises:
        InputError: the runtime is not PyTorch's, its model cannot be watched, or the text does not fit the context.
    """
    backend = runtime.backend
    if not isinstance(backend, TorchRuntime):
        raise InputError(f"attention: expected a Transformers folder, found a model that {backend.name} runs")
    # What stands in front is evaluated unwatched: eager attention is slow there, and the session reuses what texts have in common.
    runtime.logits_of_last(tokens[: max(1, len(tokens) - NUM_TOKENS)])
    with watching(backend.model, backend.num_virtual_tokens) as layers:
        runtime.logits_of_last(tokens)
    return np.stack([np.concatenate(parts).mean(axis=0) for parts in layers])


@dataclass(frozen=True)
class Arm:
    """A patch, standing in one way.

    Attributes:
        name: in the rows.
        anchoring: "pinned" or "moving"; "" for the bare model.
        patch: with that anchoring; ``None`` for the bare model.
    """

    name: str
    anchoring: str
    patch: Patch | None


def arms_of(patches: Sequence[Patch]) -> list[Arm]:
    """The bare model, each patch alone, and several side by side: pinned, and as they move where they do.

    Raises:
        InputError: several cannot stand side by side.
        MismatchError: they are for different bases.
    """
    named = {f"{patch.name} {patch.version}": patch for patch in patches}
    if len(patches) > 1:
        named[TOGETHER] = compose_on_device(patches)
    arms = [Arm(BARE, "", None)]
    for name, patch in named.items():
        # What the canary expects is true of the patch's own anchoring alone.
        arms.append(Arm(name, PINNED, replace(patch, anchoring=None, canary=None)))
        if patch.anchoring is not None:
            arms.append(Arm(name, MOVING, replace(patch, canary=None)))
    return arms


def run(
    model: Path,
    patches: Sequence[Patch],
    work: Path,
    data: Path | None = None,
    fronts: Sequence[int] = FRONTS,
    num_prompts: int = 6,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Watches every patch in every way of standing, on PyTorch in float32.

    Args:
        model: Transformers folder, or a GGUF file, whose weights are dequantized.
        patches: each of which must pass its canary.
        work: gets the Transformers folder of a GGUF file; one that is there is not made again.
        data: folder of the public data sets; ``None`` puts texts that ship with edgepatch in front.
        fronts: tokens in front of the prompts.
        num_prompts: of ours; means are taken over them.
        progress: told of forms, arms and prompts.

    Returns:
        ``rows``: patch, anchoring, tokens in front, layer from 0, and both shares.

    Raises:
        InputError: something cannot be used, or the context has no room for a text.
        MismatchError: a patch is for another model.
        InactivePatchError: a patch does not work on this model.
    """
    arms = arms_of(patches)
    rows = list[dict[str, Any]]()
    with load_runtime(_folder_of(model, work, progress), list(patches) or None) as runtime:
        prompts = _texts(runtime, data, sorted(set(fronts)), num_prompts)
        for number, arm in enumerate(arms):
            progress("arms", number, len(arms))
            runtime.swap(arm.patch)
            measured: dict[int, list[Shares]] = {front: [] for front in prompts[0]}
            for done, texts in enumerate(prompts):
                progress("prompts", done, len(prompts))
                for front, tokens in texts.items():
                    measured[front].append(shares_of(runtime, tokens))
            progress("prompts", len(prompts), len(prompts))
            rows += [row for front, shares in measured.items() for row in _rows(arm, front, shares)]
        progress("arms", len(arms), len(arms))
    return {
        "command": published_command(),
        "environment": environment(),
        "model": model.name,
        "settings": {
            "runtime": "torch F32",
            "front_kind": FRONT_KIND,
            "front_source": "data" if data else "own",
            "last_tokens": NUM_TOKENS,
        },
        "patches": [_described(patch) for patch in patches],
        "rows": rows,
    }


def _folder_of(model: Path, work: Path, progress: Progress) -> Path:
    kind = runtime_name(model)
    if kind == "torch":
        return model
    columns = [given_column(model, kind, ""), *made_columns(model, ["torch"])]
    return columns[-1].path(make_forms(model, columns, work, progress))


def _texts(runtime: Session, data: Path | None, fronts: Sequence[int], num_prompts: int) -> list[dict[int, list[int]]]:
    """Of each prompt: tokens in front -> token ids, the longer behind the shorter, which they begin as."""
    room = runtime.context_length - ROOM
    if not fronts or not 0 <= fronts[0] <= fronts[-1] <= room:
        raise InputError(
            f"tokens in front: expected 0 to {room}, found {', '.join(map(str, fronts)) or 'none'}",
            hint="the model's context must hold all patches, the text in front and a prompt",
        )
    probe = ToxicityProbe(choose_texts(data, num_prompts), SampleConfig())
    places = {front: Place(front, FRONT_KIND if front else "") for front in fronts}
    return [
        {front: probe.tokens(runtime, place, number) for front, place in places.items()}
        for number in range(len(probe.texts.prompts))
    ]


def _rows(arm: Arm, front: int, measured: Sequence[Shares]) -> Iterator[dict[str, Any]]:
    """A row for each layer, from shares (L, 2) of each prompt."""
    for layer, (of_seed, of_first) in enumerate(np.mean(measured, axis=0).tolist()):
        yield {
            "patch": arm.name,
            "anchoring": arm.anchoring,
            "front_tokens": front,
            "layer": layer,
            "share_of_seed": round(of_seed, 6),
            "share_of_first": round(of_first, 6),
            "num_prompts": len(measured),
        }


def _described(patch: Patch) -> dict[str, Any]:
    return {
        "name": patch.name,
        "version": patch.version,
        "digest": patch.digest,
        "num_virtual_tokens": patch.num_virtual_tokens,
        "anchoring": patch.anchoring.as_dict() if patch.anchoring else None,
    }


def table(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For people, a line for each patch, way to stand and distance: the mean over the layers, and the layer with the largest share."""
    places = dict[tuple[str, str, int], list[dict[str, Any]]]()
    for row in document["rows"]:
        places.setdefault((row["patch"], row["anchoring"], row["front_tokens"]), []).append(row)
    return [(*map(str, place), *_figures(layers)) for place, layers in places.items()]


def _figures(layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    of_seed, of_first = (float(np.mean([row[name] for row in layers])) for name in ("share_of_seed", "share_of_first"))
    most = max(layers, key=lambda row: row["share_of_seed"])
    is_bare = not most["share_of_seed"]
    seed = ("", "", "") if is_bare else (_percent(of_seed), _percent(most["share_of_seed"]), str(most["layer"]))
    return (*seed, _percent(of_first))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
