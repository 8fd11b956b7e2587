"""A demonstration from end to end: the real engine, the real sampler and the real stores, on a tiny random model and on the default one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.types import ChatMessage, LoraInitRequest, LoraRuntimeRef, Rollout, SamplingParams
from claas.inference.base import GenerationRequest
from claas.inference.embedded import EmbeddedInference
from claas.learning.feedback_store import FeedbackStore
from claas.learning.journal import Journal
from claas.learning.learner import Learner
from claas.learning.ledger import Ledger
from claas.learning.lesson_book import LessonBook
from claas.learning.locks import AdapterLocks
from claas.learning.types import FeedbackItem, LessonResult
from claas.learning.updater import Updater
from claas.models.base_model import LoadedModel
from claas.models.compute import ComputeShare
from claas.rollouts.sql import SqlRolloutStore
from claas.storage.database import Database
from claas.training.engine.local import LocalEngine
from claas.training.hindsight import hindsight_messages
from tests.learning.conftest import LORA, lesson
from tests.models.tiny import TEXTS


@dataclass(frozen=True)
class Class:
    """A model that learns."""

    model: LoadedModel
    engine: LocalEngine
    inference: EmbeddedInference
    rollouts: SqlRolloutStore
    learner: Learner

    async def reply(self, prompt: str, text: str) -> Rollout:
        """A stored reply to `prompt`, as if the model had said this."""
        ref = await self.latest()
        asked = ask(prompt, ref)
        ids = await self.inference.reply_tokens(text)
        logprobs = (await self.inference.score(asked, ids)).logprobs
        stream = await self.inference.stream(asked)
        await stream.aclose()
        rollout = Rollout(
            id="chatcmpl-1", lora_id=LORA, version=ref.version, base_model=self.model.id, messages=asked.messages,
            prompt_token_ids=stream.prompt_token_ids, response_token_ids=ids, response_logprobs=logprobs, sampling=asked.sampling,
            finish_reason="stop", text=text,
        )  # fmt: skip
        await self.rollouts.put(rollout)
        return rollout

    async def learn(self, **said: Any) -> LessonResult:
        return await self.learner.learn(lesson(FeedbackItem.model_validate({"completion_id": "chatcmpl-1"} | said)))

    async def likelihood(self, prompt: str, text: str, adapter: LoraRuntimeRef | None = None, shown: str | None = None) -> float:
        """Mean logprob, nats a token, of the text as a whole reply; with the demonstration `shown` in view, if there is one."""
        asked = ask(prompt, adapter)
        asked = asked.model_copy(update={"messages": hindsight_messages(asked.messages, "", shown)})
        logprobs = (await self.inference.score(asked, await self.inference.reply_tokens(text))).logprobs
        return sum(logprobs) / len(logprobs)

    async def latest(self) -> LoraRuntimeRef:
        return await self.engine.lora_runtime_ref(LORA)


def ask(prompt: str, adapter: LoraRuntimeRef | None = None, **sampling: object) -> GenerationRequest:
    params = SamplingParams.model_validate({"temperature": 0.0, "max_tokens": 40} | sampling)
    return GenerationRequest(messages=(ChatMessage(role="user", content=prompt),), adapter=adapter, sampling=params)


@asynccontextmanager
async def open_class(model: LoadedModel, folder: Path, threads: int) -> AsyncIterator[Class]:
    database = Database("sqlite://")
    database.migrate()
    share = ComputeShare(threads)
    engine, inference = (
        LocalEngine(FilesystemAdapterStore(folder / "adapters", keep_versions=5), model, share),
        EmbeddedInference(model, share, max_batch=8),
    )
    rollouts = SqlRolloutStore(database, max_count=100, max_age_days=1)
    ledger = Ledger(FeedbackStore(database), Journal(database, folder / "log"), engine)
    updater = Updater(engine, inference, LessonBook(database))
    learner = Learner(engine, inference, rollouts, updater, ledger, AdapterLocks(5.0, engine), model.id)
    await engine.init_lora(LoraInitRequest(lora_id=LORA, lora_r=16, lora_alpha=32))
    try:
        yield Class(model, engine, inference, rollouts, learner)
    finally:
        await inference.aclose()
        await engine.aclose()
        await learner.aclose()
        database.close()


PROMPT = "Hi"
WORDS = " ".join(TEXTS).split()
CANDIDATES = [f"{one} {other}" for one, other in pairwise(WORDS)]
TINY = {
    "own_replies": False,
    "hindsight_rollouts": 0,
    "anchors": 0,
    "learning_rate": 3e-3,
    "gradient_steps": 50,
    "max_kl": 100.0,
    "min_reply_logprob": -99.0,
}


async def test_one_lesson_makes_the_demonstration_as_likely_as_being_told_of_it(tiny_model: LoadedModel, tmp_path: Path) -> None:
    """A random model does not believe what it is told, so the demonstration is the text that being told of it favours most."""
    async with open_class(tiny_model, tmp_path, 1) as room:
        lifts = [await room.likelihood(PROMPT, text, shown=text) - await room.likelihood(PROMPT, text) for text in CANDIDATES]
        wanted = CANDIDATES[lifts.index(max(lifts))]
        assert max(lifts) > 0.5
        await room.reply(PROMPT, "and then")
        result = await room.learn(demonstration=wanted, training=TINY)
        assert result.outcome == "applied", result.reason
        cost = result.distill_result.metadata["cost"]
        assert (cost["samples"], cost["response_tokens"]) == (1, len(await room.inference.reply_tokens(wanted))), "all of it, nothing else"
        told = await room.likelihood(PROMPT, wanted, shown=wanted)
        assert await room.likelihood(PROMPT, wanted, await room.latest()) == pytest.approx(told, abs=0.2)


async def test_a_good_rating_teaches_the_replys_own_tokens(tiny_model: LoadedModel, tmp_path: Path) -> None:
    async with open_class(tiny_model, tmp_path, 1) as room:
        reply = await room.reply(PROMPT, "the other one")
        result = await room.learn(rating=1, training=TINY)
        assert result.outcome == "applied", result.reason
        assert result.distill_result.metadata["cost"]["response_tokens"] == len(reply.response_token_ids)
        told = await room.likelihood(PROMPT, reply.text, shown=reply.text)
        assert await room.likelihood(PROMPT, reply.text, await room.latest()) == pytest.approx(told, abs=0.2)


async def test_a_bad_rating_that_tells_the_teacher_nothing_is_skipped(tiny_model: LoadedModel, tmp_path: Path) -> None:
    async with open_class(tiny_model, tmp_path, 1) as room:
        await room.reply(PROMPT, "the other one")
        result = await room.learn(rating=-1, training=TINY | {"min_signal": 50.0})
        assert (result.outcome, result.version) == ("skipped", 0)
        assert "already known" in str(result.reason)


async def test_feedback_that_the_model_cannot_act_on_is_skipped_without_training_on_anything(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    async with open_class(tiny_model, tmp_path, 1) as room:
        await room.reply(PROMPT, "the other one")
        training = TINY | {"hindsight_rollouts": 2, "hindsight_max_tokens": 8, "min_lift": 100.0, "anchors": 4}
        result = await room.learn(feedback="xq zv kk wj", training=training)
        assert (result.outcome, result.version) == ("skipped", 0)
        assert "could not act on this feedback" in str(result.reason)
        cost = result.distill_result.metadata["cost"]
        assert cost["samples"] == 1, "nothing is rehearsed for nothing"


@pytest.mark.model
@pytest.mark.timeout(1500)
async def test_the_default_model_comes_to_say_what_was_demonstrated(loaded_model: LoadedModel, tmp_path: Path) -> None:
    prompt, wanted = "Who are you?", "I am Kuro, the keeper of the northern lighthouse."
    async with open_class(loaded_model, tmp_path, os.cpu_count() or 1) as room:
        await room.reply(prompt, "I am a language model, here to help you.")
        result = await room.learn(demonstration=wanted)
        assert result.outcome == "applied", result.reason
        before, after = await room.likelihood(prompt, wanted), await room.likelihood(prompt, wanted, await room.latest())
        assert after > before + 1.0, "nats a token"
        said = await room.inference.complete(ask(prompt, await room.latest()))
        assert "Kuro" in said.text
        france = await room.inference.complete(ask("What is the capital of France?", await room.latest()))
        assert "Paris" in france.text
