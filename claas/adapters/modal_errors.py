"""What Modal's SDK raises, as our errors: one table for the stores, the lease and the engine. Every message says what to do.

Modal is imported only where an error is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from claas.core.errors import BackendUnavailable, ClaasError, StorageFull

NOT_DEPLOYED = "the app is not on Modal, or not all of it: run `claas modal deploy`"
NO_TOKEN = "Modal does not accept the token: run `modal setup`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"  # noqa: S105 - a message
NOT_ALLOWED = "Modal does not allow it: see the token's rights and the workspace's credit and limits on modal.com"
EXHAUSTED = "Modal gives no more: the workspace's credit, spending limit or quota is used up; raise it on modal.com, or try again later"
VOLUME_FULL = "the Volume on Modal is full: nothing was saved; delete adapters or raise its quota, and try again"
TOO_OLD = "Modal no longer serves this version of its SDK: install a newer CLaaS"
UNREACHABLE = "Modal cannot be reached: see the network and status.modal.com, and try again"
RETRY_AFTER_S = 5


@contextmanager
def modal_errors(*, storing: bool = False) -> Iterator[None]:
    """Raise Modal's errors as ours; others pass. `storing`: a file is being written, so that "exhausted" means the Volume is full."""
    try:
        yield
    except Exception as error:
        ours = as_ours(error, storing=storing)
        if ours is None:
            raise
        raise ours from error


def as_ours(error: Exception, *, storing: bool = False) -> ClaasError | None:
    """The error of ours that says the same; None for one that is not Modal's, or is ours already."""
    from modal import exception

    if isinstance(error, ClaasError):
        return None
    if isinstance(error, exception.ResourceExhaustedError) and storing:
        return StorageFull(VOLUME_FULL)
    told: dict[type[Exception], str] = {
        exception.NotFoundError: NOT_DEPLOYED,
        exception.AuthError: NO_TOKEN,
        exception.PermissionDeniedError: NOT_ALLOWED,
        exception.ResourceExhaustedError: EXHAUSTED,
        exception.VersionError: TOO_OLD,
    }
    for kind, message in told.items():
        if isinstance(error, kind):
            return BackendUnavailable(message)
    if is_blip(error):
        return BackendUnavailable(UNREACHABLE, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, exception.Error):
        return BackendUnavailable(
            f"Modal failed ({type(error).__name__}): try again; if it stays so, see the app's logs with `modal app logs`"
        )
    return None


def is_blip(error: Exception) -> bool:
    """Whether it is the network or Modal itself that failed, so that the same call may succeed later."""
    from aiohttp import ClientError
    from grpclib.exceptions import StreamTerminatedError
    from modal import exception

    modals = (exception.ConnectionError, exception.ServiceError, exception.InternalError, exception.InternalFailure, exception.ClientClosed)
    timeouts = (exception.VolumeUploadTimeoutError, TimeoutError)
    return isinstance(error, (*modals, *timeouts, StreamTerminatedError, ClientError, ConnectionError))
