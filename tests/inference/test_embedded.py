"""The embedded backend on a tiny real model in float32: exact against transformers and PEFT, alone and in company."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from claas.core.errors import BackendUnavailable, BadRequest, ContextOverflow
from claas.inference.attention import worth_it
from claas.inference.base import Generation, GenerationRequest
from claas.models.base_model import LoadedModel
from tests.inference.asking import QUESTIONS, ask, full_logprobs, generated, ids, logprobs, prompt_of, serving
from tests.inference.gate import gated_model
from tests.models.tiny import adapter_ref, load_tiny_model, tiny_tokenizer

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


async def test_weights_out_of_range_fail_their_own_replies_and_nobody_elses(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """Others answer in the same batch, and after it in the same slots, as if nothing had been."""
    broken = adapter_ref(tmp_path, tiny_model, seed=1, scale=1e30)
    alone = [generated(tiny_model, q, 24) for q in QUESTIONS]
    async with serving(tiny_model) as backend:
        for _ in range(2):
            asked = (*(ask(q, max_tokens=24) for q in QUESTIONS), ask("Hi", broken))
            *sound, failed = await asyncio.gather(*map(backend.complete, asked), return_exceptions=True)
            assert isinstance(failed, BackendUnavailable) and "roll back" in failed.message
            assert [ids(reply) for reply in sound if isinstance(reply, Generation)] == alone
        with pytest.raises(BackendUnavailable, match="roll back"):
            await backend.score(ask("Hi", broken), "Hello")


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
