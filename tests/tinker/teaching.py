"""An engine on a Tinker server, as the service opens one, over a database in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from claas.adapters.tinker import TinkerAdapter, TinkerAdapters, TinkerVersion
from claas.core.types import AdapterVersion, LoraRuntimeRef
from claas.core.usage import TokenUse
from claas.inference.tinker import TinkerInference
from claas.models.base_model import LoadedModel
from claas.models.tinker_model import TinkerModel
from claas.models.tinker_runs import TinkerRuns
from claas.models.tinker_server import TinkerServer
from claas.storage.database import Database
from claas.training.engine.tinker import TinkerEngine
from tests.doubles.tinker_faults import Ways
from tests.doubles.tinker_server import KEY, TinkerDouble

PRICES: dict[TokenUse, float] = {"sampled": 2.0, "scored": 1.0, "trained": 3.0}


def described(model: LoadedModel) -> TinkerModel:
    """What `load_tinker_model` would know of it."""
    stop = frozenset([model.tokenizer.eos_token_id])
    return TinkerModel(model.id, model.tokenizer, model.config.vocab_size, model.max_context, model.n_params, stop)


@dataclass(frozen=True, slots=True)
class Place:
    """A server and its base model, as the service knows them."""

    url: str
    key: str
    model: TinkerModel


def place_of(server: TinkerDouble) -> Place:
    return Place(server.url, KEY, described(server.model))


@asynccontextmanager
async def connected(place: Place, *, max_runs: int = 4, **how: Any) -> AsyncIterator[tuple[TinkerServer, TinkerAdapters, TinkerRuns]]:
    database = Database("sqlite://")
    database.migrate()
    adapters = TinkerAdapters(database, keep_versions=10)
    settings: dict[str, Any] = {"timeout_s": 60.0, "patience_s": 1.0, "prices": PRICES} | how
    connection = TinkerServer(base_url=place.url, api_key=place.key, **settings)
    runs = TinkerRuns(connection, adapters, place.model, max_runs=max_runs)
    try:
        yield connection, adapters, runs
    finally:
        await runs.aclose()
        await connection.aclose()
        database.close()


@asynccontextmanager
async def teaching(place: Place, *, top_k: int = 20, **how: Any) -> AsyncIterator[tuple[TinkerEngine, TinkerAdapters]]:
    """The engine, and where its adapters are on record."""
    async with connected(place, **how) as (connection, adapters, runs):
        engine = TinkerEngine(connection, runs, adapters, place.model, rank=8, top_k=top_k)
        try:
            yield engine, adapters
        finally:
            await engine.aclose()


@asynccontextmanager
async def sampling(
    model: LoadedModel, ways: Ways, *, max_context: int
) -> AsyncIterator[tuple[TinkerInference, Callable[[int], LoraRuntimeRef]]]:
    """A backend on a double of its own, and versions 1 and 2 of an adapter with random weights, each saved by a run of its own."""
    with TinkerDouble(model, ways, poll_s=0.2) as server:
        async with connected(place_of(server)) as (connection, adapters, runs):
            await adapters.create(TinkerAdapter(lora_id="me/a", base_model=model.id, rank=4))
            refs = {number: await _saved(server, connection, adapters, number) for number in (1, 2)}
            described_model = replace(described(model), max_context=max_context)
            backend = TinkerInference(connection, runs, adapters, described_model, max_queue=100, top_k=20)
            try:
                yield backend, refs.__getitem__
            finally:
                await backend.aclose()


async def _saved(server: TinkerDouble, connection: TinkerServer, adapters: TinkerAdapters, number: int) -> LoraRuntimeRef:
    run = await connection.new_run(server.model.id, rank=4, train_attn=True, train_mlp=True)
    generator = torch.Generator().manual_seed(number)
    lora = server.engine.live[run.id].trainee.lora
    for name in sorted(lora):
        lora[name] = torch.randn(lora[name].shape, generator=generator) * 0.1
    assert await adapters.reserve("me/a", run.id) == number
    state, sampler = [await connection.wait(save(f"v{number}")) for save in (run.client.save_state, run.client.save_weights_for_sampler)]
    await connection.end_run(run)
    manifest = AdapterVersion(lora_id="me/a", version=number, parent=0, base_model=server.model.id)
    await adapters.publish(TinkerVersion(manifest=manifest, state_path=state.path, sampler_path=sampler.path))
    return LoraRuntimeRef(lora_id="me/a", version=number, vllm_name=f"claas-me~a-v{number}", lora_path=state.path)
