"""What Modal's SDK raises, in our words."""

from __future__ import annotations

import aiohttp
import pytest
from grpclib.exceptions import StreamTerminatedError
from modal import exception

from claas.adapters.modal_errors import as_ours, modal_errors
from claas.core.errors import AdapterBusy, BackendUnavailable, StorageFull


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (exception.NotFoundError("App 'claas' not found"), "claas modal deploy"),
        (exception.AuthError("Token missing"), "modal setup"),
        (exception.PermissionDeniedError("no"), "credit and limits"),
        (exception.ResourceExhaustedError("spend limit"), "spending limit or quota"),
        (exception.VersionError("too old"), "newer CLaaS"),
        (exception.ConnectionError("no route"), "cannot be reached"),
        (exception.ServiceError("unavailable"), "cannot be reached"),
        (exception.InternalError("oops"), "cannot be reached"),
        (exception.VolumeUploadTimeoutError("slow"), "cannot be reached"),
        (StreamTerminatedError("Connection lost"), "cannot be reached"),
        (aiohttp.ClientPayloadError("cut off"), "cannot be reached"),
        (ConnectionResetError("reset"), "cannot be reached"),
        (TimeoutError(), "cannot be reached"),
        (exception.ExecutionError("a block is missing"), r"ExecutionError.*modal app logs"),
        (exception.InvalidError("bad name"), r"InvalidError.*modal app logs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_says_what_to_do(error: Exception, says: str) -> None:
    with pytest.raises(BackendUnavailable, match=says) as raised, modal_errors():
        raise error
    assert raised.value.__cause__ is error


def test_what_may_pass_by_itself_says_when_to_try_again() -> None:
    blip, refusal = as_ours(exception.ConnectionError("no route")), as_ours(exception.AuthError("no"))
    assert isinstance(blip, BackendUnavailable) and blip.retry_after_s
    assert isinstance(refusal, BackendUnavailable) and not refusal.retry_after_s


def test_a_volume_that_takes_no_more_is_full() -> None:
    with pytest.raises(StorageFull, match="Volume"), modal_errors(storing=True):
        raise exception.ResourceExhaustedError("quota")


@pytest.mark.parametrize("error", [AdapterBusy("ours"), FileExistsError("there"), ValueError("a mistake")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, modal_errors():
        raise error
    assert raised.value is error
