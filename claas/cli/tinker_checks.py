"""What `claas doctor` looks at in a Tinker server. Only asks: nothing is trained or saved, a text of two tokens is scored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING

from claas.cli.findings import Finding
from claas.core.errors import ClaasError, ConfigurationError
from claas.core.settings import TINKER_BASE_MODEL, Settings

if TYPE_CHECKING:
    from claas.models.tinker_server import TinkerServer

TIMEOUT_S = 60.0


def check_tinker(settings: Settings) -> Iterator[Finding]:
    """The server that the settings name: the first thing that keeps it from being asked further is the last finding."""

    async def all_of_them() -> list[Finding]:
        return [finding async for finding in _ask(settings)]

    yield from asyncio.run(all_of_them())


async def _ask(settings: Settings) -> AsyncIterator[Finding]:
    from claas.models.tinker_server import TinkerServer

    url = settings.tinker_base_url
    server = TinkerServer(base_url=url, api_key=settings.tinker_key, timeout_s=TIMEOUT_S, patience_s=10.0)
    try:
        await server.ping()
        yield Finding("tinker", "ok", f"answers at {url}")
        served = await server.models()
        yield Finding("tinker key", "ok", "taken" if settings.tinker_api_key else "none set, and none asked for")
        model = check_model(served, settings.base_model_id or TINKER_BASE_MODEL)
        yield model
        if model.status == "ok":
            async for finding in _try(server, settings, served):
                yield finding
    except ConfigurationError as error:
        yield Finding("tinker key", "fail", error.message)
    except ClaasError as error:
        yield Finding("tinker", "fail", f"{error.message} ({url}); CLAAS_TINKER_BASE_URL says where it is")
    finally:
        await server.aclose()


def check_model(served: Mapping[str, int | None], name: str) -> Finding:
    if name not in served:
        there = ", ".join(sorted(served)[:20]) or "none"
        return Finding("tinker model", "fail", f"the server has no {name}: set CLAAS_BASE_MODEL_ID to one of its own, {there}")
    context = f", {served[name]} tokens" if served[name] else ""
    return Finding("tinker model", "ok", f"{name}{context}")


async def _try(server: TinkerServer, settings: Settings, served: Mapping[str, int | None]) -> AsyncIterator[Finding]:
    """Its tokenizer, and what the server tells of a text."""
    from claas.models.tinker_model import load_tinker_model

    try:
        model = await asyncio.to_thread(load_tinker_model, settings, served)
    except ConfigurationError as error:
        yield Finding("tinker tokenizer", "fail", error.message)
        return
    yield Finding("tinker tokenizer", "ok", f"{model.vocab_size} tokens, replies end with {sorted(model.stop_ids)}")
    token = [min(model.stop_ids)]
    scored = await server.score(await server.sampler(base_model=model.id), token, token, settings.tinker_top_k)
    if scored.top is None:
        told = "tells of a text's own tokens only: lessons compare the sampled token and the rest, and top_logprobs is refused"
        yield Finding("tinker teacher", "warn" if settings.tinker_top_k else "ok", told)
    else:
        yield Finding("tinker teacher", "ok", f"tells a place's {len(scored.top[0])} likeliest tokens")
