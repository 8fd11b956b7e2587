"""The proof a person can read: the same prompt asked again, of the version that serves now."""

from __future__ import annotations

import asyncio
import logging

from claas.core.errors import ClaasError
from claas.core.types import LoraRuntimeRef, Rollout
from claas.inference.base import GenerationRequest, InferenceBackend
from claas.learning.resolve import ResolvedLesson
from claas.learning.types import Shown
from claas.rollouts.visible import visible_text

log = logging.getLogger(__name__)


async def show(lesson: ResolvedLesson, version: LoraRuntimeRef, inference: InferenceBackend) -> tuple[Shown, ...]:
    """A new reply to each prompt of the lesson, sampled as the first one was; none if they cannot be had: it was learnt all the same."""

    async def again(rollout: Rollout) -> Shown:
        reply = await inference.complete(
            GenerationRequest(
                messages=rollout.messages,
                template_kwargs=rollout.template_kwargs,
                adapter=version,
                sampling=rollout.sampling,
                background=True,
            )
        )
        return Shown(completion_id=rollout.id, prompt=rollout.prompt, before=rollout.text, after=visible_text(reply.text))

    try:
        return tuple(await asyncio.gather(*map(again, lesson.rollouts)))
    except ClaasError as error:
        log.warning("the new replies to a lesson of %r cannot be shown: %s", lesson.lora_id, error.message)
        return ()
