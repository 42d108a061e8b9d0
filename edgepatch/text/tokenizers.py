"""Text to tokens for runtimes whose library brings no tokenizer (PyTorch, ONNX), and chat templates for all.

A chat template writes special tokens, which open and close turns, around what people wrote. What people wrote is text, also where it
spells such a token: ``encode_chat`` keeps the two apart, so that no message can end its own turn or speak for another role.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from edgepatch.errors import EdgepatchError, InputError, MissingExtraError
from edgepatch.files.pretrained import load_pretrained
from edgepatch.files.strict_json import read_json
from edgepatch.tensors import tokenizer_digest
from edgepatch.text.end_tokens import ends_by_name
from edgepatch.text.limits import DIGITS, TextBound, require_short_runs, utf8
from edgepatch.text.messages import Message, plain_messages, plain_tools, texts_in
from edgepatch.text.probes import TokenizerProbe, probe_tokenizer
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions, ChatTemplate
from edgepatch.text.tokenizer_bounds import looks_through_numbers, measure_bound
from edgepatch.text.vocabularies import ByteDecoder, piece_reader, token_bytes

MARKER = re.compile(r"[<\[].*\w.*[>\]]", re.DOTALL)
"""How added tokens look that may open and close something, unlike those for blanks and line ends."""


MAX_DIGITS = 2**10
"""In a row, where an expression looks ahead through them: 16,000 take 2 s."""


class Encoder(Protocol):
    """Token ids of a text."""

    def __call__(self, text: str, *, trusted: bool) -> list[int]: ...


@dataclass(frozen=True)
class AddedTokens:
    """The texts that a tokenizer reads as single tokens before anything else.

    Attributes:
        special: of tokens that are read only in trusted text.
        other: of tokens that are read in any text.
    """

    special: tuple[str, ...]
    other: tuple[str, ...] = ()


def encode_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    added: AddedTokens,
    encode: Encoder,
    tools: Sequence[Mapping[str, Any]] | None = None,
    require_fit: Callable[[str], None] = lambda text: None,
    options: ChatOptions = PLAIN_CHAT,
) -> list[int]:
    """Token ids of a conversation, in which special tokens come from the template alone.

    Where no message spells a special token, these are the ids of the rendered text as it is. Else each such spelling is broken
    after its first character by a mark that nobody can guess; the rendered text is cut at the marks and encoded part by part.
    Text that the template takes apart and joins anew is beyond this: no template in use does so.

    Args:
        template: the model's chat template.
        messages: the conversation.
        added: the texts that ``encode`` reads as single tokens.
        encode: token ids of a text without BOS; special tokens spelled in it are read as such if it is trusted.
        tools: tool objects in OpenAI's form.
        require_fit: refuses a rendered text by its size.
        options: how it is written.

    Raises:
        InputError: as in ``ChatTemplate.write``.
    """
    source = template.default + template.tool_use
    mark, fence = secrets.token_hex(16), secrets.token_hex(16)
    # A system prompt may explain the model's markers of calls and thoughts, and what the model wrote may hold them.
    markers = [*added.special, *(token for token in added.other if MARKER.fullmatch(token) and token in source)]
    guarded = [
        _break_up(message, markers if message["role"] in ("user", "tool") else added.special, mark, fence)
        for message in plain_messages(messages)
    ]
    text = template.write(guarded, _break_up(plain_tools(tools), added.special, mark, fence), options)
    # A template may change the case of a text. Only a special token of one character stands between fences.
    first, *parts = re.split(f"{mark}|{fence}(.){fence}", text, flags=re.DOTALL | re.IGNORECASE)
    require_fit("".join(part for part in (first, *parts) if part))
    ids = encode(first, trusted=True)
    for number, part in enumerate(parts):
        ids += _encode_within(part, number % 2 == 1, encode) if part else []
    return ids


def _break_up(value: Any, tokens: Sequence[str], mark: str, fence: str) -> Any:
    """A copy of nested lists and objects with a mark after the first character of each token that a text spells."""
    whole = "\0".join(texts_in(value))
    spelled = [token for token in tokens if token and token in whole]
    if not spelled:
        return value
    start = re.compile(f"(?={'|'.join(map(re.escape, spelled))})(.)", re.DOTALL)

    def break_up(value: Any) -> Any:
        if isinstance(value, str):
            return start.sub(lambda match: fence + match[1] + fence if match[1] in spelled else match[1] + mark, value)
        if isinstance(value, Mapping):
            return {break_up(key): break_up(item) for key, item in value.items()}
        return [break_up(item) for item in value] if isinstance(value, list) else value

    return break_up(value)


def _encode_within(text: str, trusted: bool, encode: Encoder) -> list[int]:
    """Token ids of a text that follows on another: without the blank that some tokenizers put in front of every text."""
    guard = "\0"
    lead, whole = encode(guard, trusted=trusted), encode(guard + text, trusted=trusted)
    return whole[len(lead) :] if lead and whole[: len(lead)] == lead else encode(text, trusted=trusted)


def _read_definition(folder: Path) -> Any:
    """The tokenizer of ``tokenizer.json``; where there is only ``tokenizer.model``, what Transformers makes of it."""
    from tokenizers import Tokenizer  # an extra of the runtimes

    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if model.is_file() and not file.is_file():
        return _read_sentencepiece(folder, model)
    return Tokenizer.from_str(file.read_text(encoding="utf-8"))


def _read_sentencepiece(folder: Path, file: Path) -> Any:
    """A SentencePiece model as Transformers converts it, with the model's own treatment of spaces."""
    from tokenizers import decoders, normalizers

    try:
        from sentencepiece import SentencePieceProcessor
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(error.name or "sentencepiece", "convert") from None
    model = SentencePieceProcessor(model_file=str(file))
    tokenizer = load_pretrained(AutoTokenizer, folder).backend_tokenizer
    space, probe = "\u2581", "\ufb01  a 12 \U0001f642"  # a ligature, which most normalizations change
    steps: list[Any] = [normalizers.Replace(" ", space)]
    parts: list[Any] = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.Normalize(probe).startswith(
        space
    ):  # Transformers drops this space in some classes, and moves it in others
        steps.insert(0, normalizers.Prepend(space))
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(steps), None
    tokenizer.decoder = decoders.Sequence(parts)
    if list(tokenizer.encode(probe, add_special_tokens=False).ids) != list(model.Encode(probe)):
        raise InputError(
            f"{file} is of a kind that Transformers reads otherwise", hint="save the tokenizer as tokenizer.json"
        )
    return tokenizer


