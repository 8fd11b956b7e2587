"""The app on Modal: who trains, who answers, and the service itself. The only file that declares anything on Modal.

It is imported where it is deployed, and again in each container. Both read the same settings: those of the operator's environment are
baked into the images. Importing it asks nobody anything.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import modal

from claas.core.errors import ConfigurationError
from claas.core.settings import load_settings
from claas.training.engine.modal_image import vllm_image, worker_image
from claas.training.engine.modal_wire import VOLUME_VERSION, tags_of

KEY_VARIABLE = "VLLM_API_KEY"
REQUESTS_AT_ONCE = 256
SERVICES = 2
"""How many may share the vLLM before it reads an adapter's files more than once."""

log = logging.getLogger(__name__)
settings = load_settings(distill_execution_mode="modal")
environment = settings.modal_environment
adapters, models = (
    modal.Volume.from_name(f"{settings.modal_app}-{kept}", environment_name=environment, create_if_missing=True, version=VOLUME_VERSION)
    for kept in ("adapters", "models")
)
leases = modal.Dict.from_name(f"{settings.modal_app}-leases", environment_name=environment, create_if_missing=True)
secrets = [modal.Secret.from_name(name, environment_name=environment) for name in settings.modal_secrets]
ADAPTERS, MODELS = settings.modal_volume_path, settings.modal_models_path
vllm_key = modal.Secret.from_name(f"{settings.modal_app}-key", environment_name=environment, required_keys=[KEY_VARIABLE])
with_key = [*secrets, vllm_key] if settings.modal_serving == "vllm" else secrets
app = modal.App(settings.modal_app, tags=tags_of(settings), include_source=False)


@app.cls(
    image=worker_image(settings),
    gpu=settings.modal_gpu,
    volumes={ADAPTERS: adapters, MODELS: models},
    secrets=secrets,
    max_containers=settings.modal_max_containers,
    scaledown_window=settings.modal_scaledown_s,
    timeout=settings.modal_timeout_s,
    startup_timeout=settings.modal_start_timeout_s,
    enable_memory_snapshot=True,
)
class DistillWorker:
    """Trains lessons, one at a time in a container."""

    @modal.enter(snap=True)
    def load(self) -> None:
        """The base model, in host memory: what the snapshot holds, from which later containers start.

        With `.local()` there is neither Volume nor Dict: adapters are in the folder that the settings name.
        """
        from claas.training.engine.modal_worker import Worker

        if modal.is_local():
            self._worker = Worker(settings.model_copy(update={"modal_volume_path": settings.adapters_dir}))
        else:
            self._worker = Worker(settings, adapters, leases)

    @modal.enter(snap=False)
    def start(self) -> None:
        """After the snapshot: the GPU, if there is one, and the Volume as it is now."""
        self._worker.start()

    @modal.method()
    def distill(self, request: str) -> str:
        return self._worker.distill(request)

    @modal.method()
    def health(self) -> str:
        return self._worker.health()

    @modal.exit()
    def close(self) -> None:
        self._worker.close()


if settings.modal_serving == "vllm":

    @app.cls(
        image=vllm_image(settings),
        gpu=settings.modal_vllm_gpu,
        volumes={ADAPTERS: adapters.with_mount_options(read_only=True), MODELS: models},
        secrets=with_key,
        max_containers=1,  # adapters are loaded by name, and a second one would not have them
        scaledown_window=settings.modal_scaledown_s,
        timeout=settings.modal_timeout_s,
        startup_timeout=settings.modal_start_timeout_s,
    )
    @modal.concurrent(max_inputs=REQUESTS_AT_ONCE)
    class VllmServer:
        """vLLM, and the guard in front of it."""

        @modal.enter()
        def start(self) -> None:
            from claas.inference.modal_vllm import VllmProcess

            assert settings.modal_base_model is not None
            self._vllm = VllmProcess(
                settings.modal_base_model,
                os.environ,
                max_cpu_loras=SERVICES * settings.vllm_max_adapters,
                gone=_end_container,
                flags=settings.modal_flags,
            )

        @modal.asgi_app()
        def web(self) -> object:
            from claas.inference.modal_guard import Guard

            return Guard(
                self._vllm,
                os.environ[KEY_VARIABLE],
                mount=Path(settings.modal_volume_path),
                reload=adapters.reload,
                gone=_end_container,
                ready_timeout_s=settings.modal_start_timeout_s,
            )

        @modal.exit()
        def stop(self) -> None:
            self._vllm.stop()


@app.function(image=worker_image(settings), volumes={MODELS: models}, secrets=with_key, timeout=settings.modal_timeout_s)
@modal.concurrent(max_inputs=REQUESTS_AT_ONCE)
@modal.asgi_app()
def api() -> object:
    """The service, for who has a PostgreSQL: without a GPU, and with as many containers as it takes.

    Raises ConfigurationError without keys or a database of its own: SQLite on a Volume is overwritten by the second container.
    """
    from claas.api.app import create_app
    from claas.wiring import open_services

    if not settings.api_keys:
        raise ConfigurationError(
            "api can be reached by anybody, so a key is needed: put CLAAS_API_KEYS into a secret of CLAAS_MODAL_SECRETS"
        )
    if settings.database_url is None or settings.database_url.startswith("sqlite"):
        raise ConfigurationError("api needs a PostgreSQL: put CLAAS_DATABASE_URL into a secret of CLAAS_MODAL_SECRETS")
    return create_app(partial(open_services, settings))


def _end_container() -> None:
    """Let requests that run end, and take no more: Modal starts another container. If it is not heard, the next request says so again."""
    import modal.experimental

    try:
        modal.experimental.stop_fetching_inputs()
    except modal.exception.Error as error:
        log.warning("Modal could not be told that this container is done: %s", error)
