"""Settings → who trains and who serves in modal mode. Heavy imports stay inside, so that an error can name what to install."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from claas.core.errors import ConfigurationError
from claas.core.modal_prices import price_per_second
from claas.core.settings import Settings
from claas.inference.base import InferenceBackend
from claas.training.engine.base import TrainingEngine

if TYPE_CHECKING:
    from claas.models.base_model import BaseModel
    from claas.training.engine.modal import ModalEngine

CACHE = "modal"
"""The folder of fetched adapter versions, in data_dir."""

InUse = Callable[[str, int], bool]

log = logging.getLogger(__name__)


async def open_modal(settings: Settings, *, progress: bool) -> tuple[TrainingEngine, InferenceBackend, str]:
    """Who trains, who serves, and the base model's name. Raises ConfigurationError."""
    try:
        import modal  # noqa: F401 - asked for, so that the error below can name it

        from claas.models.load import load_base_model
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is missing: pip install 'claas[local,modal]'") from error
    named = settings.model_copy(update={"base_model_id": settings.modal_base_model})
    if settings.modal_serving == "vllm":
        return await _with_vllm(named)
    from claas.inference.embedded import EmbeddedInference
    from claas.models.compute import ComputeShare, usable_cores

    base = await asyncio.to_thread(load_base_model, named, progress=progress)
    inference: EmbeddedInference
    engine = await asyncio.to_thread(_engine, named, base, lambda *version: inference.in_use(*version), None)  # noqa: PLW0108 - there is none yet
    inference = EmbeddedInference(
        base,
        ComputeShare(usable_cores()),
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        default_max_tokens=settings.default_max_tokens,
    )
    return engine, inference, base.id


async def _with_vllm(settings: Settings) -> tuple[TrainingEngine, InferenceBackend, str]:
    """The app's own vLLM answers."""
    from claas.inference.vllm import VllmInference, vllm_on_modal
    from claas.inference.vllm_control import DeviceMemory
    from claas.models.load import describe_base_model

    if settings.vllm_api_key is None:
        raise ConfigurationError(
            "the vLLM on Modal asks for a key: set VLLM_API_KEY to the one that `claas modal deploy` showed, or "
            "CLAAS_MODAL_SERVING=embedded"
        )
    base = await asyncio.to_thread(describe_base_model, settings)
    url = await asyncio.to_thread(_vllm_url, settings)
    mount = settings.modal_volume_path
    inference: VllmInference
    engine = await asyncio.to_thread(_engine, settings, base, lambda *version: inference.in_use(*version), mount)  # noqa: PLW0108 - as above
    inference = VllmInference(vllm_on_modal(settings, url), base.tokenizer, DeviceMemory(lambda: 0, lambda: None))
    return engine, inference, base.id


def _engine(settings: Settings, base: BaseModel, in_use: InUse, mount: PurePosixPath | None) -> ModalEngine:
    import modal

    from claas.adapters.modal_lease import ModalLease
    from claas.adapters.modal_volume import ModalVolumeStore
    from claas.training.engine.modal import ModalEngine
    from claas.training.engine.modal_calls import ModalCalls
    from claas.training.engine.modal_wire import VOLUME_VERSION

    where = settings.modal_environment
    volume = modal.Volume.from_name(
        f"{settings.modal_app}-adapters", environment_name=where, create_if_missing=True, version=VOLUME_VERSION
    )
    leases = modal.Dict.from_name(f"{settings.modal_app}-leases", environment_name=where, create_if_missing=True)
    store = ModalVolumeStore(volume, settings.data_dir / CACHE, keep_versions=settings.keep_versions, in_use=in_use)
    for line in store.recover():
        log.warning("%s", line)
    return ModalEngine(
        store,
        base,
        ModalCalls(settings, leases),
        ModalLease(leases, timeout_s=settings.feedback_lock_timeout_s),
        price=partial(price_per_second, settings),
        mount=mount,
        allowed_base_models=settings.allowed_init_base_models,
    )


def _vllm_url(settings: Settings) -> str:
    """Asks Modal's control plane, no container. Raises BackendUnavailable."""
    import modal

    from claas.adapters.modal_errors import modal_errors

    with modal_errors():
        server = modal.Cls.from_name(settings.modal_app, "VllmServer", environment_name=settings.modal_environment)()
        return str(server.web.get_web_url())