class FolderTokenizer:
    """The tokenizer of a Transformers or ONNX folder: ``tokenizer.json`` read with the tokenizers library.

    Args:
        folder: holds ``tokenizer.json`` (or SentencePiece's ``tokenizer.model``, where Transformers is installed) and
            ``tokenizer_config.json``.

    Raises:
        InputError: a file is missing or unreadable.
        MissingExtraError: tokenizers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = _read_definition(folder)
            config = read_json(folder / "tokenizer_config.json", hint="name a complete model folder", infinite=True)
            generation = folder / "generation_config.json"
            model = folder / "config.json"
            settings = [read_json(path, infinite=True) for path in (generation, model) if path.is_file()]
            template_file = folder / "chat_template.jinja"
            template = template_file.read_text(encoding="utf-8") if template_file.is_file() else ""
        except OSError as error:
            raise InputError(
                f"cannot read {error.filename}: {error.strerror}", hint="name a complete model folder"
            ) from error
        except EdgepatchError:
            raise
        except ModuleNotFoundError as error:
            extra = "train" if next(folder.glob("*.safetensors"), None) else "onnx"
            raise MissingExtraError(error.name or "tokenizers", extra) from None
        except Exception as error:  # the tokenizers library raises bare Exception for a broken file
            raise InputError(
                f"the tokenizer in {folder} cannot be read: {error}", hint="save the tokenizer again"
            ) from error
        added = list(self._tokenizer.get_added_tokens_decoder().values())
        self._added = AddedTokens(
            tuple(token.content for token in added if token.special),
            tuple(token.content for token in added if not token.special),
        )
        self._encoding = threading.Lock()  # whether special tokens are read is a state of the tokenizer
        self._special_in_normalized = [token.content for token in added if token.special and token.normalized]
        bos, eos = (self._token_text(config.get(k)) for k in ("bos_token", "eos_token"))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = {vocabulary.get(eos), vocabulary.get("<|im_end|>")}
        for values in settings:
            ids = values.get("eos_token_id")
            ends |= set(ids if isinstance(ids, list) else [ids])
        self.configured_end_ids: frozenset[int] = frozenset(i for i in ends if i is not None)
        self.end_token_ids = self.configured_end_ids | ends_by_name(vocabulary)
        self.special_tokens = {token.content: vocabulary[token.content] for token in added if token.special}
        named = named_templates(config.get("chat_template")) | _template_files(folder)
        texts = tuple(str(self._tokenizer.id_to_token(i)) for i in sorted(self.end_token_ids))
        self.template = ChatTemplate(template or named.get("default", ""), named.get("tool_use", ""), bos, eos, texts)

    @staticmethod
    def _token_text(value: Any) -> str:
        return value["content"] if isinstance(value, dict) else (value or "")

    @property
    def definition(self) -> str:
        """What ``tokenizer.json`` says, or would say."""
        return str(self._tokenizer.to_str())

    @property
    def vocabulary(self) -> list[str]:
        """Tokens in order of their ids."""
        by_id = sorted((i, token) for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items())
        return [token for _, token in by_id]

    @property
    def chat_template(self) -> str:
        """The chat template's text; "" where there is none."""
        return self.template.default

    @property
    def chat_template_digest(self) -> str:
        """SHA-256 of the chat template, or "" where there is none."""
        return self.template.digest

    @property
    def digest(self) -> str:
        """``tensors.tokenizer_digest`` of the vocabulary."""
        return tokenizer_digest(self.vocabulary)

    def encode(self, text: str, bos: bool = True, trusted: bool = False) -> list[int]:
        """Token ids of plain text; with ``bos``, BOS in front where the model wants one.

        The names of special tokens within the text are text, because only a chat template may open and close turns; in
        ``trusted`` text, rendered by ourselves, they are the tokens.
        """
        utf8(text)
        require_short_runs(text)
        if self._looks_through_numbers:
            require_short_runs(text, DIGITS, MAX_DIGITS)
        with self._encoding:
            self._tokenizer.encode_special_tokens = not trusted
            try:
                # A batch, though of one: other threads run meanwhile.
                return list(self._tokenizer.encode_batch([text], add_special_tokens=bos)[0].ids)
            except BaseException as error:
                # The library's panics derive from BaseException alone, as what the user does derives from KeyboardInterrupt.
                if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                    raise InputError(f"the text cannot be tokenized: {error}", hint="shorten it") from None
                raise
            finally:
                self._tokenizer.encode_special_tokens = False

    def probe(self) -> TokenizerProbe:
        """What it makes of some texts; special tokens of the chat template among them."""
        special = [token for token in self._added.special if token in self.template.default]
        return probe_tokenizer(self.encode, special, self.template.tools_digest)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        require_fit: Callable[[str], None] = lambda text: None,
        options: ChatOptions = PLAIN_CHAT,
        template: ChatTemplate | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, or another; special tokens that a message spells are text.

        Raises:
            InputError: the model has no chat template, or it refuses the messages, or ``require_fit`` refuses their text.
        """
        self._refuse_disguised([messages, tools])
        encode = partial(self.encode, bos=False)
        return encode_chat(template or self.template, messages, self._added, encode, tools, require_fit, options)

    def turn_tokens(self) -> tuple[int, ...]:
        """The special token that opens the assistant's turn in the chat template; empty where it opens with plain text, or none is there.

        The opening is what two conversations of different last messages end in alike.
        """
        try:
            first, second = (self.encode_chat([{"role": "user", "content": text}]) for text in ("Red.", "7 blue birds"))
        except InputError:
            return ()
        special = {self._tokenizer.token_to_id(name) for name in self._added.special} - self.end_token_ids
        opening: list[int] = []
        for one, other in zip(reversed(first), reversed(second), strict=False):
            if one != other:
                break
            opening.append(one)
        return next(((token,) for token in reversed(opening) if token in special), ())

    @cached_property
    def _looks_through_numbers(self) -> bool:
        return looks_through_numbers(json.loads(self.definition))

    @cached_property
    def bound(self) -> TextBound:
        """How many bytes of text a token stands for."""
        return measure_bound(json.loads(self.definition))

    def _refuse_disguised(self, messages: Any) -> None:
        """Some special tokens are looked for in normalized text, where another spelling may become one."""
        if not self._special_in_normalized or self._tokenizer.normalizer is None:
            return
        for text in texts_in(messages):
            normalized = self._tokenizer.normalizer.normalize_str(text)
            hidden = next(
                (token for token in self._special_in_normalized if token in normalized and token not in text), None
            )
            if hidden is not None:
                raise InputError(f"a message spells the special token {hidden} in disguise", hint="take it out")

    def token_bytes(self, vocab_size: int) -> list[bytes]:
        """The bytes of each token in order of its id; none for special tokens and for rows of the model without a token.

        Raises:
            InputError: the tokenizer is of a kind whose tokens have no bytes of their own.
        """
        texts = token_bytes(self._tokenizer)
        return texts + [b""] * (vocab_size - len(texts))

    def new_decoder(self) -> Callable[[int], str]:
        """A function that takes one token after the other and returns the text that each completes; it never fails."""
        return ByteDecoder(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        """A token's own bytes; none for special tokens and for ids without a token."""
        if token not in self._pieces:
            self._pieces[token] = self._read_piece(token)
        return self._pieces[token]

    def _read_piece(self, token: int) -> bytes:
        if self._reader is None:  # words whose blanks are not in the vocabulary: each is read alone
            return str(self._tokenizer.decode([token], skip_special_tokens=True)).encode("utf-8", "replace")
        piece = self._tokenizer.id_to_token(token)
        if piece is None or piece in self.special_tokens:
            return b""
        return piece.encode("utf-8") if piece in self._added.other else self._reader(piece)

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _reader(self) -> Callable[[str], bytes] | None:
        try:
            return piece_reader(json.loads(self.definition)["decoder"])
        except InputError:
            return None


def named_templates(value: Any) -> dict[str, str]:
    """Name -> template: a folder may hold one, or several by name."""
    if isinstance(value, str):
        return {"default": value}
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def default_template(value: Any) -> str:
    """Of several templates by name the one in general use."""
    return named_templates(value).get("default", "")


def _template_files(folder: Path) -> dict[str, str]:
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files if file.is_file()}
