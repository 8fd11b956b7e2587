"""What `claas modal` and `claas doctor` ask of Modal through its SDK: the app, its functions, Volumes and secret.

Only `ask_worker` starts a container. The SDK is imported inside the functions: it takes a moment, and is an extra, see `require_sdk`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from claas.adapters.layout import LEFTOVERS, version_number
from claas.adapters.modal_errors import modal_errors
from claas.adapters.store import MANIFEST
from claas.core.errors import ConfigurationError
from claas.core.settings import Settings

WORKER = "DistillWorker"
SERVER = "VllmServer"
CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class FunctionState:
    """A function of the deployed app: the containers that it has now, and the calls that wait for one."""

    name: str
    containers: int
    waiting: int


@dataclass(frozen=True, slots=True)
class VolumeState:
    """The Volume of the adapters: complete versions, and the bytes of all files."""

    name: str
    adapters: int
    versions: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AppState:
    """The app as Modal has it."""

    app: str
    state: str
    version: int | None
    deployed_at: datetime | None
    deployed_by: str | None
    functions: tuple[FunctionState, ...]
    tags: dict[str, str]

    @property
    def deployed(self) -> bool:
        return self.state == "deployed"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "deployed_at": self.deployed_at.astimezone(UTC).isoformat() if self.deployed_at else None}


def adapters_volume(settings: Settings) -> str:
    return f"{settings.modal_app}-adapters"


def models_volume(settings: Settings) -> str:
    return f"{settings.modal_app}-models"


def leases_dict(settings: Settings) -> str:
    return f"{settings.modal_app}-leases"


def key_secret(settings: Settings) -> str:
    return f"{settings.modal_app}-key"


def vllm_key(settings: Settings) -> str | None:
    """None where none is said, or a blank."""
    said = settings.vllm_api_key.get_secret_value().strip() if settings.vllm_api_key else ""
    return said or None


def require_sdk() -> None:
    """Raises ConfigurationError where the extra is missing."""
    if find_spec("modal") is None:
        raise ConfigurationError("Modal's SDK is missing: pip install 'claas[local,modal]'")


@contextmanager
def modal_asked() -> Iterator[None]:
    """For what the block asks of Modal: its errors as ours, and a Modal that is away within seconds, not the minute of the SDK.

    Raises:
        BackendUnavailable: Modal cannot be reached, or refuses, the token for one.
    """
    with modal_errors():
        asyncio.run(_connect())
        yield


async def _connect() -> None:
    """The SDK keeps the connection for all that follows."""
    import modal

    async with asyncio.timeout(CONNECT_S):
        await modal.Client.from_env.aio()


def app_state(settings: Settings) -> AppState | None:
    """None where no such app is deployed.

    Raises:
        BackendUnavailable: Modal cannot be reached, or does not accept the token.
    """
    import modal

    with modal_asked():
        try:
            app = modal.App.lookup(settings.modal_app, environment_name=settings.modal_environment)
        except modal.exception.NotFoundError:
            return None
        info = app.info(refresh=True)
        functions = tuple(_function_state(name, function_id) for name, function_id in sorted(info.functions.items()))
        tags = dict(app.get_tags())
    lifecycle = info.lifecycle
    state = AppState(
        settings.modal_app, lifecycle.state.value, lifecycle.version, lifecycle.deployed_at, lifecycle.deployed_by, functions, tags
    )
    return state if state.deployed else None


def _function_state(name: str, function_id: str) -> FunctionState:
    """A class is listed as `DistillWorker.*`: all its methods share their containers."""
    import modal

    now = modal.Function.from_id(function_id).get_current_stats()
    return FunctionState(name.removesuffix(".*"), now.num_total_runners, now.backlog)


def volume_state(settings: Settings) -> VolumeState | None:
    """None where there is no such Volume."""
    import modal

    name = adapters_volume(settings)
    with modal_asked():
        try:
            entries = modal.Volume.from_name(name, environment_name=settings.modal_environment).listdir("/", recursive=True)
        except modal.exception.NotFoundError:
            return None
    files = [entry for entry in entries if entry.type == modal.types.FileEntryType.FILE]
    versions = [adapter for entry in files if (adapter := _versions_adapter(PurePosixPath(entry.path)))]
    return VolumeState(name, len(set(versions)), len(versions), sum(entry.size for entry in files))


def _versions_adapter(file: PurePosixPath) -> str | None:
    """The adapter's folder, if the file is the manifest of one of its versions, without which a version is none yet."""
    folder, *rest = file.parts
    is_version = len(rest) == 2 and version_number(rest[0]) is not None and rest[1] == MANIFEST
    return folder if is_version and not folder.startswith(LEFTOVERS) else None


def vllm_url(settings: Settings) -> str:
    """Where the guard in front of vLLM is reached. Asks Modal's control plane, no container."""
    import modal

    with modal_asked():
        server = modal.Cls.from_name(settings.modal_app, SERVER, environment_name=settings.modal_environment)()
        url: str = server.web.get_web_url()
    return url


def ask_worker(settings: Settings) -> dict[str, Any]:
    """What the worker says of itself. Starts a GPU container if none runs, which takes minutes and is paid for."""
    import modal

    with modal_asked():
        worker = modal.Cls.from_name(settings.modal_app, WORKER, environment_name=settings.modal_environment)()
        answer: dict[str, Any] = json.loads(worker.health.remote())
    return answer


def stop_app(settings: Settings) -> bool:
    """Whether there was one to stop."""
    import modal

    with modal_asked():
        try:
            modal.App.lookup(settings.modal_app, environment_name=settings.modal_environment).stop()
        except modal.exception.NotFoundError:
            return False
    return True


def delete_everything(settings: Settings) -> None:
    """All that the app kept: adapters, the leases on them, fetched models, vLLM's key."""
    import modal

    where = settings.modal_environment
    with modal_asked():
        for name in (adapters_volume(settings), models_volume(settings)):
            modal.Volume.objects.delete(name, allow_missing=True, environment_name=where)
        modal.Dict.objects.delete(leases_dict(settings), allow_missing=True, environment_name=where)
        modal.Secret.objects.delete(key_secret(settings), allow_missing=True, environment_name=where)
