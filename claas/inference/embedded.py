"""The embedded backend: the base model in this process, on a CPU or a GPU, its weights shared with the trainer.

This file is the asyncio side: requests in, streams out. One thread decodes (`scheduler`); prompts are tokenised and adapters are read
in other threads, so the event loop never waits for any of it. A reply speaks through the adapter version it was admitted with, from
its first token to its last, and serving goes on while a step trains.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import JsonValue

from claas.core.errors import BackendUnavailable, BadRequest, ContextOverflow
from claas.core.types import LoraRuntimeRef, RoomPlan, SamplingParams, ServiceHealth
from claas.inference.base import GenerationChunk, GenerationRequest, InferenceBackend, Room, Score, TokenStream
from claas.inference.detokenize import Detokenizer
from claas.inference.jobs import Item, Reply, Scoring
from claas.inference.lora_cache import LoraCache
from claas.inference.outlet import Outlet
from claas.inference.runner import ModelRunner
from claas.inference.sampling import Sampler
from claas.inference.scheduler import Scheduler
from claas.models.base_model import LoadedModel
from claas.models.chat_template import encode_reply, render, stop_token_ids
from claas.models.compute import ComputeShare
from claas.models.lora import LoraWeights, lora_dtype, read_lora

CACHED_BYTES = 2**30
"""Of adapter versions that are kept in memory: about fifty of the default model's."""

T = TypeVar("T")


