"""Text to tokens for runtimes whose library brings no tokenizer (PyTorch, ONNX), and chat templates for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.tensors import tokenizer_digest


def render_chat_template(template: str, messages: Sequence[dict[str, str]], bos_token: str, eos_token: str) -> str:
    """Renders a model's Jinja chat template, with the opening of the assistant's turn, as Transformers does.

    Raises:
        InputError: the template refuses the messages or is broken.
    """
    from jinja2 import TemplateError  # an extra of the runtimes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token
        )
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error


class FolderTokenizer:
    """The tokenizer of a Transformers or ONNX folder: ``tokenizer.json`` read with the tokenizers library.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        InputError: a file is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer  # an extra of the runtimes

        try:
            self._tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            generation = folder / "generation_config.json"
            model = folder / "config.json"
            settings = [json.loads(p.read_text(encoding="utf-8")) for p in (generation, model) if p.is_file()]
            template_file = folder / "chat_template.jinja"
            template = template_file.read_text(encoding="utf-8") if template_file.is_file() else ""
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}", hint="name a complete model folder") from error
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise InputError(f"the tokenizer in {folder} cannot be read: {error}", hint="save the tokenizer again") from error
        self._template: str = template or config.get("chat_template") or ""
        self._bos, self._eos = (self._token_text(config.get(k)) for k in ("bos_token", "eos_token"))
        ends = {self._tokenizer.token_to_id(self._eos), self._tokenizer.token_to_id("<|im_end|>")}
        for values in settings:
            ids = values.get("eos_token_id")
            ends |= set(ids if isinstance(ids, list) else [ids])
        self.end_token_ids: frozenset[int] = frozenset(i for i in ends if i is not None)

    @staticmethod
    def _token_text(value: Any) -> str:
        return value["content"] if isinstance(value, dict) else (value or "")

    @property
    def vocabulary(self) -> list[str]:
        """Tokens in order of their ids."""
        by_id = sorted((i, token) for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items())
        return [token for _, token in by_id]

    @property
    def digest(self) -> str:
        """``tensors.tokenizer_digest`` of the vocabulary."""
        return tokenizer_digest(self.vocabulary)

    def encode(self, text: str, bos: bool = True, trusted: bool = False) -> list[int]:
        """Token ids of plain text; with ``bos``, BOS in front where the model wants one.

        The names of special tokens within the text are text, because only a chat template may open and close turns; in
        ``trusted`` text, rendered by ourselves, they are the tokens.
        """
        self._tokenizer.encode_special_tokens = not trusted
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=bos).ids)
        finally:
            self._tokenizer.encode_special_tokens = False

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            InputError: the model has no chat template.
        """
        if not self._template:
            raise InputError("the model has no chat template", hint="pass plain text or token ids instead of messages")
        text = render_chat_template(self._template, messages, self._bos, self._eos)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def new_decoder(self) -> Callable[[int], str]:
        """A function that takes one token after the other and returns the text that each completes."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""
