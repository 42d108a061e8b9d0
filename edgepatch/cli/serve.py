"""``serve``: a model with a patch behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.chat import ContextLength, Device, DeviceOption, Threads, choice, note_unasked
from edgepatch.cli.console import (
    BareFlag,
    FlashFlag,
    JsonFlag,
    ModelArgument,
    ModelFileOption,
    PatchOption,
    PinnedFlag,
    StoreOption,
    TemplateFlag,
    TemplateOption,
    cell,
    note,
    print_json,
    read_template,
    stderr,
    stdout,
    table,
    warn,
)
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.runtimes import PatchChoice
    from edgepatch.runtimes.session import Session
    from edgepatch.server.model import ServedModel
    from edgepatch.server.settings import ServerSettings


@app.command()
def serve(
    model: ModelArgument,
    patch: PatchOption = None,
    bare: BareFlag = False,
    pinned: PinnedFlag = False,
    other_template: TemplateFlag = False,
    store: StoreOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    sequences: Annotated[int, typer.Option("--sequences", min=1, max=64, help="Replies at once; others wait.")] = 4,
    alias: Annotated[
        str | None, typer.Option("--alias", help="What clients call the model; default: its file's name.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="Holds the API key. Else EDGEPATCH_API_KEY, else one is generated."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Let everyone on this machine in; loopback only.")
    ] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Needed for an address that other machines reach.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name of this machine that clients use; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="A page or app that may call, such as app://obsidian.md; may be repeated."),
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="No chat page at /.")] = False,
    allow_compare: Annotated[
        bool,
        typer.Option(
            "--allow-compare",
            help="The page may show answers without the patch beside those with it; loads the model twice. Loopback only.",
        ),
    ] = False,
    chat_template: TemplateOption = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="The most replies that wait; more get status 503.")] = 64,
    request_timeout: Annotated[float, typer.Option("--request-timeout", min=1, help="Seconds for one reply.")] = 600,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds for replies to end when the server stops.")
    ] = 10,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="Add a line for each request: time, path, status, duration, tokens, never texts or keys; - for stderr.",
        ),
    ] = None,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    flash_attention: FlashFlag = True,
    model_file: ModelFileOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve a model to OpenAI's clients, on this machine alone unless told otherwise. Stop it with Ctrl-C or SIGTERM.

    Example: `edgepatch serve llama-Q4_K_M.gguf --patch detox.safetensors`
    """
    chosen = choice(patch, bare)
    _require_some_patch(chosen, store)
    if allow_compare and chosen is None:
        raise InputError("expected --allow-compare or --bare, found both: there is nothing to compare")
    from edgepatch.server.process import serve as run
    from edgepatch.server.service import Service
    from edgepatch.server.settings import ServerSettings, new_api_key

    key, is_new = _api_key(api_key_file, no_api_key, new_api_key)
    settings = ServerSettings(
        name=alias or _name_of(model),
        api_key=key,
        host=host,
        port=port,
        allow_remote=allow_remote,
        allowed_hosts=tuple(name.lower() for name in allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        max_waiting=queue,
        request_timeout_s=request_timeout,
        grace_s=grace,
        log=log,
        has_page=not no_ui,
        allows_compare=allow_compare,
    )
    with settings.listen() as listener:
        url = _url(settings, listener.getsockname()[1])
        note(f"loading {model}")
        choices = {
            "chat_template": read_template(chat_template),
            "model_file": model_file,
            "flash_attention": None if flash_attention else False,
        }
        shared = (sequences, context_length, threads, device, store, pinned, other_template, choices)
        load = _loader(model, chosen, *shared)
        bare_service = Service(_loader(model, None, *shared), settings) if allow_compare else None
        announce = partial(_announce, settings=settings, url=url, is_new_key=is_new, as_json=as_json)
        service = Service(load, settings, announce, bare=bare_service)
        run(service, listener)
    if not all(one.scheduler.join(0) for one in service.all):
        sys.stdout.flush()
        os._exit(
            0
        )  # a library that still loads a model cannot be stopped, and crashes when its process is taken down in order


def _api_key(file: Path | None, without: bool, generate: Callable[[], str]) -> tuple[str | None, bool]:
    """The key, and whether it was made just now."""
    from edgepatch.server.settings import read_api_key

    if without:
        if file is not None:
            raise InputError("expected --api-key-file or --no-api-key, found both")
        return None, False
    chosen = read_api_key(file)
    return (chosen, False) if chosen is not None else (generate(), True)


def _name_of(model: Path) -> str:
    name = model.resolve().stem if model.suffix == ".gguf" else model.resolve().name
    return re.sub(r"[^A-Za-z0-9._:-]", "-", name).lstrip("._:-")[:128] or "model"


def _loader(
    model: Path,
    patch: PatchChoice,
    sequences: int,
    context_length: int | None,
    threads: int | None,
    device: Device,
    store: Path | None,
    pinned: bool,
    other_template: bool,
    choices: Mapping[str, object],
) -> Callable[[], Session]:
    from edgepatch.runtimes import device_options, load_runtime
    from edgepatch.store.reading import StoreReader

    options: dict[str, Any] = {"context_length": context_length, "num_threads": threads, "num_sequences": sequences}
    options |= {**device_options(model, device.value), **choices}
    settings = {name: value for name, value in options.items() if value is not None}

    def load() -> Session:
        note_unasked(patch, store)
        session = load_runtime(model, patch, store=store, pinned=pinned, other_template=other_template, **settings)
        if patch is not None and session.patch is None:
            reader = StoreReader(store)
            note(f"bare by word of {reader.folder}: {reader.why_bare(session.spec)}")
        return session

    return load


def _require_some_patch(chosen: PatchChoice, store: Path | None) -> None:
    """Refuses early, before anything is loaded, where no patch can be active."""
    from edgepatch.runtimes import ACTIVE
    from edgepatch.store.reading import StoreReader

    if chosen is ACTIVE:
        StoreReader(store).require_some()


def _url(settings: ServerSettings, port: int) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{port}/v1"


def _curl(served: ServedModel, settings: ServerSettings, url: str) -> str:
    """A line for a shell that asks the model something; the key comes from the environment, which other users cannot see."""
    from edgepatch.server.settings import KEY_VARIABLE

    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if settings.api_key else ""
    body = json.dumps({"model": served.name, "messages": [{"role": "user", "content": "Hello"}]})
    return f"curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"


def _announce(served: ServedModel, settings: ServerSettings, url: str, is_new_key: bool, as_json: bool) -> None:
    from edgepatch.server.settings import KEY_VARIABLE

    if as_json:
        print_json(
            {"url": url, "model": served.name, "patches": served.patches, "system_fingerprint": served.fingerprint}
        )
    else:
        rows: list[tuple[str, object]] = [("url", url), ("model", served.name)]
        rows += [
            ("patch", f"{p['name']} {p['version']} (seed {p['seed_route']}, {p['place']})") for p in served.patches
        ]
        rows += [] if served.patches else [("patch", "none")]
        stdout().print(table([*rows, ("fingerprint", served.fingerprint)]))
        if settings.has_page:
            stdout().print(f"page         {cell(url.removesuffix('v1'))}", soft_wrap=True)
        stdout().print(f"try          {cell(_curl(served, settings, url))}", soft_wrap=True)
    sys.stdout.flush()
    if is_new_key:
        stderr().print(f"[bold]API key[/bold] (shown once): {cell(settings.api_key)}", soft_wrap=True)
        if not as_json:
            note(f"the line to try takes it from the environment: export {KEY_VARIABLE}=...")
    if settings.api_key is None:
        warn("no API key: every program and user of this machine can use the server")
    if not settings.is_loopback:
        warn("requests and key travel unencrypted: put a proxy with TLS in front")
    if not served.patches:
        warn("the model runs without a patch")
    if settings.allows_compare:
        warn("--allow-compare: whoever has the key gets answers without the patch")
    for line in served.told_notes:
        warn(line)
