"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, and never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from podquant.errors import EngineStoppedError, QueueFullError, RequestError, RequestTooLongError
from podquant.foreign import shown
from podquant.server import fields

_log = logging.getLogger(__name__)

_LONGEST_NAME = 80
"""Characters of a field's name that are said back."""

RETRY = {"Retry-After": "1"}
"""The header of an answer that another try may change."""


class ApiError(Exception):
    """An error HTTP itself gives rise to, with its status and its body."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body for one error."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response for one error."""
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers=headers)


def response_for(error: RequestError | ApiError) -> JSONResponse:
    """The response for a request that was refused."""
    match error:
        case ApiError(status=status, code=code, param=param):
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            return error_response(status, str(error), param=param, code=code, headers=headers)
        case RequestTooLongError():
            return error_response(400, str(error), param=error.param, code="context_length_exceeded")
        case QueueFullError():
            return error_response(429, str(error), code="queue_full", headers=RETRY)
        case EngineStoppedError():
            return error_response(503, str(error), code="unavailable", headers=RETRY)
    return error_response(400, str(error), param=error.param, code="invalid_value")


def install(app: FastAPI) -> None:
    """Make every error of an app take this form."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError | ApiError)
    return response_for(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param, code = describe(error.errors())
    return error_response(400, message, param=param, code=code)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = {
        404: f"There is no route {what}; GET /openapi.json lists them.",
        405: f"{what}: the route exists, the method does not. Allowed: {(error.headers or {}).get('Allow')}.",
    }.get(error.status_code, str(error.detail))
    return error_response(error.status_code, message, headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again for the log once this is sent
    return error_response(500, "The server failed on this request; its log says how.", code="internal_error")


def describe(errors: Sequence[ErrorDetails | dict[str, Any]]) -> tuple[str, str | None, str]:
    """Message, param and code for the first of pydantic's complaints about a body."""
    error = errors[0]
    names = [*error["loc"], error.get("ctx", {}).get("name") or ""]
    path = ".".join(str(part)[:_LONGEST_NAME] for part in names if part not in ("body", ""))
    param = path.encode(errors="replace").decode() or None  # half a surrogate pair cannot be sent back
    match error["type"]:
        case "missing":
            return f"Missing parameter: {param!r} is required.", param, "missing_parameter"
        case fields.UNSUPPORTED | fields.INVALID | fields.UNKNOWN as code:
            message = f"Unknown parameter: {param!r}. Remove it, or check its spelling."
            return message if code == fields.UNKNOWN else str(error["msg"]), param, code
    if param is None:
        return f"The body must be a JSON object: {error['msg']}.", None, "invalid_value"
    return f"{param}: {error['msg']}; got {shown(error['input'])}.", param, "invalid_value"
