"""Micro-batches whose samples begin alike, and those of one gradient step: computed together, they learn what they do alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from claas.models.base_model import LoadedModel
from claas.training.policy import Policy
from claas.training.samples import MICRO_BATCH_TOKENS, PARTS, lesson_groups
from tests.training.conftest import sample, unfuse
from tests.training.test_step import CONFIG, close, learn


def test_micro_batches_that_go_together_learn_what_they_do_alone(base: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = [sample(n, source="hindsight", prompt=3 + n) for n in range(4)]
    earlier = [replace(sample(n, source="hindsight", response=3 + n), replayed=True) for n in range(5, 8)]
    anchor = sample(9, source="anchor", teacher_prompt=sample(9).student_prompt)
    config = CONFIG.model_copy(update={"gradient_steps": 5, "minibatch": 2})
    counts, states = [], []
    for most in (MICRO_BATCH_TOKENS, 1):
        monkeypatch.setattr("claas.training.micro_batch.MICRO_BATCH_TOKENS", most)
        policy = Policy(base, folder)
        with mock.patch.object(policy, "hidden", wraps=policy.hidden) as hidden:
            learn(policy, folder, [*lesson, *earlier, anchor], config)
        counts.append(hidden.call_count)
        states.append(policy.snapshot())
    assert counts[1] == counts[0] + 4 * 2, "three micro-batches in one forward, in each of the four steps after the first"
    assert close(*states)


def test_what_all_prompts_of_a_micro_batch_begin_with_is_computed_once(policy: Policy, folder: Path) -> None:
    config = CONFIG.model_copy(update={"gradient_steps": 1})
    apart = [sample(n) for n in range(3)]
    common = (7,) * 20
    alike = [replace(s, student_prompt=common + s.student_prompt, teacher_prompt=common + s.teacher_prompt) for s in apart]
    alone, together = (learn(policy, folder, samples, config).forward_tokens for samples in (apart, alike))
    # The teacher's pass, the student's and the one after.
    assert together == alone + 3 * len(common)


def test_samples_that_begin_alike_go_together_where_that_is_computed_once(base: LoadedModel, folder: Path) -> None:
    long = tuple(n % 290 for n in range(400))
    samples = [replace(s, student_prompt=long + s.student_prompt, teacher_prompt=long + s.teacher_prompt) for s in map(sample, range(6))]
    shared, plain = Policy(base, folder), Policy(base, folder)
    unfuse(plain)
    together, apart = (learn(policy, folder, samples) for policy in (shared, plain))
    assert [len(b.samples) for b in together.batches] == [6]
    assert all(len(b.samples) <= 2 for b in apart.batches)
    assert together.forward_tokens < apart.forward_tokens / 4
    assert torch.allclose(together.before.divergence, apart.before.divergence, atol=1e-5)


@pytest.mark.parametrize(("minibatch", "lesson", "replay", "anchor"), [(4, 2, 6, 4), (2, 1, 3, 2), (1, 1, 1, 1), (0, 8, 8, 8)])
def test_a_lesson_gives_half_of_its_places_to_those_that_are_rehearsed(minibatch: int, lesson: int, replay: int, anchor: int) -> None:
    config = CONFIG.model_copy(update={"minibatch": minibatch, "replay_steps": 8})
    new = [sample(n, source="hindsight") for n in range(8)]
    earlier = [replace(s, replayed=True) for s in new]
    anchors = [sample(n, source="anchor") for n in range(8)]
    groups = lesson_groups([*new, *earlier, *anchors], config)
    largest = {part: max(len(group) for group in groups if group[0].part == part) for part in PARTS}
    assert largest == {"lesson": lesson, "replay": replay, "anchor": anchor}
    alone = lesson_groups([*new, *anchors], config)
    assert max(map(len, alone)) == (minibatch or 8), "there is nothing to rehearse"
    as_long = lesson_groups([*new, *earlier, *anchors], config.model_copy(update={"replay_steps": 0}))
    largest = {part: max(len(group) for group in as_long if group[0].part == part) for part in PARTS}
    assert largest == dict.fromkeys(PARTS, minibatch or 8), "rehearsal adds no steps in which the lesson would be seen again"
