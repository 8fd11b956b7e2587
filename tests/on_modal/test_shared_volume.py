"""Two services, each with a database of its own, and a worker, on one Volume: who learns and who answers at the same time sees whole
versions only, the latest ones, and no number twice."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from claas.adapters.store import MANIFEST, WEIGHTS
from claas.api.app import create_app
from claas.core.types import AdapterVersion
from claas.services import Services
from claas.training.engine.modal import FRESH_S
from claas.wiring import open_services
from tests.conformance.talk import finished, item, said, teach
from tests.modal_server.processes import containers_possible
from tests.modal_server.server import ModalDouble
from tests.on_modal.stage import modal_settings

A = "assistant"
LESSONS, READS = 25, 25
SLACK_S = 8.0
"""What a look at the Volume may take on a busy machine."""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not containers_possible(), reason="this machine lets nobody make namespaces"),
]


@dataclass
class Service:
    services: Services
    http: httpx.AsyncClient


@dataclass
class Seen:
    """What was taught, as (version, parent); since when each version serves; and what the weights of each version were."""

    lessons: list[tuple[int, int]] = field(default_factory=list)
    serves_since: dict[int, float] = field(default_factory=lambda: {0: time.monotonic()})
    weights: dict[int, str] = field(default_factory=dict)

    def must_serve(self, asked_at: float) -> int:
        """The version that a reply begun then must at least come from."""
        return max(version for version, since in self.serves_since.items() if since < asked_at - FRESH_S - SLACK_S or version == 0)


@asynccontextmanager
async def open_service(folder: Path, model: Path) -> AsyncIterator[Service]:
    async with open_services(modal_settings(folder, model, keep_versions=LESSONS + 2)) as services:
        app = create_app(lambda: nullcontext(services))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=300.0) as http,
        ):
            yield Service(services, http)


async def test_lessons_and_reads_of_two_services(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> None:
    seen = Seen()
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(open_service(tmp_path / name, tiny_model_dir)) for name in ("one", "two")]
        seen.serves_since[0] = time.monotonic()
        watching = [asyncio.create_task(watch(service, seen)) for service in both]
        share = (LESSONS + 1) // 2
        await asyncio.gather(learn(both[0], share, seen), learn(both[1], LESSONS - share, seen), read(both[0], seen), read(both[1], seen))
        for task in watching:
            task.cancel()
        ended = await asyncio.gather(*watching, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
        await asyncio.sleep(FRESH_S)
        for service in both:
            await latest(service)  # looks again behind this one
        await asyncio.sleep(1.0)
        newest = max(version for version, _ in seen.lessons)
        assert [await latest(service) for service in both] == [newest, newest]
    in_order = sorted(seen.lessons)
    assert len({version for version, _ in in_order}) == len(in_order) == LESSONS, "no number twice"
    assert [parent for _, parent in in_order] == [0, *(version for version, _ in in_order[:-1])], "each goes on from the latest there was"
    assert len(seen.weights) > LESSONS // 2
    assert modal_double.unimplemented == []


async def learn(service: Service, times: int, seen: Seen) -> None:
    for _ in range(times):
        lesson = await teach(service.http, item(await finished(service.http)))
        assert lesson["status"] == "ok", lesson
        seen.lessons.append((lesson["version"], lesson["distill_result"]["metadata"]["parent"]))
        seen.serves_since[lesson["version"]] = time.monotonic()


async def read(service: Service, seen: Seen) -> None:
    """Chats, and what versions there are."""
    for _ in range(READS // 2 + 1):
        assert (await said(service.http))["model"] == A
        numbers = [version.version for version in await service.services.engine.versions(A)]
        assert numbers == sorted(set(numbers))
        await asyncio.sleep(0.5)


async def watch(service: Service, seen: Seen) -> None:
    """What would serve now is whole, always the same for its number, and not older than it may be."""
    while True:
        asked_at = time.monotonic()
        ref = await service.services.engine.lora_runtime_ref(A)
        assert ref.version >= seen.must_serve(asked_at), "stale"
        digest = await asyncio.to_thread(_whole, Path(ref.lora_path))
        assert seen.weights.setdefault(ref.version, digest) == digest, "torn"
        await asyncio.sleep(0.2)


def _whole(folder: Path) -> str:
    """A digest of the weights of a version whose files are all there."""
    manifest = AdapterVersion.model_validate_json((folder / MANIFEST).read_bytes())
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert sum(sizes) == manifest.size_bytes
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


async def latest(service: Service) -> int:
    return (await service.services.engine.lora_runtime_ref(A)).version
