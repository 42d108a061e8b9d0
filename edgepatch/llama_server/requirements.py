"""What an unmodified llama-server needs to serve a patch: labels for the seeded positions, a chat template, its start flags.

llama-server reuses a slot's cache as far as the *token ids* of a prompt agree with those that the cache was filled with. A seed
has no tokens, so its P positions are labelled with a token that no text contains, and every prompt starts with the same labels.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import InputError
from edgepatch.text.chat_templates import render_chat_template

PLAIN_TEXT = re.compile(r"[^\s'\"\\{}%#]+")
"""What may stand in a string of every Jinja engine as it is."""

SLOT_FOLDER, SEED_FILE, TEMPLATE_FILE = "slots", "seed.bin", "chat_template.jinja"
SAMPLE = [{"role": "user", "content": "Hello"}]
ALTERNATING = [*SAMPLE, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "How are you?"}]


@dataclass(frozen=True)
class Labels:
    """The token ids that stand for the seeded positions.

    Attributes:
        placeholder: the repeated token.
        text: its name.
        bos: BOS's id where the tokenizer puts it in front of every text (it is then the first label), else ``None``.
        count: P.
    """

    placeholder: int
    text: str
    bos: int | None
    count: int

    @property
    def ids(self) -> list[int]:
        """P token ids."""
        front = [] if self.bos is None else [self.bos]
        return front + [self.placeholder] * (self.count - len(front))

    @property
    def template_front(self) -> str:
        """Jinja that writes the labels; without BOS, which llama-server puts in front of every prompt itself."""
        repeats = self.count - (self.bos is not None)
        # llama-server takes one leading BOS off: at P = 1 that would be the conversation's own.
        return f"{{{{ '{self.text}' * {repeats} }}}}" if repeats else "{{ bos_token }}"


def choose_labels(vocabulary: Vocabulary, num_virtual_tokens: int, template: str) -> Labels:
    """Labels of which llama.cpp's tokenizer makes one token each, and which the chat template does not use.

    Args:
        vocabulary: the model's.
        num_virtual_tokens: P.
        template: the model's chat template.

    Raises:
        InputError: the vocabulary has no such token.
    """
    bos = vocabulary.bos if vocabulary.adds_bos else None
    for token in vocabulary.spare_tokens():
        text = vocabulary.text(token)
        if PLAIN_TEXT.fullmatch(text) and text not in template:
            labels = Labels(token, text, bos, num_virtual_tokens)
            count = num_virtual_tokens - (bos is not None)
            if vocabulary.tokenize(text * 3) == [token] * 3 and _starts(
                vocabulary.tokenize(text * count, True), labels.ids
            ):
                return labels
    raise InputError(
        "the vocabulary has no spare special token for the seeded positions: expected a control, reserved or unused token "
        "that the chat template does not use",
        hint="use `edgepatch serve`, which needs none",
    )


def _starts(tokens: list[int], front: list[int]) -> bool:
    return tokens[: len(front)] == front


def patched_template(vocabulary: Vocabulary, labels: Labels, template: str) -> str:
    """The chat template with the labels in front, proven by llama.cpp's tokenizer.

    Raises:
        InputError: there is no template, or its conversations do not come out as labels and the same tokens as before.
    """
    if not template:
        raise InputError("the model has no chat template", hint="name one with --chat-template")
    patched = labels.template_front + template
    for messages in (SAMPLE, ALTERNATING):
        expected = labels.ids + vocabulary.tokenize(_render(vocabulary, template, messages))
        actual = prompt_ids(vocabulary, _render(vocabulary, patched, messages))
        if not _starts(actual, expected):
            raise InputError(
                f"chat template: expected {labels.count} labels and {len(expected) - labels.count} tokens of the conversation, "
                f"found {len(actual)} other tokens",
                hint="the template changes what stands in front of it; use `edgepatch serve`",
            )
    return patched


def _render(vocabulary: Vocabulary, template: str, messages: list[dict[str, str]]) -> str:
    return render_chat_template(template, messages, vocabulary.text(vocabulary.bos), vocabulary.text(vocabulary.eos))


def prompt_ids(vocabulary: Vocabulary, rendered: str) -> list[int]:
    """Token ids that llama-server evaluates for a rendered chat template."""
    bos = vocabulary.text(vocabulary.bos)
    if vocabulary.adds_bos and bos:
        rendered = rendered.removeprefix(bos)
    return vocabulary.tokenize(rendered, around=True)


@dataclass(frozen=True)
class ServerSettings:
    """How llama-server must be started for a slot file to fit, and to keep it.

    Attributes:
        model: GGUF file, as given.
        context_length: positions of one slot, the patch's included.
        kv_type: type of the KV cache.
        flash_attention: whether it is on; it decides the order of the cached values.
        num_slots: conversations at a time.
        sliding_window: whether the model has one.
    """

    model: str
    context_length: int
    kv_type: str = "f16"
    flash_attention: bool = True
    num_slots: int = 1
    sliding_window: bool = False

    def flags(self, folder: str) -> list[str]:
        """Arguments of llama-server.

        Args:
            folder: the export folder, as the server's process names it.
        """
        flags = ["--model", self.model, "--host", "127.0.0.1", "--parallel", str(self.num_slots)]
        # One stream, whatever the number of slots; with room for all, or a long conversation purges the other slots.
        flags += [
            "--kv-unified",
            "--kv-unified-per-slot" if self.num_slots > 1 else "--ctx-size",
            str(self.context_length),
        ]
        flags += ["--flash-attn", "on" if self.flash_attention else "off"]
        flags += ["--cache-type-k", self.kv_type, "--cache-type-v", self.kv_type]
        flags += [
            "--jinja",
            "--chat-template-file",
            f"{folder}/{TEMPLATE_FILE}",
            "--slot-save-path",
            f"{folder}/{SLOT_FOLDER}",
        ]
        # The prompt cache in memory hands out whole conversations, also one that was evaluated before the seed was there.
        flags += ["--cache-ram", "0", "--no-cache-idle-slots", "--no-context-shift", "--cache-reuse", "0"]
        return [*flags, "--swa-full"] if self.sliding_window else flags


def start_script(settings: ServerSettings) -> str:
    """A shell script that starts llama-server; more arguments are passed on."""
    arguments = settings.flags("$here")
    words = [f'"{word}"' if word.startswith("$here") else shlex.quote(word) for word in arguments]
    return (
        "#!/bin/sh\n"
        "# Starts llama-server for the patch in this folder; restore.sh then puts the patch into its slots.\n"
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)\n'
        f'exec "${{LLAMA_SERVER:-llama-server}}" {" ".join(words)} "$@"\n'
    )


def restore_script(num_slots: int) -> str:
    """A shell script that restores the patch into every slot; it fails when one does not take it."""
    slots = " ".join(str(slot) for slot in range(num_slots))
    body = f'{{"filename": "{SEED_FILE}"}}'
    return (
        "#!/bin/sh\n"
        "# Puts the patch into every slot: after each start of the server, and before each new conversation.\n"
        "set -eu\n"
        "url=${1:-http://127.0.0.1:8080}\n"
        "header='Accept: application/json'\n"
        'if [ -n "${LLAMA_API_KEY:-}" ]; then header="Authorization: Bearer $LLAMA_API_KEY"; fi\n'
        f"for slot in {slots}; do\n"
        "    # The key goes through a pipe: arguments are visible to other users of the machine.\n"
        "    printf '%s\\n' \"$header\" | curl --fail-with-body --silent --show-error -H @- \\\n"
        f"        -H 'Content-Type: application/json' -d '{body}' \"$url/slots/$slot?action=restore\"\n"
        "    echo\n"
        "done\n"
    )
