"""Many at once on the embedded backend: the queue, cancelling, adapters that come and go, and what happens when things break."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from pathlib import Path

import pytest

from claas.core.errors import BackendUnavailable, BadRequest, NotFound, Overloaded
from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.compute import ComputeShare
from tests.inference.asking import ask, generated, ids, prompt_of, rest, serving, waiting_are
from tests.inference.gate import gated_model
from tests.models.tiny import adapter_ref, load_tiny_model

# --- Sharing the machine ---


async def test_a_stream_yields_each_token_when_it_is_sampled(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    async with serving(model) as backend:
        gate.close()
        stream = await backend.stream(ask(max_tokens=3, ignore_eos=True))
        chunks = aiter(stream)
        for _ in range(3):
            waiting = asyncio.ensure_future(anext(chunks))
            await gate.held()
            assert not waiting.done()
            gate.let()
            assert len((await waiting).tokens) == 1
        gate.open()


async def test_a_cancelled_reply_is_gone_by_the_next_step(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    async with serving(model) as backend:
        streams = [await backend.stream(ask(q, max_tokens=50, ignore_eos=True)) for q in ("Hi", "Ho", "Hu")]
        for stream in streams:
            await anext(aiter(stream))
        gate.close()
        await gate.held()
        await streams[0].aclose()
        before = len(gate.seen)
        gate.let()
        await gate.held()
        gate.let()
        await gate.held()
        assert len(gate.seen[before + 1]) == len(gate.seen[before]) - 1
        gate.open()
        kept = [(await anext(aiter(s))).tokens for s in streams[1:]]
        assert all(kept)


async def test_a_full_queue_refuses_and_says_when_to_come_back(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    async with serving(model, max_batch=1, max_queue=2) as backend:
        gate.close()
        first = await backend.stream(ask())
        await gate.held()
        waiting = [await backend.stream(ask()) for _ in range(2)]
        assert (await backend.health()).detail == {"running": 1, "waiting": 2, "slots": 1, "cached_adapters": 0}
        with pytest.raises(Overloaded) as raised:
            await backend.stream(ask())
        assert raised.value.retry_after_s > 0
        gate.open()
        assert [[c async for c in s][-1].finish_reason for s in (first, *waiting)] == ["length"] * 3


async def test_the_thread_that_decodes_ends_when_nothing_is_left_to_do(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    async with serving(model) as backend:
        for turn in range(2):
            await backend.complete(ask(max_tokens=2))
            async with asyncio.timeout(10):
                while any(thread.is_alive() for thread in gate.threads):  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.001)
            assert len(gate.threads) == turn + 1


async def test_users_go_before_background_work_which_leaves_slots_free(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    ended: list[str] = []

    async def run(backend: EmbeddedInference, name: str, background: bool) -> None:
        await backend.complete(ask(name, background=background, max_tokens=8, ignore_eos=True))
        ended.append(name)

    async with serving(model, max_batch=2) as backend, asyncio.TaskGroup() as tasks:
        gate.close()
        tasks.create_task(run(backend, "b1", True))
        await gate.held()
        tasks.create_task(run(backend, "b2", True))
        for name in ("u1", "u2", "u3"):
            tasks.create_task(run(backend, name, False))
        await waiting_are(backend, 4)
        gate.open()
    # b1 held one of two slots from the start; b2 may not take the second, and waits until no user does.
    assert ended.index("u1") < ended.index("b2") and ended.index("u2") < ended.index("b2") and ended.index("u3") < ended.index("b2")


async def test_a_long_prompt_is_read_in_chunks_between_the_tokens_of_others(tiny_model_dir: Path, tiny_model: LoadedModel) -> None:
    model, gate = gated_model(tiny_model_dir)
    question = "the other thing is in the theory, and naïve " * 10
    async with serving(model) as backend:
        running = await backend.stream(ask("Hi", max_tokens=40, ignore_eos=True))
        await anext(aiter(running))
        long = await backend.complete(ask(question))
        lengths = [len(forward[0]) for forward in gate.seen]
        assert ids(long) == generated(tiny_model, question, 16)
        assert [token.id for chunk in await rest(running) for token in chunk.tokens] == generated(tiny_model, "Hi", 40)[1:]
    chunks = [n for n in lengths[1:] if n > 1]
    assert sum(chunks) == len(long.prompt_token_ids) and max(chunks) <= 128
    at = [i for i, n in enumerate(lengths) if i and n > 1]
    assert all(b - a > 1 for a, b in itertools.pairwise(at)), "the running reply got a token between two chunks"


async def test_short_prompts_are_read_together(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    async with serving(model) as backend:
        gate.close()
        first = asyncio.create_task(backend.complete(ask("Hi", max_tokens=1)))
        await gate.held()
        others = [asyncio.create_task(backend.complete(ask(q, max_tokens=1))) for q in ("Ho", "How are you?", "Hu")]
        await waiting_are(backend, 3)
        gate.open()
        await asyncio.gather(first, *others)
    assert [len(forward) for forward in gate.seen] == [1, 3]


async def test_a_prompt_that_several_wait_for_is_read_once_for_each_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    own = adapter_ref(tmp_path, model, seed=1)
    wanted = [ask("Ho", adapter, max_tokens=6, temperature=1.0, seed=seed) for adapter in (None, own) for seed in range(3)]
    async with serving(model, max_batch=8) as backend:
        alone = [ids(await backend.complete(request)) for request in wanted]
        gate.seen.clear()
        gate.close()
        first = asyncio.create_task(backend.complete(ask("Hi", max_tokens=1)))
        await gate.held()
        others = [asyncio.create_task(backend.complete(request)) for request in wanted]
        await waiting_are(backend, 6)
        gate.open()
        _, *replies = await asyncio.gather(first, *others)
    assert len(set(map(tuple, alone))) > 3, "seeds and adapters tell the replies apart"
    assert [ids(reply) for reply in replies] == alone
    assert len(gate.seen[1]) == 2


# --- Adapters come and go ---


async def test_a_reply_keeps_its_version_whatever_becomes_of_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    ref = adapter_ref(tmp_path, model, seed=1)
    async with serving(model) as backend:
        expected = await backend.complete(ask(adapter=ref, max_tokens=30))
        gate.close()
        reply = asyncio.create_task(backend.complete(ask(adapter=ref, max_tokens=30)))
        await gate.held()
        shutil.rmtree(ref.lora_path)
        await backend.forget(ref.lora_id)
        with pytest.raises(NotFound):
            await backend.stream(ask(adapter=ref))
        gate.open()
        assert ids(await reply) == ids(expected)


async def test_an_adapter_of_another_model_is_refused_and_not_kept(tiny_model: LoadedModel, tmp_path: Path) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    weights = Path(ref.lora_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    async with serving(tiny_model) as backend:
        with pytest.raises(BadRequest, match="damaged"):
            await backend.activate(ref)
        weights.write_bytes(whole)
        await backend.activate(ref)
        assert (await backend.health()).detail["cached_adapters"] == 1


# --- When things break ---


async def test_a_prompt_that_breaks_fails_alone(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, gate = gated_model(tiny_model_dir)
    expected = generated(load_tiny_model(tiny_model_dir), "Hi", 60)
    letter = next(c for c in "XYZVWQJ" if model.tokenizer.convert_tokens_to_ids(c) not in expected)
    gate.broken_by = model.tokenizer.convert_tokens_to_ids(letter)
    async with serving(model) as backend:
        running = await backend.stream(ask("Hi", max_tokens=60, ignore_eos=True))
        first = await anext(aiter(running))
        with pytest.raises(BackendUnavailable, match="send it again"):
            await backend.complete(ask(letter))
        assert "reading prompts broke" in caplog.text
        tokens = [token.id for chunk in (first, *await rest(running)) for token in chunk.tokens]
    assert tokens == expected


async def test_a_broken_step_fails_its_replies_and_serving_goes_on(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    expected = generated(load_tiny_model(tiny_model_dir), "Hi", 16)
    gate.broken_by = expected[8]
    assert gate.broken_by not in (*expected[:8], *prompt_of(model, "Hi"))
    async with serving(model, max_batch=2) as backend:
        lost = await asyncio.gather(*(backend.complete(ask("Hi")) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in lost] == [BackendUnavailable] * 3
        assert (await backend.health()).status == "healthy"
        gate.broken_by = None
        assert ids(await backend.complete(ask("Hi"))) == expected


def test_a_client_whose_event_loop_died_harms_nobody(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    backends: list[EmbeddedInference] = []

    async def leave() -> None:
        backends.append(EmbeddedInference(model, ComputeShare(1), max_batch=2))
        gate.close()
        await backends[0].stream(ask("Hi", max_tokens=20, ignore_eos=True))
        await gate.held()

    async def stay() -> list[int]:
        try:
            return ids(await backends[0].complete(ask("Hi")))
        finally:
            await backends[0].aclose()

    asyncio.run(leave())
    gate.open()
    assert asyncio.run(stay()) == generated(load_tiny_model(tiny_model_dir), "Hi", 16)


async def test_what_waits_when_serving_ends_is_told(tiny_model_dir: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    async with serving(model, max_batch=1) as backend:
        gate.close()
        running = await backend.stream(ask())
        await gate.held()
        waiting = await backend.stream(ask())
        score = asyncio.create_task(backend.score(ask(), "x"))
        await waiting_are(backend, 2)
        closing = asyncio.create_task(backend.aclose())
        await asyncio.sleep(0)
        gate.open()
        await closing
        assert [[c.finish_reason async for c in s][-1] for s in (running, waiting)] == ["abort", "abort"]
        with pytest.raises(BackendUnavailable):
            await score
