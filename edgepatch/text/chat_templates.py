"""Chat templates: programs that come with a model, of whoever made it, rendered in a child with limits of time, memory and size.

Jinja's sandbox keeps a template from reaching Python, not from looping, nesting or doubling a text for ever, and every list of what is
harmless has a gap. So no template runs in this process: a kept child compiles and renders, and whatever happens to it is an error here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from edgepatch.errors import InputError, MissingExtraError
from edgepatch.processes.kept import KeptChild
from edgepatch.text.messages import Message, plain_messages, plain_tools

MAX_TEMPLATE_CHARACTERS = 10**6
"""Of a template; those in use have up to 17,000."""

MAX_RENDERED_CHARACTERS = 16 * 2**20
RENDER_DEADLINE_S = 10.0
"""Of computing time; a conversation of 1,000 messages takes 0.01 to 1.5 s."""

RENDER_MEMORY_BYTES = 512 * 2**20
ERROR_CHARACTERS = 1000
HINT = "use a model with a sound chat template, or pass plain text instead of messages"

_renderer = KeptChild("edgepatch.text.chat_templates:render_here", RENDER_MEMORY_BYTES)


def render_chat_template(
    template: str,
    messages: Sequence[Message],
    bos_token: str,
    eos_token: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Renders a model's Jinja chat template, with the opening of the assistant's turn, as Transformers does.

    Raises:
        InputError: the messages are malformed, or the template refuses them, is broken, or needs more than it may have.
        MissingExtraError: jinja2 is not installed.
    """
    return render(template, plain_messages(messages), bos_token, eos_token, plain_tools(tools))


def render(
    template: str,
    messages: Any,
    bos_token: str,
    eos_token: str,
    tools: Any,
    values: Mapping[str, Any] | None = None,
    opens_turn: bool = True,
) -> str:
    """As ``render_chat_template``, of messages and tools that are plain already.

    Args:
        values: more variables of the template, such as "enable_thinking".
        opens_turn: ends with the opening of the assistant's turn.
    """
    context = {
        **(values or {}),
        "messages": messages,
        "tools": tools,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": opens_turn,
    }
    return str(_ask({"template": template, "context": context}))


@lru_cache(maxsize=8)
def examine(template: str, bos_token: str, eos_token: str, end_texts: tuple[str, ...]) -> Mapping[str, Any]:
    """What a template wants and writes, as ``template_traits.examine_here`` finds by rendering probes.

    Raises:
        InputError: the template is too long, or needs more than it may have.
        MissingExtraError: jinja2 is not installed.
    """
    request = {"template": template, "probe": [bos_token, eos_token, list(end_texts)]}
    return dict(_ask(request))


def _ask(request: dict[str, Any]) -> Any:
    _require_short(request["template"])
    try:
        outcome = _renderer.ask(request, RENDER_DEADLINE_S)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the messages cannot be written as JSON: {error}") from None
    if outcome.error is not None:
        raise outcome.error
    if outcome.failure:
        raise InputError(f"the model's chat template cannot be rendered: its process {outcome.failure}", hint=HINT)
    return outcome.value


def prepare_chat_template(template: str) -> None:
    """Starts the rendering process ahead of its first use and compiles a template there; what is wrong with it is told at its use."""
    if template and len(template) <= MAX_TEMPLATE_CHARACTERS:
        _renderer.prepare({"template": template, "context": None}, RENDER_DEADLINE_S)


def _require_short(template: str) -> None:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"the model's chat template: expected at most {MAX_TEMPLATE_CHARACTERS} characters, found {len(template)}",
            hint=HINT,
        )


# In the child.


def render_here(request: dict[str, Any]) -> Any:
    """Renders in this process, without limits of time and memory of its own.

    Args:
        request: "template", and "context", the template's variables, where ``None`` only compiles; or "probe", the texts of BOS, EOS
            and all end tokens, which examines the template instead.

    Raises:
        InputError: the template refuses the messages, is broken, or writes too much.
    """
    try:
        compiled = _compile(request["template"])
        if "probe" in request:
            return _examine(compiled, request["template"], *request["probe"])
        return "" if request["context"] is None else _write(compiled, request["context"])
    except (InputError, MissingExtraError):
        raise
    except MemoryError:
        megabytes = RENDER_MEMORY_BYTES // 2**20
        raise InputError(f"the model's chat template needs more than {megabytes} MB of memory", hint=HINT) from None
    except Exception as error:  # a template is a program of its own and fails in any way
        reason = str(error)[:ERROR_CHARACTERS] or type(error).__name__
        raise InputError(f"the model's chat template refuses these messages: {reason}") from None


def _examine(compiled: Any, template: str, bos_token: str, eos_token: str, end_texts: list[str]) -> dict[str, Any]:
    from edgepatch.text.template_traits import examine_here

    def write(messages: Any, tools: Any = None, opens_turn: bool = False, values: Any = None) -> str:
        special = {"bos_token": bos_token, "eos_token": eos_token, **(values or {})}
        return _write(compiled, {"messages": messages, "tools": tools, "add_generation_prompt": opens_turn, **special})

    return examine_here(write, template, end_texts)


def _write(compiled: Any, context: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in compiled.generate(**{"documents": None, **context}):
        parts.append(part)
        size += len(part)
        if size > MAX_RENDERED_CHARACTERS:
            raise InputError(
                f"the model's chat template writes more than {MAX_RENDERED_CHARACTERS} characters", hint=HINT
            )
    return "".join(parts)


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The compiled template in the environment that Transformers gives it."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("jinja2", "gguf") from None

    class Generation(Extension):
        """The tag that marks the assistant's own words for training; here it only passes them on."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

        def _pass_on(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
