"""Errors of the API, in the form that OpenAI's clients read."""

from typing import Any

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is refused with; the message goes to the client.

    Attributes:
        status: of HTTP.
        message: what was found, what was expected, what to do; no path of the server and no patient data.
        code: for programs, such as "queue_full".
        param: the field of the request that is wrong.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the response's JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the response's own headers."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**found, "WWW-Authenticate": "Bearer"} if self.status == 401 else found


def internal_error() -> ApiError:
    """Return what a client is told of an error that no one foresaw: nothing, since it could say anything."""
    return ApiError(500, "The request failed for a reason that isn't the client's.", "internal_error")
