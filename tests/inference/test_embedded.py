"""The embedded backend on a tiny real model in float32: exact against transformers and PEFT, alone and in company."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from claas.core.errors import BackendUnavailable, BadRequest, ContextOverflow, NotFound, Overloaded
from claas.core.types import ChatMessage, LoraRuntimeRef, SamplingParams
from claas.inference.attention import worth_it
from claas.inference.base import Generation, GenerationChunk, GenerationRequest, TokenStream
from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare
from tests.inference.gate import gated_model, until
from tests.models.tiny import adapter_ref, load_tiny_model, tiny_tokenizer

QUESTIONS = ("Hi", "What is the theory of the thing?", "Name three colours, then explain at length why you chose these and no others. " * 2)


@asynccontextmanager
async def serving(model: LoadedModel, **how: int) -> AsyncIterator[EmbeddedInference]:
    backend = EmbeddedInference(model, ComputeShare(1), **{"max_batch": 4} | how)
    try:
        yield backend
    finally:
        await backend.aclose()


def ask(
    text: str = "Who are you?", adapter: LoraRuntimeRef | None = None, *, background: bool = False, **sampling: object
) -> GenerationRequest:
    params = SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 16} | sampling)
    return GenerationRequest(messages=(ChatMessage(role="user", content=text),), adapter=adapter, sampling=params, background=background)


def ids(reply: Generation) -> list[int]:
    return [token.id for token in reply.tokens]


def logprobs(reply: Generation) -> list[float]:
    return [token.logprob for token in reply.tokens]


def prompt_of(model: LoadedModel, text: str) -> tuple[int, ...]:
    return render(model.tokenizer, [ChatMessage(role="user", content=text)], {})


def generated(model: LoadedModel, text: str, n: int) -> list[int]:
    """What transformers' own greedy generation says."""
    prompt = torch.tensor([prompt_of(model, text)])
    out = model.module.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    return tokens


