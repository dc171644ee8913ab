"""Refusals as the clients of each programs' API read them: OpenAI's under /v1, A1111's under /sdapi/v1."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from bestiary.app.errors import InvalidError, public_sentence, retry_headers, status_of
from bestiary.errors import BestiaryError

OPENAI, A1111 = "/v1", "/sdapi/v1"
OPENAI_STATUS = {422: 400}  # OpenAI's clients expect 400 for an invalid request
CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
FAILURE = "The picture could not be drawn. The server's log has the details."


def is_for_programs(path: str) -> bool:
    """Whether a path belongs to one of the programs' APIs.

    >>> is_for_programs("/v1/models"), is_for_programs("/api/draw")
    (True, False)
    """
    return path.startswith((f"{OPENAI}/", f"{A1111}/"))


def refusal(
    path: str, sentence: str, status: int, *, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The refusal of a request, in the form that the clients of its path read."""
    headers = retry_headers(status) | (headers or {})
    if path.startswith(f"{OPENAI}/"):
        status = OPENAI_STATUS.get(status, status)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": sentence, "type": kind, "param": field, "code": CODES.get(status)}
        return JSONResponse({"error": error}, status, headers)
    if path.startswith(f"{A1111}/"):
        error = {"error": "HTTPException", "detail": sentence, "body": "", "errors": sentence}
        return JSONResponse(error, status, headers)
    return PlainTextResponse(sentence, status, headers)


async def refused(request: Request, error: Exception) -> Response:
    """Answer a request that ends with a BestiaryError."""
    assert isinstance(error, BestiaryError)
    field = error.field if isinstance(error, InvalidError) else None
    return refusal(request.scope["path"], public_sentence(error), status_of(error), field=field)


async def not_here(request: Request, error: Exception) -> Response:
    """Answer a request to a path, or by a method, that does not exist."""
    assert isinstance(error, HTTPException)
    sentence = f"There is no {request.method} {request.url.path[:200]} here. Check the path and the method."
    return refusal(request.scope["path"], sentence, error.status_code, headers=dict(error.headers or {}))


async def failed(request: Request, _: Exception) -> Response:
    """Answer a request that ends with an unexpected error. The log has the details."""
    return refusal(request.scope["path"], FAILURE, 500)


async def disconnected(_: Request, __: Exception) -> Response:
    """Answer a request whose client has disconnected: nobody reads the answer."""
    return Response(status_code=422)


HANDLERS = {BestiaryError: refused, HTTPException: not_here, ClientDisconnect: disconnected, Exception: failed}
