"""The proof a person can read: the same prompt asked again, of the version that serves now."""

from __future__ import annotations

import asyncio

from claas.core.types import LoraRuntimeRef, Rollout
from claas.inference.base import GenerationRequest, InferenceBackend
from claas.learning.resolve import ResolvedLesson
from claas.learning.types import Shown
from claas.rollouts.visible import visible_text


async def show(lesson: ResolvedLesson, version: LoraRuntimeRef, inference: InferenceBackend) -> tuple[Shown, ...]:
    """A new reply to each prompt of the lesson, sampled as the first one was."""

    async def again(rollout: Rollout) -> Shown:
        reply = await inference.complete(
            GenerationRequest(
                messages=rollout.messages, template_kwargs=rollout.template_kwargs, adapter=version, sampling=rollout.sampling
            )
        )
        return Shown(completion_id=rollout.id, prompt=rollout.prompt, before=rollout.text, after=visible_text(reply.text))

    return tuple(await asyncio.gather(*map(again, lesson.rollouts)))
