"""Tokens that end a reply by their names, on every runtime: llama.cpp ends on them whatever a file says, and so do we everywhere."""

from __future__ import annotations

from collections.abc import Mapping

END_NAMES = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "[e~["),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    }
)
"""Tokens that llama.cpp takes for the end by name."""

FILLING_NAMES = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
"""Tokens between files of code, which end a reply, too. llama.cpp takes one of each row; which one of several is left to chance."""


def ends_by_name(ids: Mapping[str, int]) -> frozenset[int]:
    """Ids of the tokens of a vocabulary that end a reply by their names.

    Args:
        ids: token -> id.
    """
    present = ([name for name in names if name in ids] for names in FILLING_NAMES)
    alone = {names[0] for names in present if len(names) == 1}
    ends = {name: ids[name] for name in END_NAMES | alone if name in ids}
    if {"<|return|>", "<|call|>", "<|end|>"} <= set(ends) or {"<|calls|>", "<|flush|>", "<|end|>"} <= set(ends):
        del ends["<|end|>"]  # there it only closes one part of a reply
    if "<|tool_response>" in ends:
        ends.pop("</s>", None)  # Gemma 4 has it as a normal token
    return frozenset(ends.values())
