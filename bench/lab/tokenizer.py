"""The lab model's tokenizer: byte-level BPE (GPT-2's pre-tokenizer, so that llama.cpp reads it as is) and ChatML."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
BOS, EOS, TURN, END_OF_TURN, PAD = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(8))
"""Tokens that no text contains: placeholders for clients that can hold a place only with a token."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], context_length: int, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the same texts in the same order give the same file.

    Args:
        texts: training texts.
        context_length: T, the model's longest sequence, stored as ``model_max_length``.
        vocab_size: V.

    Returns:
        A tokenizer that puts BOS in front of every text, with ids 0..4 for PAD, BOS, EOS and the turn markers.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, TURN, END_OF_TURN, *RESERVED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN, END_OF_TURN, *RESERVED],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def render_chat(messages: list[dict[str, str]]) -> str:
    """The chat template without BOS, as training text (a test holds it equal to the template)."""
    return "".join(f"{TURN}{m['role']}\n{m['content']}{END_OF_TURN}\n" for m in messages)
