"""Ragged samples → right-padded micro-batches. Every length and id is checked; nothing is ever cut or re-encoded.

Shape legend
    B  sequences of a micro-batch   L  padded length   N  response tokens of the micro-batch, all sequences joined

Padding stands to the right of causal attention, so it needs no mask: no real position can see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage, DistillBatchItem, SampleSource, TeacherKind
from claas.training.hindsight import hindsight_messages
from claas.training.teachers import Speaker

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
    def length(self) -> int:
        return max(len(self.student_prompt), len(self.teacher_prompt)) + len(self.response)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids ready for one forward: `ids_BL`, and where in the flattened (B·L) hidden states each response token is predicted."""

    ids_BL: Tensor
    predict_N: Tensor
    targets_N: Tensor

    def to(self, device: torch.device) -> Sequences:
        return Sequences(self.ids_BL.to(device), self.predict_N.to(device), self.targets_N.to(device))


def prepare(
    item: DistillBatchItem,
    render: Render,
    *,
    teacher: TeacherKind,
    hindsight_teacher: TeacherKind = "base",
    parent: int,
    vocab_size: int,
    max_context: int,
    control_feedback: str,
) -> Sample:
    """One payload item as a `Sample`, rendered for the teacher of its source and checked. Anchors are the base model's own.

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
    told, control = (
        hindsight_messages(item.messages, *said, book) for said in ((item.feedback, item.demonstration), (control_feedback, None))
    )
    sample = Sample(
        source=item.source,
        teacher="base" if judge == "book" else judge,
        student_prompt=item.prompt_token_ids,
        teacher_prompt=item.prompt_token_ids if plain else render(told, template),
        control_prompt=render(control, template) if own and not item.replayed else None,
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


def micro_batches(samples: Sequence[Sample], max_tokens: int, max_samples: int = 0) -> list[list[Sample]]:
    """Group samples of similar length so that no padded group has over `max_tokens` positions (a longer sample goes alone).

    `max_samples` bounds a group's size too, unless it is 0.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: s.length):
        full = not groups or len(groups[-1]) == max_samples or (len(groups[-1]) + 1) * sample.length > max_tokens
        if not full:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
    """Right-pad prompt + response of each sequence. The token at position t is predicted at t − 1."""
    L = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids_BL = torch.zeros(len(prompts), L, dtype=torch.long)
    predict: list[Tensor] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids_BL[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        first = row * L + len(prompt) - 1
        predict.append(torch.arange(first, first + len(response)))
    return Sequences(ids_BL, torch.cat(predict), torch.tensor([token for response in responses for token in response]))
