"""Two services, processes with a database of their own each, and a worker, on one Volume: who learns and who answers at the same time sees
whole versions only, the latest ones, and no number twice."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load

from claas.adapters.store import WEIGHTS
from claas.training.engine.modal import FRESH_S
from tests.conformance.talk import CHAT, HELLO, finished, item, said, teach, versions
from tests.integration.process import running
from tests.modal_server.processes import containers_possible
from tests.modal_server.server import ModalDouble
from tests.on_modal.stage import operators

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
class Seen:
    """What was taught, as (version, parent); since when each version serves; and what the weights of each version were."""

    lessons: list[tuple[int, int]] = field(default_factory=list)
    serves_since: dict[int, float] = field(default_factory=lambda: {0: time.monotonic()})
    weights: dict[int, str] = field(default_factory=dict)

    def must_serve(self, asked_at: float) -> int:
        """The version that a reply begun then must at least come from."""
        return max(version for version, since in self.serves_since.items() if since < asked_at - FRESH_S - SLACK_S or version == 0)


@asynccontextmanager
async def open_service(server: ModalDouble, folder: Path, model: Path) -> AsyncIterator[httpx.AsyncClient]:
    """`claas serve` as a process, asked over HTTP."""
    environment = server.environment() | operators(model) | {"CLAAS_KEEP_VERSIONS": str(LESSONS + 2), "CLAAS_DEVICE": "cpu"}
    process = running(folder, base_model=None, **environment, CLAAS_DISTILL_EXECUTION_MODE="modal")
    service = await asyncio.to_thread(process.__enter__)
    try:
        async with httpx.AsyncClient(base_url=service.url, timeout=300.0) as http:
            yield http
    finally:
        await asyncio.to_thread(process.__exit__, None, None, None)


async def test_lessons_and_reads_of_two_services(modal_double: ModalDouble, tiny_model_dir: Path, tmp_path: Path) -> None:
    seen = Seen()
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(open_service(modal_double, tmp_path / name, tiny_model_dir)) for name in ("one", "two")]
        seen.serves_since[0] = time.monotonic()
        watching = [asyncio.create_task(watch(service, seen)) for service in both]
        share = (LESSONS + 1) // 2
        await asyncio.gather(learn(both[0], share, seen), learn(both[1], LESSONS - share, seen), read(both[0]), read(both[1]))
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


async def learn(service: httpx.AsyncClient, times: int, seen: Seen) -> None:
    for _ in range(times):
        lesson = await teach(service, item(await finished(service)))
        assert lesson["status"] == "ok", lesson
        seen.lessons.append((lesson["version"], lesson["distill_result"]["metadata"]["parent"]))
        seen.serves_since[lesson["version"]] = time.monotonic()


async def read(service: httpx.AsyncClient) -> None:
    """Chats, and what versions there are."""
    for _ in range(READS // 2 + 1):
        assert (await said(service))["model"] == A
        numbers = [version for version, _ in (await versions(service))[1]]
        assert numbers == sorted(set(numbers))
        await asyncio.sleep(0.5)


async def watch(service: httpx.AsyncClient, seen: Seen) -> None:
    """What serves now is whole, always the same for its number, and not older than it may be."""
    while True:
        asked_at = time.monotonic()
        version = await latest(service)
        assert version >= seen.must_serve(asked_at), "stale"
        digest = await weights(service, version)
        assert seen.weights.setdefault(version, digest) == digest, "torn"
        await asyncio.sleep(0.2)


async def weights(service: httpx.AsyncClient, version: int) -> str:
    """A digest of a version's weights, all of which are there: safetensors are read to their end."""
    answer = await service.get("/v1/lora/export", params={"lora_id": A, "version": version})
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        content = archive.read(WEIGHTS)
    assert load(content)
    return hashlib.sha256(content).hexdigest()


async def latest(service: httpx.AsyncClient) -> int:
    """Which version speaks now."""
    answer = await service.post(CHAT, json=HELLO | {"max_tokens": 1})
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-claas-adapter"].removeprefix(f"{A}@"))
