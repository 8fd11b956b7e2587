"""The one error tree. It knows nothing of HTTP: `claas.api.errors` maps each branch to a status.

::

    ClaasError
    ├── ConfigurationError        a setting is missing or wrong (raised before anything is served)
    ├── BadRequest                the caller's input is malformed or unsupported; `param` names the field
    │   ├── ContextOverflow       the prompt does not fit the model's context
    │   └── UpstreamRefused       a serving engine refused the request; `status` is its own
    ├── AuthenticationFailed      no key, or a wrong one
    ├── NotFound                  an unknown model, adapter, version, completion or feedback id
    ├── Conflict                  the name is taken, or the adapter is busy
    │   └── AdapterBusy           another lesson holds the adapter past the lock timeout
    ├── TooLarge                  the body is over the limit
    ├── Unteachable               the lesson cannot be taught; the message says why
    ├── Overloaded                the queue is full; try again after `retry_after_s`
    ├── BackendUnavailable        a backend is down or closing
    ├── StorageFull               no space left; nothing was half written
    └── StepFailed                a step broke; the version before it still serves

Every message is for the person who made the request: it says what to do, quotes identifiers with ``!r`` and holds no path or key.
"""

from __future__ import annotations


class ClaasError(Exception):
    """Base of all errors CLaaS raises on purpose."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ConfigurationError(ClaasError):
    """A setting is missing or wrong."""


class BadRequest(ClaasError, ValueError):
    """Malformed or unsupported input; `param` names the field."""


class ContextOverflow(BadRequest):
    """The prompt, with the tokens asked for, does not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class UpstreamRefused(BadRequest):
    """A serving engine refused the request with a status of 4xx, and said why."""

    def __init__(self, message: str, *, status: int, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status


class AuthenticationFailed(ClaasError):
    """No bearer key, or a wrong one."""


class NotFound(ClaasError, LookupError):
    """An unknown model, adapter, version, completion or feedback id."""


class Conflict(ClaasError):
    """The state of the adapter does not allow it."""


class AdapterBusy(Conflict):
    """Another lesson holds the adapter past the lock timeout."""


class TooLarge(ClaasError):
    """The request body is over the limit."""


class Unteachable(ClaasError):
    """The feedback is well-formed, but this reply cannot be learnt from."""


class Overloaded(ClaasError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after_s = retry_after_s


class BackendUnavailable(ClaasError):
    """A backend is down or busy with an update, or the service is closing."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageFull(ClaasError):
    """No space left on the data folder's disk."""


class StepFailed(ClaasError):
    """A learning step broke. The version before it still serves and the feedback is stored."""
