"""What a client is told when its request is not served, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepatch.errors import EdgepatchError, InputError

if TYPE_CHECKING:
    from edgepatch.server.schemas.replies import Error, ErrorDetails

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""Status -> ``error.type``."""

RETRY_AFTER_S = 1


class Refusal(InputError):
    """A request that is not served.

    Args:
        status: the HTTP status, one of ``KINDS``.
        message: expected, found, and which one.
        param: the field it is about, as a path ("messages.0.role"); empty where it is about no field.
        code: a word that programs can compare.
    """

    def __init__(self, status: int, message: str, param: str = "", code: str = "") -> None:
        super().__init__(_sendable(message))
        self.status, self.param, self.code = status, _sendable(param), code

    def body(self) -> Error:
        """The reply's JSON."""
        error: ErrorDetails = {
            "message": str(self),
            "type": KINDS[self.status],
            "param": self.param or None,
            "code": self.code or None,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}


def _sendable(text: str) -> str:
    """A text in which halves of characters, which no reply can carry, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def refusal_of(error: BaseException) -> Refusal:
    """What the client is told of an error while its request was served; nothing of the inside of an unexpected one."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        hint = f" ({error.hint})" if error.hint else ""
        return Refusal(400, f"{error}{hint}", code="invalid_input")
    if isinstance(error, EdgepatchError):
        return Refusal(500, str(error), code="generation_failed")
    return Refusal(500, "internal error", code="internal_error")
