"""What `claas modal deploy` does: says what will be made, makes the key of vLLM, deploys the app.

The key is a Modal secret, which Modal tells nobody again, and stands on no disk here: the service gets it from VLLM_API_KEY. Where that is
set, it is the key; else one is drawn at the first deploy, and printed once.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from claas.cli.modal_cloud import SERVER, WORKER, adapters_volume, key_secret, leases_dict, modal_asked, models_volume, vllm_key
from claas.core.errors import BackendUnavailable, ConfigurationError
from claas.core.modal_prices import price_per_second
from claas.core.settings import Settings

KEY_VARIABLE = "VLLM_API_KEY"
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Planned:
    """One thing that deploying makes, or keeps where it is there; `price` is in dollars an hour for each container, None: not known."""

    kind: Literal["class", "function", "volume", "dict", "secret"]
    name: str
    what: str
    gpu: str | None = None
    containers: int | None = None
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """What became of vLLM's key; `value` only where one was drawn, to be shown once."""

    done: Literal["drawn", "set", "kept"]
    value: str | None = None


def plan(settings: Settings) -> Iterator[Planned]:
    """What the app of these settings is made of."""
    yield _priced(settings, WORKER, "trains lessons, one at a time", settings.modal_gpu, settings.modal_max_containers)
    if settings.modal_serving == "vllm":
        yield _priced(settings, SERVER, "answers, behind its key", settings.modal_vllm_gpu, 1)
    yield Planned("function", "api", "the service itself, where PostgreSQL is")
    yield Planned("volume", adapters_volume(settings), "adapters")
    yield Planned("volume", models_volume(settings), "base models, fetched once")
    yield Planned("dict", leases_dict(settings), "who writes to which adapter")
    if settings.modal_serving == "vllm":
        yield Planned("secret", key_secret(settings), "vLLM's key")


def _priced(settings: Settings, name: str, what: str, gpu: str, containers: int) -> Planned:
    price = price_per_second(settings, gpu)
    return Planned("class", name, what, gpu, containers, None if price is None else price * 3600)


def make_key(settings: Settings, *, new: bool) -> Key:
    """See to it that the secret of vLLM's key is there.

    Raises:
        ConfigurationError: `new`, while VLLM_API_KEY says what the key is.
    """
    import modal

    wanted = vllm_key(settings)
    if new and wanted:
        raise ConfigurationError(f"{KEY_VARIABLE} says what the key is: unset it to have a new one drawn, or leave --new-key out")
    drawn = secrets.token_urlsafe(KEY_BYTES)
    name, where = key_secret(settings), settings.modal_environment
    with modal_asked():
        try:
            modal.Secret.objects.create(name, {KEY_VARIABLE: wanted or drawn}, environment_name=where)
        except modal.exception.AlreadyExistsError:
            if not (wanted or new):
                return Key("kept")
            modal.Secret.from_name(name, environment_name=where).update({KEY_VARIABLE: wanted or drawn})
    return Key("set") if wanted else Key("drawn", drawn)


def deploy_app(settings: Settings) -> str:
    """Deploy, with the SDK's own account of it on standard output. Returns where Modal shows the app.

    The app's module is built from the settings when it is imported: those of the environment.

    Raises:
        ConfigurationError: Modal refuses what the settings say, such as a GPU or a secret that it does not know.
        BackendUnavailable: an image could not be built, Modal cannot be reached, or does not accept the token.
    """
    import modal

    from claas.training.engine.modal_app import app

    with modal_asked(), modal.enable_output():
        try:
            deployed = app.deploy(environment_name=settings.modal_environment)
        except modal.exception.ImageBuildError as error:
            raise BackendUnavailable("an image could not be built: what is printed above says why") from error
        except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
            raise ConfigurationError(f"Modal refuses the app: {error}") from error
        url: str = deployed.get_dashboard_url()
    return url
