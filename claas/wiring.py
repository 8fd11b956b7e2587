"""Settings → Services: the only place that chooses a backend, and the order in which parts open and close."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from claas.core.errors import ClaasError, ConfigurationError, Conflict
from claas.core.settings import Settings
from claas.core.types import LoraInitRequest
from claas.inference.base import InferenceBackend
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.learner import Learner
from claas.learning.ledger import Ledger
from claas.learning.lesson_book import LessonBook
from claas.learning.lifecycle import AdapterLifecycle
from claas.learning.locks import AdapterLocks
from claas.learning.recovery import recover
from claas.learning.retraction import Retraction
from claas.learning.updater import Updater
from claas.rollouts.pruning import pruned_regularly
from claas.rollouts.sql import SqlRolloutStore
from claas.services import Services
from claas.storage.database import Database
from claas.training.engine.base import TrainingEngine
from claas.wiring_modal import open_modal

if TYPE_CHECKING:
    from claas.models.base_model import LoadedModel
    from claas.models.compute import ComputeShare
    from claas.training.engine.local import LocalEngine

LOCK_FILE = "claas.lock"

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_services(settings: Settings, *, progress: bool = False) -> AsyncIterator[Services]:
    """Open everything a service needs, recover from a crash, and close it all again in reverse order.

    Raises:
        ConfigurationError: a wrong setting, a missing extra, or a data folder that another service uses.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(_only_service(settings))
        database = Database(settings.sqlalchemy_url)
        stack.callback(database.close)
        await asyncio.to_thread(database.migrate)
        if settings.distill_execution_mode == "local":
            engine, inference, base_id = await _local(settings, progress)
        elif settings.distill_execution_mode == "tinker":
            engine, inference, base_id = await _tinker(settings, database, stack)
        else:
            engine, inference, base_id = await open_modal(settings, progress=progress)
        rollouts = SqlRolloutStore(database, max_count=settings.completion_cache_size, max_age_days=settings.rollout_max_age_days)
        feedback = FeedbackStore(database)
        journal = Journal(database, settings.log_dir)
        book = LessonBook(database)
        locks = AdapterLocks(settings.feedback_lock_timeout_s, engine)
        updater = Updater(engine, inference, book)
        learner = Learner(engine, inference, rollouts, updater, Ledger(feedback, journal, engine), locks, base_id)
        retraction = Retraction(engine, updater, feedback, journal, book, locks)
        lifecycle = AdapterLifecycle(engine, inference, rollouts, feedback, journal, book, locks, base_id)
        # Closed in reverse: no new steps (and a serving engine that slept is woken), no new tokens, then what waits for either ends.
        stack.push_async_callback(learner.aclose)
        stack.push_async_callback(retraction.aclose)
        stack.push_async_callback(inference.aclose)
        stack.push_async_callback(engine.aclose)
        services = Services(settings, base_id, engine, inference, rollouts, feedback, journal, lifecycle, learner, retraction)
        await _begin(services)
        await stack.enter_async_context(pruned_regularly(rollouts))
        yield services


Backends = tuple[TrainingEngine, InferenceBackend, str]
"""Who trains, who serves, and the base model's name."""


async def _local(settings: Settings, progress: bool) -> Backends:
    """Training in this process, and serving here or by a vLLM."""
    # Heavy imports stay in here, so that the error can name what to install.
    try:
        from claas.adapters.filesystem import FilesystemAdapterStore
        from claas.models.compute import ComputeShare, usable_cores
        from claas.models.load import load_base_model
        from claas.training.engine.local import LocalEngine
        from claas.training.residency import RESIDENT, Visiting
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is missing: pip install 'claas[local]'") from error

    beside_vllm = settings.vllm_base_url is not None
    base = await asyncio.to_thread(load_base_model, settings, progress=progress, on_host=beside_vllm)
    store = FilesystemAdapterStore(
        settings.adapters_dir,
        keep_versions=settings.keep_versions,
        in_use=lambda lora_id, version: inference.in_use(lora_id, version),  # noqa: PLW0108 - there is none yet
    )
    for line in await asyncio.to_thread(lambda: list(store.recover())):
        log.warning("%s", line)
    share = ComputeShare(usable_cores())
    residency = await asyncio.to_thread(Visiting, base) if beside_vllm else RESIDENT
    engine = LocalEngine(store, base, share, settings.allowed_init_base_models, residency)
    inference = _local_inference(settings, base, share, engine)
    return engine, inference, base.id


