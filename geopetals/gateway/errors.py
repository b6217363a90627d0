"""What goes wrong, as OpenAI's clients expect to hear it: a status, and message, type, param and code."""

import math
from typing import Any

from geopetals.errors import GeoPetalsError, NetworkError, NoChain, ServerFull, UnsupportedInput

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
}
_FULL_RETRY_S = 10.0
"""Where nobody can say when there will be room again."""


class ApiError(Exception):
    """An answer other than 200. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After counts whole seconds: rounded up, so that who obeys it does not come too early."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def envelope(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "service_unavailable")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: GeoPetalsError) -> ApiError:
    """A failure of the library as an answer: 429 where waiting helps, 503 where the swarm lacks something."""
    text = str(error)
    retry_after_s = getattr(error, "retry_after_s", None)
    if isinstance(error, UnsupportedInput):
        return ApiError(400, text)
    if isinstance(error, ServerFull) or retry_after_s is not None:
        wait_s = retry_after_s if retry_after_s is not None else getattr(error, "free_in_s", None)
        return ApiError(429, text, code="swarm_full", retry_after_s=_FULL_RETRY_S if wait_s is None else wait_s)
    if isinstance(error, NoChain):
        return ApiError(503, text, code="blocks_missing", retry_after_s=_FULL_RETRY_S)
    code = "swarm_unreachable" if isinstance(error, NetworkError) else "swarm_failure"
    return ApiError(503, text, code=code, retry_after_s=_FULL_RETRY_S)
