"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` beside the status."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from remoe_adapt._support import first_line, printable
from remoe_adapt.errors import RemoeError

_LONGEST_CHARACTERS = 2000
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(RemoeError):
    """A request that is answered with an error.

    status: of the answer.
    param: the field that is wrong.
    code: a word that programs may look at.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, or an event of a stream that has begun."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(self, _LONGEST_CHARACTERS)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer. Its connection is closed, since the rest of a body may not have been read."""
        headers = {"Connection": "close"}
        if self.status == 503:
            headers["Retry-After"] = "1"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_json(), self.status, headers)


def of_exception(error: BaseException, *, begun: bool) -> RequestError:
    """What a client is told of an exception of transformers' handlers.

    begun: the first token had been computed, so that the request itself was one that can be answered.
    """
    if isinstance(error, RequestError):
        return error
    status, detail = getattr(error, "status_code", None), getattr(error, "detail", None)
    if isinstance(status, int) and isinstance(detail, str):  # an HTTPException
        return RequestError(detail, 400 if status == 422 else status)
    # Before the first token such errors speak of what the client sent: a chat that its template refuses, a bias of a
    # token that there is not.
    if not begun and isinstance(error, ValueError | TypeError | LookupError | AttributeError):
        return RequestError(f"the request cannot be answered ({type(error).__name__}: {first_line(error)})")
    return RequestError(f"the model failed at this request ({type(error).__name__}: {first_line(error)})", 500)