def full_logprobs(module: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """One forward over all of it, no cache."""
    with torch.no_grad():
        logp = module(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return [logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


async def rest(stream: TokenStream) -> list[GenerationChunk]:
    return [chunk async for chunk in stream]


async def waiting_are(backend: EmbeddedInference, n: int) -> None:
    async def happened() -> bool:
        return (await backend.health()).detail["waiting"] == n

    await until(happened)


# --- Exactness ---


async def test_greedy_replies_are_those_of_generate_alone_and_in_a_batch(tiny_model: LoadedModel) -> None:
    expected = [generated(tiny_model, q, 24) for q in QUESTIONS]
    async with serving(tiny_model) as backend:
        assert [ids(await backend.complete(ask(q, max_tokens=24))) for q in QUESTIONS] == expected
        assert [ids(r) for r in await asyncio.gather(*(backend.complete(ask(q, max_tokens=24)) for q in QUESTIONS))] == expected


async def test_a_reply_longer_than_the_first_slots_goes_on_exactly(tiny_model: LoadedModel) -> None:
    async with serving(tiny_model) as backend:
        long, *_ = await asyncio.gather(
            backend.complete(ask("Hi", max_tokens=400, ignore_eos=True)),
            backend.complete(ask("Ho", max_tokens=9)),
            backend.complete(ask("Hu")),
        )
    # Nothing the model says in 400 tokens ends it, or generate would have stopped there.
    assert ids(long) == generated(tiny_model, "Hi", 400)


async def test_rows_of_very_different_lengths_are_exact_in_one_batch(tiny_model: LoadedModel) -> None:
    questions = ["the other thing is in the theory, and naïve " * 12, "Hi", "Ho", "Hu"]
    async with serving(tiny_model) as backend:
        replies = await asyncio.gather(*(backend.complete(ask(q, max_tokens=24, ignore_eos=True)) for q in questions))
    lengths = [len(reply.prompt_token_ids) for reply in replies]
    assert worth_it(lengths), "this is where rows are attended to one by one"
    assert [ids(reply) for reply in replies] == [generated(tiny_model, q, 24) for q in questions]


async def test_another_architecture_serves_as_exactly(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.5, eos_token_id=2, bos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_tiny_model(tmp_path)
    questions = ["the other thing is in the theory, and naïve " * 12, "Hi", "Ho", "Hu"]
    async with serving(model) as backend:
        replies = await asyncio.gather(*(backend.complete(ask(q, max_tokens=12)) for q in questions))
    assert [ids(reply) for reply in replies] == [generated(model, q, 12) for q in questions]


async def test_logprobs_are_those_of_a_full_forward(tiny_model: LoadedModel) -> None:
    async with serving(tiny_model) as backend:
        for reply in await asyncio.gather(*(backend.complete(ask(q, temperature=1.3, top_p=0.9, seed=3)) for q in QUESTIONS)):
            assert logprobs(reply) == pytest.approx(full_logprobs(tiny_model.module, reply.prompt_token_ids, ids(reply)), abs=1e-4)


async def test_an_adapter_speaks_as_it_does_in_peft(tiny_model: LoadedModel, tmp_path: Path) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    peft = PeftModel.from_pretrained(tiny_model.tree(), ref.lora_path)
    async with serving(tiny_model) as backend:
        reply = await backend.complete(ask(adapter=ref, temperature=1.0, seed=1))
    assert logprobs(reply) == pytest.approx(full_logprobs(peft, reply.prompt_token_ids, ids(reply)), abs=1e-4)
    base = full_logprobs(tiny_model.module, reply.prompt_token_ids, ids(reply))
    assert logprobs(reply) != pytest.approx(base, abs=1e-2)


async def test_adapters_of_any_shape_mix_in_one_batch(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, gate = gated_model(tiny_model_dir)
    shapes: list[dict[str, Any]] = [
        {"rank": 4},
        {"rank": 2, "targets": ("q_proj", "down_proj")},
        {"rank": 7, "alpha": 3, "targets": ("v_proj",)},
    ]
    refs = [None, *(adapter_ref(tmp_path, model, seed=v, version=v, **shape) for v, shape in enumerate(shapes))]
    async with serving(model) as backend:
        alone = [await backend.complete(ask(adapter=ref, max_tokens=24)) for ref in refs]
        gate.close()
        replies = [asyncio.create_task(backend.complete(ask(adapter=ref, max_tokens=24))) for ref in refs]
        await gate.held()
        gate.open()
        at_once = await asyncio.gather(*replies)
    assert max(len(forward) for forward in gate.seen) > 1
    assert [ids(r) for r in at_once] == [ids(r) for r in alone]
    for mixed, single in zip(at_once, alone, strict=True):
        assert logprobs(mixed) == pytest.approx(logprobs(single), abs=1e-4)
    assert len({tuple(ids(r)) for r in alone}) == len(refs)


async def test_an_adapter_of_no_effect_is_the_base_model(tiny_model: LoadedModel, tmp_path: Path) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1, scale=0.0)
    async with serving(tiny_model) as backend:
        plain, through = await asyncio.gather(backend.complete(ask()), backend.complete(ask(adapter=ref)))
    assert ids(plain) == ids(through)
    assert logprobs(plain) == pytest.approx(logprobs(through), abs=1e-5)


async def test_a_seed_gives_the_same_reply_in_any_company(tiny_model: LoadedModel) -> None:
    async with serving(tiny_model) as backend:
        alone = await backend.complete(ask(temperature=1.0, seed=11))
        company = [ask(q, temperature=t, seed=s) for s, (q, t) in enumerate([("Ho", 0.0), ("Hu", 1.5), ("Ha", 1.0)])]
        together, *_ = await asyncio.gather(backend.complete(ask(temperature=1.0, seed=11)), *map(backend.complete, company))
        other = await backend.complete(ask(temperature=1.0, seed=12))
        unseeded = [await backend.complete(ask(temperature=1.0)) for _ in range(2)]
    assert ids(together) == ids(alone) != ids(other)
    assert ids(unseeded[0]) != ids(unseeded[1])


async def test_a_score_is_that_of_a_full_forward_however_long(tiny_model: LoadedModel, tmp_path: Path) -> None:
    ref = adapter_ref(tmp_path, tiny_model, seed=1)
    peft = PeftModel.from_pretrained(tiny_model.tree(), ref.lora_path)
    completion = "the other thing is in the theory " * 30
    async with serving(tiny_model) as backend:
        short, long = await asyncio.gather(backend.score(ask(), "x"), backend.score(ask(adapter=ref), completion))
    prompt = prompt_of(tiny_model, "Who are you?")
    assert len(short.token_ids) == 1 and len(long.token_ids) > 128
    assert short.logprobs == pytest.approx(full_logprobs(tiny_model.module, prompt, short.token_ids), abs=1e-4)
    assert long.logprobs == pytest.approx(full_logprobs(peft, prompt, long.token_ids), abs=1e-4)
    assert (long.prompt_tokens, "".join(long.tokens)) == (len(prompt), completion)


async def test_a_given_reply_ends_as_the_models_own_and_has_no_other_control_token(tiny_model: LoadedModel) -> None:
    tokenizer = tiny_model.tokenizer
    async with serving(tiny_model) as backend:
        ids = await backend.reply_tokens("Stop<|im_end|>here<|im_start|>")
    assert set(ids) & set(tokenizer.all_special_ids) == {tokenizer.eos_token_id}
    assert (ids[-1], ids.count(ids[-1])) == (tokenizer.eos_token_id, 1)
    assert tokenizer.decode(ids[:-1]) == "Stop<|im_end|>here<|im_start|>"


async def test_a_reply_scored_by_its_exact_ids_gets_the_logprobs_it_was_sampled_with(tiny_model: LoadedModel) -> None:
    async with serving(tiny_model) as backend:
        reply = await backend.complete(ask(temperature=1.2, seed=5))
        score = await backend.score(ask(), tuple(ids(reply)))
    assert list(score.token_ids) == ids(reply)
    assert score.logprobs == pytest.approx(logprobs(reply), abs=1e-4)


# --- How replies end ---


async def test_an_end_token_ends_the_reply_and_stays_in_it(tiny_model_dir: Path, tiny_model: LoadedModel) -> None:
    expected = generated(tiny_model, "Hi", 24)
    end = expected[10]
    model = load_tiny_model(tiny_model_dir, eos_token_ids=[end])
    async with serving(model) as backend:
        reply = await backend.complete(ask("Hi", max_tokens=24))
        on = await backend.complete(ask("Hi", max_tokens=24, ignore_eos=True))
    assert ids(reply) == expected[: expected.index(end) + 1] and reply.finish_reason == "stop"
    assert reply.text == model.tokenizer.decode(ids(reply)[:-1], skip_special_tokens=True)
    assert ids(on) == expected and on.finish_reason == "length"


async def test_a_reply_ends_where_the_context_does(tiny_model: LoadedModel) -> None:
    prompt = len(prompt_of(tiny_model, "Hi"))
    async with serving(tiny_model, max_context=64) as backend:
        reply = await backend.complete(ask("Hi", max_tokens=None, ignore_eos=True))
        exact = await backend.complete(ask("Hi", max_tokens=64 - prompt, ignore_eos=True))
        with pytest.raises(ContextOverflow, match=rf"{prompt} tokens.*64") as raised:
            await backend.stream(ask("Hi", max_tokens=65 - prompt))
    assert len(reply.tokens) == len(exact.tokens) == 64 - prompt
    assert reply.finish_reason == exact.finish_reason == "length"
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")


async def test_without_max_tokens_the_default_holds(tiny_model: LoadedModel) -> None:
    async with serving(tiny_model, default_max_tokens=5) as backend:
        assert len((await backend.complete(ask(max_tokens=None, ignore_eos=True))).tokens) == 5


async def test_an_empty_prompt_or_completion_is_refused_by_name(tiny_model: LoadedModel) -> None:
    async with serving(tiny_model) as backend:
        with pytest.raises(BadRequest) as raised:
            await backend.stream(GenerationRequest(prompt=""))
        assert raised.value.param == "prompt"
        with pytest.raises(BadRequest) as raised:
            await backend.score(ask(), "")
        assert raised.value.param == "completion"


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
