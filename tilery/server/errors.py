"""Errors as the OpenAI API shows them: `{"error": {"message", "type", "param", "code"}}`; `code` is the HTTP status."""

from __future__ import annotations

import re

import msgspec

from tilery.engine.messages import EngineOutput, ErrorKind

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct, frozen=True):
    error: ErrorBody


class ApiError(Exception):
    """Ends a request with this status; after the first byte of a stream it becomes an error event instead."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.response = ErrorResponse(ErrorBody(message, TYPES[status], param, status))

    def encode(self) -> bytes:
        return msgspec.json.encode(self.response)


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param)


def unavailable(message: str, retry_after: int) -> ApiError:
    return ApiError(503, message, headers=((b"retry-after", str(retry_after).encode()),))


def from_engine(output: EngineOutput, retry_after: int) -> ApiError:
    """What the client is told when the engine refused or failed one request."""
    message = output.error or "The engine failed on this request."
    match output.error_kind:
        case ErrorKind.INVALID:
            return invalid(message)
        case ErrorKind.OVERLOADED:
            return unavailable(message, retry_after)
        case _:
            return ApiError(500, message)


def from_decoding(error: msgspec.MsgspecError) -> ApiError:
    """A 400 for a body that is not JSON or not what the endpoint expects; `param` is the top-level field."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return invalid(f"The request body is not valid JSON: {text}.")
    path = re.search(r"`\$\.?(\w*)", text)
    missing = re.search(r"missing required field `(\w+)`", text)
    param = path.group(1) if path and path.group(1) else missing.group(1) if missing else None
    return invalid(f"{text}.", param)
