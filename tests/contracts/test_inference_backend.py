"""What every InferenceBackend promises, asked of each: the embedded one over a tiny real model, vLLM's over its own
double, and the double that other tests use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from claas.core.errors import BackendUnavailable, ContextOverflow
from claas.core.types import ChatMessage, LoraRuntimeRef, RoomPlan, SamplingParams
from claas.inference.base import Generation, GenerationChunk, GenerationRequest, InferenceBackend
from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.compute import ComputeShare
from tests.doubles.inference import CharInference
from tests.doubles.tinker_faults import CLOUD, SKYRL
from tests.doubles.vllm_server import VllmDouble
from tests.inference.vllm_serving import serving
from tests.models.tiny import adapter_ref
from tests.tinker.teaching import sampling

CONTEXT = 512


@dataclass(frozen=True)
class Served:
    """A backend with `CONTEXT` tokens of context, and a way to make an adapter version for it."""

    backend: InferenceBackend
    adapter: Callable[[int], LoraRuntimeRef]


@asynccontextmanager
async def embedded(tiny_model: LoadedModel, folder: Path) -> AsyncIterator[Served]:
    backend = EmbeddedInference(tiny_model, ComputeShare(1), max_batch=4, max_context=CONTEXT)
    try:
        yield Served(backend, lambda version: adapter_ref(folder, tiny_model, seed=version, version=version))
    finally:
        await backend.aclose()


@asynccontextmanager
async def double(_: LoadedModel, folder: Path) -> AsyncIterator[Served]:
    def adapter(version: int) -> LoraRuntimeRef:
        return LoraRuntimeRef(lora_id="me/a", version=version, vllm_name=f"claas-me~a-v{version}", lora_path=str(folder))

    yield Served(CharInference(max_context=CONTEXT), adapter)


@asynccontextmanager
async def vllm(tiny_model: LoadedModel, folder: Path) -> AsyncIterator[Served]:
    with VllmDouble(tiny_model.tokenizer, max_model_len=CONTEXT, step_s=0.001) as server:
        async with serving(server, folder, tiny_model.tokenizer) as backend:
            yield Served(backend, lambda version: adapter_ref(folder, tiny_model, seed=version, version=version))
        assert server.violations == []


@asynccontextmanager
async def tinker(tiny_model: LoadedModel, _: Path) -> AsyncIterator[Served]:
    async with sampling(tiny_model, CLOUD, max_context=CONTEXT) as (backend, adapter):
        yield Served(backend, adapter)


@asynccontextmanager
async def tinker_of_ones_own(tiny_model: LoadedModel, _: Path) -> AsyncIterator[Served]:
    async with sampling(tiny_model, SKYRL, max_context=CONTEXT) as (backend, adapter):
        yield Served(backend, adapter)


BACKENDS = {"embedded": embedded, "double": double, "vllm": vllm, "tinker": tinker, "tinker-own": tinker_of_ones_own}
TELLING_ALTERNATIVES = [name for name in BACKENDS if name != "tinker-own"]  # docs/tinker.md: some servers do not


@pytest.fixture(params=BACKENDS)
async def served(request: pytest.FixtureRequest, tiny_model: LoadedModel, tmp_path: Path) -> AsyncIterator[Served]:
    async with BACKENDS[request.param](tiny_model, tmp_path) as made:
        yield made


def ask(
    text: str = "Who are you?", adapter: LoraRuntimeRef | None = None, *, background: bool = False, **sampling: object
) -> GenerationRequest:
    params = SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 12} | sampling)
    return GenerationRequest(messages=(ChatMessage(role="user", content=text),), adapter=adapter, sampling=params, background=background)


async def drain(backend: InferenceBackend, request: GenerationRequest) -> tuple[tuple[int, ...], list[GenerationChunk]]:
    stream = await backend.stream(request)
    chunks = [chunk async for chunk in stream]
    return stream.prompt_token_ids, chunks


def together(prompt: tuple[int, ...], chunks: list[GenerationChunk]) -> Generation:
    assert chunks[-1].finish_reason is not None
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Generation(prompt, tokens, "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason)


async def test_a_stream_put_together_is_the_complete_reply(served: Served) -> None:
    whole = await served.backend.complete(ask())
    prompt, chunks = await drain(served.backend, ask())
    assert together(prompt, chunks) == whole
    assert whole.prompt_token_ids and whole.tokens


async def test_only_the_last_chunk_says_how_it_ended(served: Served) -> None:
    _, chunks = await drain(served.backend, ask())
    assert len(chunks) > 1
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_max_tokens_ends_a_reply_at_that_many(served: Served) -> None:
    reply = await served.backend.complete(ask(max_tokens=3))
    assert (len(reply.tokens), reply.finish_reason) == (3, "length")


async def test_a_stop_string_cuts_the_text_and_keeps_the_tokens(served: Served) -> None:
    free = await served.backend.complete(ask(max_tokens=24))
    stop = next(pair for pair in (free.text[at : at + 2] for at in range(4, len(free.text))) if pair.isascii() and len(pair) == 2)
    cut = await served.backend.complete(ask(max_tokens=24, stop=[stop]))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    assert stop in "".join(served.backend.token_text(token.id) for token in cut.tokens)


@pytest.mark.parametrize("served", TELLING_ALTERNATIVES, indirect=True)
async def test_logprobs_are_of_the_tokens_and_alternatives_come_best_first(served: Served) -> None:
    reply = await served.backend.complete(ask(top_logprobs=5))
    for token in reply.tokens:
        assert token.logprob <= 0
        assert len(token.top) == 5
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)
        assert dict(token.top)[token.id] == pytest.approx(token.logprob)
    assert all(token.top == () for token in (await served.backend.complete(ask())).tokens)


async def test_the_same_seed_says_the_same_again(served: Served) -> None:
    first, second = [await served.backend.complete(ask(temperature=1.0, seed=7)) for _ in range(2)]
    assert first == second


async def test_a_prompt_that_does_not_fit_is_refused_with_numbers(served: Served) -> None:
    with pytest.raises(ContextOverflow, match=str(CONTEXT)):
        await served.backend.stream(ask("word " * CONTEXT))
    with pytest.raises(ContextOverflow, match=str(CONTEXT)):
        await served.backend.stream(ask(max_tokens=CONTEXT))


async def test_a_raw_prompt_goes_without_the_chat_template(served: Served) -> None:
    raw = GenerationRequest(prompt="Once", sampling=SamplingParams(max_tokens=4, temperature=0.0))
    reply = await served.backend.complete(raw)
    assert "".join(map(served.backend.token_text, reply.prompt_token_ids)) == "Once"
    assert len(reply.tokens) == 4


async def test_adapter_versions_speak_side_by_side(served: Served) -> None:
    versions = [None, served.adapter(1), served.adapter(2)]
    alone = [await served.backend.complete(ask(adapter=version)) for version in versions]
    at_once = await asyncio.gather(*(served.backend.complete(ask(adapter=version)) for version in versions))
    assert [reply.text for reply in at_once] == [reply.text for reply in alone]
    assert len({reply.text for reply in alone}) == 3


async def test_an_activated_version_serves(served: Served) -> None:
    ref = served.adapter(1)
    await served.backend.activate(ref)
    before = await served.backend.complete(ask(adapter=ref))
    await served.backend.forget("me/a")
    assert await served.backend.complete(ask(adapter=ref)) == before


async def test_many_at_once_all_get_their_own_reply(served: Served) -> None:
    questions = [f"Question number {n}?" for n in range(12)]
    alone = [await served.backend.complete(ask(q)) for q in questions]
    at_once = await asyncio.gather(*(served.backend.complete(ask(q, background=i % 3 == 0)) for i, q in enumerate(questions)))
    assert [[t.id for t in reply.tokens] for reply in at_once] == [[t.id for t in reply.tokens] for reply in alone]


async def test_closing_a_stream_frees_its_slot_and_is_safe_twice(served: Served) -> None:
    stream = await served.backend.stream(ask(max_tokens=400))
    await anext(aiter(stream))
    await stream.aclose()
    await stream.aclose()
    await served.backend.complete(ask())
    assert (await served.backend.health()).detail["running"] == 0


async def test_a_cancelled_caller_frees_its_slot(served: Served) -> None:
    task = asyncio.create_task(served.backend.complete(ask(max_tokens=400)))
    while not (await served.backend.health()).detail["running"]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await served.backend.complete(ask())
    assert (await served.backend.health()).detail["running"] == 0


async def test_a_score_has_one_logprob_for_each_token_of_the_completion(served: Served) -> None:
    score = await served.backend.score(ask(), "The answer.")
    assert "".join(score.tokens) == "The answer."
    assert len(score.logprobs) == len(score.token_ids) == len(score.tokens)
    assert all(p <= 0 for p in score.logprobs)
    assert score.prompt_tokens == len((await served.backend.complete(ask())).prompt_token_ids)
    assert await served.backend.score(ask(), score.token_ids) == score, "a reply's exact ids score like its text"


async def test_a_text_as_a_whole_reply_is_scored_like_it_and_ends(served: Served) -> None:
    ids = await served.backend.reply_tokens("The answer.")
    score = await served.backend.score(ask(), "The answer.")
    assert ids[:-1] == score.token_ids
    assert served.backend.token_text(ids[-1]) not in ("", ".")
    assert len((await served.backend.score(ask(), ids)).logprobs) == len(ids)


async def test_serving_goes_on_while_paused_or_waits_but_always_answers(served: Served) -> None:
    async with served.backend.paused(RoomPlan()):
        waiting = asyncio.create_task(served.backend.complete(ask()))
        await asyncio.sleep(0)
    assert (await waiting).tokens


async def test_health_tells_whether_a_request_could_be_served(served: Served) -> None:
    assert (await served.backend.health()).status == "healthy"
    await served.backend.aclose()
    assert (await served.backend.health()).status == "unhealthy"
    with pytest.raises(BackendUnavailable):
        await served.backend.stream(ask())


async def test_closing_ends_running_replies_with_abort(served: Served) -> None:
    stream = await served.backend.stream(ask(max_tokens=400))
    chunks = [await anext(aiter(stream))]
    await served.backend.aclose()
    chunks += [chunk async for chunk in stream]
    assert chunks[-1].finish_reason == "abort"
