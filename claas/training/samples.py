"""Payload items → samples to train on, for any engine. Every length and id is checked; nothing is ever cut or re-encoded. No tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from pydantic import JsonValue

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage, DistillBatchItem, SampleSource, TeacherKind, TrainingConfig
from claas.training.hindsight import CONTROL_FEEDBACK, hindsight_messages

MICRO_BATCH_TOKENS = 1024

Part = Literal["lesson", "replay", "anchor"]
"""What a sample is there for: to be learnt, to be kept from earlier lessons, or to be left as the base model has it."""
PARTS: tuple[Part, ...] = ("lesson", "replay", "anchor")
Speaker = Literal["live", "base", "ema", "snapshot"]
"""Whose weights a forward goes through: the student's, none, or a remembered teacher's."""

Render = Callable[[Sequence[ChatMessage], Mapping[str, JsonValue]], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: the student's prompt, the teacher's, and the response both continue with.

    `old_logp` is None where the sample is on-policy or not the student's own: then its importance ratio is 1. `served_logp` of a `masked`
    sample are of no version's own distribution.
    """

    source: SampleSource
    teacher: Speaker
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    control_prompt: tuple[int, ...] | None
    response: tuple[int, ...]
    served_logp: tuple[float, ...]
    on_policy: bool
    age: int
    taught: bool = True
    replayed: bool = False
    masked: bool = False

    @property
    def part(self) -> Part:
        if self.source == "anchor":
            return "anchor"
        return "replay" if self.replayed else "lesson"

    @property
    def length(self) -> int:
        return max(len(self.student_prompt), len(self.teacher_prompt)) + len(self.response)


def prepare(
    item: DistillBatchItem,
    render: Render,
    *,
    teacher: TeacherKind,
    hindsight_teacher: TeacherKind = "base",
    parent: int,
    vocab_size: int,
    max_context: int,
    control_feedback: str | None = CONTROL_FEEDBACK,
    guided: bool = False,
) -> Sample:
    """One payload item as a `Sample`, rendered for the teacher of its source and checked. Anchors are the base model's own.

    The user's own replies get a control prompt, with feedback that has nothing to do with it; with `guided`, hindsight rollouts do too,
    but for those of a demonstration: that says itself how far to go.

    Raises:
        Unteachable: ids outside the vocabulary, non-finite logprobs, no user turn, or a teacher prompt that does not fit the context.
    """
    if not all(0 <= token < vocab_size for token in (*item.prompt_token_ids, *item.response_token_ids)):
        raise Unteachable(f"a token id is outside the model's vocabulary of {vocab_size}: the reply came from another model")
    if not all(math.isfinite(logp) and logp <= 1e-3 for logp in item.response_logprobs):
        raise Unteachable("the reply's logprobs are not all finite and at most 0, so it cannot be learnt from")
    template = item.template_kwargs
    own = item.source == "sampled"
    plain = item.source == "anchor" or not (item.feedback.strip() or item.demonstration)
    judge = "base" if item.source == "anchor" else teacher if own else hindsight_teacher
    book = item.book if judge == "book" else ()
    told = hindsight_messages(item.messages, item.feedback, item.demonstration, book)
    compared = not item.replayed if own else guided and not plain and item.demonstration is None
    control = hindsight_messages(item.messages, control_feedback, None, book) if control_feedback and compared else None
    sample = Sample(
        source=item.source,
        teacher="base" if judge == "book" else judge,
        student_prompt=item.prompt_token_ids,
        teacher_prompt=item.prompt_token_ids if plain else render(told, template),
        control_prompt=None if control is None else render(control, template),
        response=item.response_token_ids,
        served_logp=item.response_logprobs,
        on_policy=not own or item.version is None or item.version == parent,
        masked=own and item.version is None,
        age=parent - item.version if own and item.version is not None else 0,
        taught=item.taught,
        replayed=item.replayed,
    )
    if sample.length > max_context:
        raise Unteachable(
            f"the conversation with the feedback has {sample.length} tokens and the model reads {max_context}: "
            "shorten the feedback or the conversation"
        )
    return sample


def micro_batches(samples: Sequence[Sample], max_tokens: int, max_samples: int = 0, *, sharing: bool = False) -> list[list[Sample]]:
    """Group samples of similar length so that no padded group has over `max_tokens` positions (a longer sample goes alone).

    `max_samples` bounds a group's size too, unless it is 0. With `sharing`, what all prompts of a group begin with counts once.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: s.length):
        full = not groups or len(groups[-1]) == max_samples or positions([*groups[-1], sample], sharing) > max_tokens
        if not full:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def positions(group: Sequence[Sample], sharing: bool) -> int:
    """How many positions the largest of a group's passes has, padded: the student's, the teacher's or the control's."""

    def of(prompts: Sequence[tuple[int, ...]]) -> int:
        longest = max(len(prompt) + len(sample.response) for prompt, sample in zip(prompts, group, strict=True))
        shared = shared_length(prompts) if sharing else 0
        return shared + len(group) * (longest - shared)

    return max(
        of([s.student_prompt for s in group]),
        of([s.teacher_prompt for s in group]),
        of([s.control_prompt or s.teacher_prompt for s in group]),
    )


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of several prompts begin with, short of the last of any."""
    if len(prompts) < 2:
        return 0
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def lesson_groups(samples: Sequence[Sample], config: TrainingConfig, *, sharing: bool = False) -> list[list[Sample]]:
    """The samples of each source and part, in groups that a gradient step takes whole."""
    sizes = _minibatches(samples, config)
    return [
        group
        for source in ("sampled", "hindsight", "anchor")
        for part in PARTS
        for group in micro_batches(
            [s for s in samples if s.source == source and s.part == part], MICRO_BATCH_TOKENS, sizes[part], sharing=sharing
        )
    ]


def _minibatches(samples: Sequence[Sample], config: TrainingConfig) -> dict[Part, int]:
    """How many samples of each part a gradient step takes. Where rehearsal adds gradient steps, a lesson gives it half of its places.

    It is seen about as often then, and not more often than what must stay.
    """
    longer = config.replay_steps > 0 and any(sample.replayed for sample in samples)
    given = config.minibatch // 2 if longer else 0
    return {"lesson": config.minibatch - given, "replay": config.minibatch + given, "anchor": config.minibatch}