def _local_inference(settings: Settings, base: LoadedModel, share: ComputeShare, engine: LocalEngine) -> InferenceBackend:
    """vLLM, if one is named; else the base model in this process."""
    if settings.vllm_base_url is not None:
        from claas.inference.vllm import VllmInference, vllm_of
        from claas.inference.vllm_control import DeviceMemory

        memory = DeviceMemory(engine.memory_needed, engine.free_memory, engine.memory_wanted)
        return VllmInference(vllm_of(settings), base.tokenizer, memory)
    from claas.inference.embedded import EmbeddedInference

    return EmbeddedInference(
        base,
        share,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        default_max_tokens=settings.default_max_tokens,
    )


async def _tinker(settings: Settings, database: Database, stack: AsyncExitStack) -> Backends:
    """Training and serving on a Tinker server."""
    try:
        from claas.adapters.tinker import TinkerAdapters, import_state_file
        from claas.inference.tinker import TinkerInference
        from claas.models.tinker_model import load_tinker_model
        from claas.models.tinker_runs import TinkerRuns
        from claas.models.tinker_server import TinkerServer
        from claas.training.engine.tinker import TinkerEngine
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is missing: pip install 'claas[tinker]'") from error

    server = TinkerServer(
        base_url=settings.tinker_base_url,
        api_key=settings.tinker_key,
        timeout_s=settings.tinker_timeout_s,
        patience_s=settings.tinker_patience_s,
        prices=settings.tinker_prices,
    )
    stack.push_async_callback(server.aclose)
    model = await asyncio.to_thread(load_tinker_model, settings, await server.models())
    adapters = TinkerAdapters(database, keep_versions=settings.keep_versions)
    if settings.tinker_state_path is not None:
        for line in await import_state_file(adapters, settings.tinker_state_path, model.id):
            log.warning("%s", line)
    runs = TinkerRuns(server, adapters, model, max_runs=settings.tinker_max_runs)
    stack.push_async_callback(runs.aclose)
    engine = TinkerEngine(
        server,
        runs,
        adapters,
        model,
        rank=settings.tinker_lora_rank,
        top_k=settings.tinker_top_k,
        reduction=settings.tinker_loss_reduction,
        ttl_s=settings.tinker_checkpoint_ttl_s,
        allowed_base_models=settings.allowed_init_base_models,
    )
    for line in await engine.recover():
        log.warning("%s", line)
    return engine, TinkerInference(server, runs, adapters, model, max_queue=settings.max_queue, top_k=settings.tinker_top_k), model.id


async def _begin(services: Services) -> None:
    """Settle what a crash left open; have one adapter ready to learn."""
    await services.inference.begin()
    for line in await recover(services.engine, services.feedback, services.journal):
        log.warning("%s", line)
    await services.retraction.resume()
    adapter = services.settings.default_adapter
    if not (await services.engine.lora_exists(adapter)).exists:
        with suppress(Conflict):  # another service on the same adapters was faster
            await services.lifecycle.init(LoraInitRequest(lora_id=adapter))
    try:
        await services.inference.activate(await services.engine.lora_runtime_ref(adapter))
    except ClaasError as error:  # such as a server of its own that comes later: until then requests are told so
        log.warning("%s", error.message)


@contextmanager
def _only_service(settings: Settings) -> Iterator[None]:
    """Two services on one data folder would overwrite each other: the second one does not start."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        settings.adapters_dir.mkdir(parents=True, exist_ok=True)
        locks = [FileLock(folder / LOCK_FILE, blocking=False) for folder in {settings.data_dir.resolve(), settings.adapters_dir.resolve()}]
        with locks[0], locks[-1]:
            yield
    except Timeout:
        raise ConfigurationError("another service uses this data folder: stop it, or give this one a data_dir of its own") from None