class EmbeddedInference(InferenceBackend):
    """Serves `model` and any number of adapter versions. Make it on the event loop that will use it."""

    kind: Literal["embedded"] = "embedded"

    def __init__(
        self,
        model: LoadedModel,
        share: ComputeShare,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_context: int | None = None,
        default_max_tokens: int = 512,
    ) -> None:
        self._model = model
        self._max_context = min(max_context or model.max_context, model.max_context)
        self._default_max_tokens = default_max_tokens
        self._stop_ids = stop_token_ids(model)
        self._runner = ModelRunner(model, max_batch, self._max_context)
        self._scheduler = Scheduler(self._runner, share, max_batch=max_batch, max_queue=max_queue)
        self._adapters = LoraCache(self._load, CACHED_BYTES)
        # One torch thread each: a team of their own would crowd the decoding thread's.
        self._helpers = ThreadPoolExecutor(2, "claas-prepare", initializer=torch.set_num_threads, initargs=(1,))

    async def stream(self, request: GenerationRequest) -> TokenStream:
        _refuse_unsupported(request)
        prompt = await self._in_thread(lambda: self._prompt(request))
        reply = Reply(
            prompt=prompt,
            adapter=await self._adapter(request),
            background=request.background,
            outlet=Outlet(),
            limit=self._limit(prompt, request.sampling),
            stop_ids=frozenset() if request.sampling.ignore_eos else self._stop_ids,
            sampler=Sampler(request.sampling),
            detokenizer=Detokenizer(self._visible, request.sampling.stop),
        )
        self._scheduler.submit(reply)
        return EmbeddedStream(reply, self._scheduler)

    async def score(self, request: GenerationRequest, completion: str | tuple[int, ...]) -> Score:
        prompt = await self._in_thread(lambda: self._prompt(request))
        targets = await self._in_thread(lambda: self._targets(completion))
        if not targets:
            raise BadRequest("completion is empty: there is nothing to score", param="completion")
        if len(prompt) + len(targets) > self._max_context:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and the completion {len(targets)}, but the context holds {self._max_context}",
                param="completion",
            )
        job = Scoring(
            prompt=(*prompt, *targets[:-1]),
            adapter=await self._adapter(request),
            background=request.background,
            outlet=Outlet(),
            targets=targets,
        )
        self._scheduler.submit(job)
        try:
            logprobs = await job.outlet.get()
        finally:
            self._scheduler.cancel(job)
        if isinstance(logprobs, BackendUnavailable):
            raise logprobs
        assert isinstance(logprobs, tuple)
        return Score(len(prompt), targets, tuple(map(self.token_text, targets)), logprobs)

    async def reply_tokens(self, text: str) -> tuple[int, ...]:
        tokenizer = self._model.tokenizer
        return (*await self._in_thread(lambda: encode_reply(tokenizer, text)), tokenizer.eos_token_id)

    def token_text(self, token_id: int) -> str:
        return str(self._model.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    @asynccontextmanager
    async def paused(self, plan: RoomPlan) -> AsyncIterator[Room]:
        """Nothing to pause: the trainer works on a tree of its own."""
        yield Room()

    async def activate(self, ref: LoraRuntimeRef) -> None:
        await self._adapters.get(ref)

    async def forget(self, lora_id: str) -> None:
        self._adapters.forget(lora_id)

    async def health(self) -> ServiceHealth:
        detail: dict[str, JsonValue] = {**self._scheduler.counts(), "cached_adapters": len(self._adapters)}
        if not self._scheduler.alive:
            return ServiceHealth(status="unhealthy", error="the service is closing", detail=detail)
        return ServiceHealth(status="healthy", detail=detail)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._scheduler.close)
        self._helpers.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` off the event loop. Raises BackendUnavailable when closing."""
        if not self._scheduler.alive:
            raise BackendUnavailable("the service is closing: try again later")
        return await asyncio.get_running_loop().run_in_executor(self._helpers, work)

    def _targets(self, completion: str | tuple[int, ...]) -> tuple[int, ...]:
        return encode_reply(self._model.tokenizer, completion) if isinstance(completion, str) else completion

    def _prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """The request's prompt as token ids. Raises BadRequest, ContextOverflow."""
        if request.prompt is None:
            ids = render(self._model.tokenizer, request.messages, request.template_kwargs)
        else:
            ids = tuple(self._model.tokenizer(request.prompt)["input_ids"])
        field = "messages" if request.prompt is None else "prompt"
        if not ids:
            raise BadRequest(f"{field} is empty: there is no token to begin with", param=field)
        wanted = request.sampling.max_tokens or 1
        if len(ids) + wanted > self._max_context:
            raise ContextOverflow(
                f"the {field} has {len(ids)} tokens and at least {wanted} are to be sampled, but the context holds {self._max_context}: "
                "send a shorter one" + (" or ask for fewer max_tokens" if wanted > 1 else ""),
                param=field,
            )
        return ids

    def _limit(self, prompt: Sequence[int], sampling: SamplingParams) -> int:
        """How many tokens the reply may have."""
        return sampling.max_tokens or min(self._default_max_tokens, self._max_context - len(prompt))

    def _visible(self, ids: Sequence[int]) -> str:
        return str(self._model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    async def _adapter(self, request: GenerationRequest) -> LoraWeights | None:
        return None if request.adapter is None else await self._adapters.get(request.adapter)

    async def _load(self, ref: LoraRuntimeRef) -> LoraWeights:
        dtype = lora_dtype(self._model.device, self._model.dtype)
        weights = await self._in_thread(lambda: read_lora(Path(ref.lora_path), ref.vllm_name, device=self._model.device, dtype=dtype))
        self._runner.switch.check(weights)
        return weights


def _refuse_unsupported(request: GenerationRequest) -> None:
    """What only a serving engine with parsers and grammars can honour. Raises BadRequest."""
    for field in ("tools", "tool_choice", "response_format"):
        if getattr(request, field):
            raise BadRequest(
                f"{field} is not supported by the embedded model: leave it out, or serve with vLLM (VLLM_BASE_URL)", param=field
            )


class EmbeddedStream(TokenStream):
    """One reply as it is sampled."""

    def __init__(self, reply: Reply, scheduler: Scheduler) -> None:
        self.prompt_token_ids = reply.prompt
        self._reply = reply
        self._scheduler = scheduler
        self._ended = False

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self._ended:
            raise StopAsyncIteration
        item: Item = await self._reply.outlet.get()
        if isinstance(item, BackendUnavailable):
            self._ended = True
            raise item
        assert isinstance(item, GenerationChunk)
        self._ended = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        self._ended = True
        self._scheduler.cancel(self._reply)
