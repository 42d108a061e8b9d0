"""How the server is reached, and by whom."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepatch.errors import InputError

KEY_VARIABLE = "EDGEPATCH_API_KEY"
BACKLOG = 128
MIN_KEY_LENGTH = 16
MAX_KEY_LENGTH = 512
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)*")
MAX_NAME_LENGTH = 128
ORIGIN = re.compile(r"null|file://|[a-z][a-z0-9+.-]*://[A-Za-z0-9._-]+(:[0-9]{1,5})?")
"""How browsers and desktop apps write the page that a request comes from."""


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens and what it takes.

    Attributes:
        name: what clients call the model.
        api_key: what clients must know; ``None`` lets everyone on this machine in.
        host: address to listen on.
        port: 0 takes a free one.
        allow_remote: must be true for an address that other machines reach.
        allowed_hosts: names of this machine that clients may use, beside addresses and "localhost".
        allowed_origins: pages and apps that may call the server, beside pages of this machine ("app://obsidian.md").
        max_body_bytes: of one request.
        max_waiting: continuations that wait for a sequence; more are told to come again.
        body_timeout_s: for a request to arrive.
        request_timeout_s: from its arrival to the end of its reply.
        grace_s: for replies to come to their end when the server stops.
        has_page: whether people get a chat page at ``/``.
        allows_compare: whether the page may show answers without the patch as well.
        log: file with a line for each request; "-" for the standard error output, ``None`` for no log.

    Raises:
        InputError: the address needs a flag or a key that is missing, or a name or key cannot be used.
    """

    name: str
    api_key: str | None
    host: str = "127.0.0.1"
    port: int = 8080
    allow_remote: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_waiting: int = 64
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    grace_s: float = 10.0
    log: Path | None = None
    has_page: bool = True
    allows_compare: bool = False

    def __post_init__(self) -> None:
        if len(self.name) > MAX_NAME_LENGTH or not NAME.fullmatch(self.name):
            raise InputError(
                f"model name: expected letters, digits and . _ : - / inside, found {self.name!r}",
                hint="name it with --alias",
            )
        foreign = next((origin for origin in self.allowed_origins if not ORIGIN.fullmatch(origin)), None)
        if foreign is not None:
            raise InputError(
                f"origin: expected one like app://obsidian.md, https://chat.example or null, found {foreign!r}",
                hint="the server's reply to a page that it refuses names the page's origin",
            )
        wrong = next((host for host in self.allowed_hosts if not re.fullmatch(r"[a-z0-9._-]+", host)), None)
        if wrong is not None:
            raise InputError(f"host name: expected lower-case letters, digits, dots and dashes, found {wrong!r}")
        if self.api_key is not None:
            _require_key(self.api_key, "API key")
        if self.allows_compare:
            self._require_private()
        if self.is_loopback:
            return
        if not self.allow_remote:
            raise InputError(
                f"{self.host} can be reached from other machines", hint="add --allow-remote if that is wanted"
            )
        if self.api_key is None:
            raise InputError(
                f"{self.host} can be reached from other machines, which needs an API key", hint="leave --no-api-key out"
            )

    def _require_private(self) -> None:
        """Answers without the patch are a hole in it: they are for whoever sits at this machine and knows the key."""
        wrong = [
            *([] if self.is_loopback else [f"--host {self.host}"]),
            *(["--allow-host"] if self.allowed_hosts else []),
            *(["--allow-origin"] if self.allowed_origins else []),
            *([] if self.api_key else ["--no-api-key"]),
            *([] if self.has_page else ["--no-ui"]),
        ]
        if wrong:
            raise InputError(
                f"--allow-compare: expected this machine alone, its own page and a key, found {', '.join(wrong)}",
                hint="it gives answers without the patch: leave one of the two out",
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def listen(self) -> socket.socket:
        """A bound socket.

        Raises:
            InputError: the address is unknown, or its port is taken or not to be had.
        """
        try:
            host = "127.0.0.1" if self.host == "localhost" else self.host  # whatever the machine makes of that name
            family, _, _, _, address = socket.getaddrinfo(
                host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = socket.socket(family, socket.SOCK_STREAM)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(address)
                bound.listen(BACKLOG)  # whoever comes while the model loads is heard
            except BaseException:
                bound.close()
                raise
        except OSError as error:
            hint = "name another --port, or 0 for any free one"
            raise InputError(f"cannot listen on {self.host} port {self.port}: {error.strerror}", hint) from error
        return bound


def read_api_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that the operator chose, from a file or the environment; ``None`` where there is none.

    There is no flag for it: everyone on a machine sees the command lines of its processes.

    Raises:
        InputError: the file cannot be read or others may read it, or the key cannot be used.
    """
    if file is None:
        key = environment.get(KEY_VARIABLE)
        if key is not None:
            _require_key(key, KEY_VARIABLE)
        return key
    key = read_key_file(file)
    _require_key(key, str(file))
    return key


def read_key_file(file: Path) -> str:
    """A key of this or of another server.

    Raises:
        InputError: the file cannot be read, or others may read it.
    """
    try:
        mode = file.stat().st_mode
        key = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError:
        raise InputError(f"{file}: expected a key in ASCII, found other bytes") from None
    if mode & 0o077:
        raise InputError(
            f"{file}: expected a file for its owner alone, found mode {mode & 0o777:o}", hint=f"chmod 600 {file}"
        )
    return key


def new_api_key() -> str:
    """A fresh random key."""
    return f"ep-{secrets.token_urlsafe(32)}"


def _require_key(key: str, where: str) -> None:
    if not MIN_KEY_LENGTH <= len(key) <= MAX_KEY_LENGTH:
        raise InputError(
            f"{where}: expected {MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} characters, found {len(key)}",
            hint="leave it out and one is generated",
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"{where}: expected printable ASCII without spaces, found other characters")
