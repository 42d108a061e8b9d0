"""What an unmodified llama-server needs to serve a patch: a label for the seeded cells, and its start flags.

llama-server reuses a slot's cache as far as the *token ids* of a prompt agree with those that the cache was filled with, and counts one
position a token. A seed has no tokens, so its cells stand under the label of a token that every prompt begins with: BOS, or the header
of a chat template. Nothing is put in front of a prompt, and no position is lost.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import InputError
from edgepatch.text.chat_templates import render_chat_template
from edgepatch.text.messages import Message

SLOT_FOLDER, SEED_FILE, TEMPLATE_FILE = "slots", "seed.bin", "chat_template.jinja"
QUESTION: Message = {"role": "user", "content": "Hello"}
ANSWER: Message = {"role": "assistant", "content": "Hi"}
SYSTEM: Message = {"role": "system", "content": "You are brief."}
REQUIRED: tuple[list[Message], ...] = (
    [QUESTION],
    [{"role": "user", "content": "42 is what?"}],
    [QUESTION, ANSWER, {"role": "user", "content": "How are you?"}],
)
"""Conversations that every chat template takes, begun with different words."""

OPTIONAL: tuple[list[Message], ...] = ([SYSTEM, QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION])
"""Conversations that some templates refuse; llama-server then refuses them too."""


@dataclass(frozen=True)
class Label:
    """The token under which the seed stands: the first of every prompt.

    Attributes:
        token: its id.
        text: its name.
    """

    token: int
    text: str


def choose_label(vocabulary: Vocabulary, template: str) -> Label:
    """The token that every prompt of a model begins with, as llama.cpp's tokenizer makes them.

    Args:
        vocabulary: the model's.
        template: its chat template; "" for none.

    Raises:
        InputError: there is no such token, or no prompt to tell.
    """
    if not template:
        if not vocabulary.adds_bos:
            raise InputError(
                "the model has no chat template, and no token in front of every text",
                hint="name a template with --chat-template",
            )
        return Label(vocabulary.bos, vocabulary.text(vocabulary.bos))
    firsts = dict.fromkeys(_first_token(vocabulary, template, messages) for messages in REQUIRED)
    for messages in OPTIONAL:
        try:
            firsts[_first_token(vocabulary, template, messages)] = None
        except InputError:
            continue
    if len(firsts) > 1:
        names = ", ".join(repr(vocabulary.text(token)) for token in firsts)
        raise InputError(
            f"chat template: expected one token in front of every conversation, found {names}",
            hint="the seed stands under the first token of all prompts; use `edgepatch serve`, which needs none",
        )
    token = next(iter(firsts))
    return Label(token, vocabulary.text(token))


def _first_token(vocabulary: Vocabulary, template: str, messages: list[Message]) -> int:
    names = vocabulary.text(vocabulary.bos), vocabulary.text(vocabulary.eos)
    tokens = prompt_ids(vocabulary, render_chat_template(template, messages, *names))
    if not tokens:
        raise InputError(
            "chat template: expected a prompt, found an empty one", hint="name another with --chat-template"
        )
    return tokens[0]


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
        context_length: positions of one slot; the seed takes none of them, but cells beside them.
        num_virtual_tokens: P.
        kv_type: type of the KV cache.
        flash_attention: whether it is on; it decides the order of the cached values.
        num_slots: conversations at a time.
        sliding_window: whether the model has one.
        has_template: whether the folder has a chat template that is used instead of the model's own.
    """

    model: str
    context_length: int
    num_virtual_tokens: int
    kv_type: str = "f16"
    flash_attention: bool = True
    num_slots: int = 1
    sliding_window: bool = False
    has_template: bool = False

    def flags(self, folder: str) -> list[str]:
        """Arguments of llama-server.

        Args:
            folder: the export folder, as the server's process names it.
        """
        flags = ["--model", self.model, "--host", "127.0.0.1", "--parallel", str(self.num_slots)]
        # One stream, whatever the number of slots; with room for all, or a long conversation purges the other slots.
        num_cells = (self.context_length + self.num_virtual_tokens) * self.num_slots
        flags += ["--kv-unified", "--kv-unified-per-slot", str(self.context_length), "--ctx-size", str(num_cells)]
        flags += ["--flash-attn", "on" if self.flash_attention else "off"]
        flags += ["--cache-type-k", self.kv_type, "--cache-type-v", self.kv_type]
        flags += ["--jinja", "--slot-save-path", f"{folder}/{SLOT_FOLDER}"]
        flags += ["--chat-template-file", f"{folder}/{TEMPLATE_FILE}"] if self.has_template else []
        # The prompt cache in memory hands out whole conversations, also one that was evaluated before the seed was there.
        flags += ["--cache-ram", "0", "--no-cache-idle-slots", "--no-context-shift", "--cache-reuse", "0"]
        return [*flags, "--swa-full"] if self.sliding_window else flags


def start_script(settings: ServerSettings) -> str:
    """A shell script that starts llama-server; more arguments are passed on.

    On another machine it takes the model that lies in its folder, or the one that ``MODEL`` names.
    """
    model, name = shlex.quote(settings.model), shlex.quote(Path(settings.model).name)
    arguments = replace(settings, model="$model").flags("$here")
    words = [f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in arguments]
    return (
        "#!/bin/sh\n"
        "# Starts llama-server for the patch in this folder; restore.sh then puts the patch into its slots.\n"
        "# The model: the one that MODEL names, else the one of its name in this folder, else the one that it was made for.\n"
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)\n'
        f'usual="$here"/{name}\n'
        f'[ -e "$usual" ] || usual={model}\n'
        "model=${MODEL:-$usual}\n"
        f'exec "${{LLAMA_SERVER:-llama-server}}" {" ".join(words)} "$@"\n'
    )


def restore_script(num_slots: int) -> str:
    """A shell script that restores the patch into every slot; it fails when one does not take it."""
    slots = " ".join(str(slot) for slot in range(num_slots))
    body = f'{{"filename": "{SEED_FILE}"}}'
    return (
        "#!/bin/sh\n"
        "# Puts the patch into every slot: after each start of the server, and after a prompt that did not start with its first token.\n"
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
