"""Where the seed of a training stands: as the configuration says, or as its model allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgepatch.errors import InputError
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.training.config import USUAL_BLOCK, USUAL_FRONT, TrainConfig


def asked_anchoring(config: TrainConfig, tokenizer: FolderTokenizer, model: Path) -> Anchoring | None:
    """Where the seed is to stand if the model's seeds can move; it takes no weights to know.

    Args:
        config: may leave block and turns open.
        tokenizer: of the model.
        model: for the message.

    Raises:
        InputError: turns are asked for by name, and the chat template opens none with a special token.
    """
    block = USUAL_BLOCK if config.block is None else config.block
    turn_tokens = () if config.turns is False else tokenizer.turn_tokens()
    if config.turns and not turn_tokens:
        template = tokenizer.chat_template
        raise InputError(
            f"{model}: turns: expected a chat template that opens a turn with a special token, "
            f"found {f'{template!r:.120}' if template else 'no chat template'}",
            hint="leave turns out; with a block the seed moves every so many tokens",
        )
    return Anchoring(block, turn_tokens) if block or turn_tokens else None


def settled(config: TrainConfig, anchoring: Anchoring | None, room: int) -> TrainConfig:
    """The configuration with what it leaves open filled in.

    Args:
        config: may leave block, turns and front_tokens open.
        anchoring: where the seed stands.
        room: tokens of text in front that the model's context has room for.
    """
    front_tokens = config.front_tokens
    if front_tokens is None:
        front_tokens = min(USUAL_FRONT, room) if anchoring else 0
    block, turns = (anchoring.block, bool(anchoring.turn_tokens)) if anchoring else (0, False)
    return replace(config, block=block, turns=turns, front_tokens=front_tokens)
