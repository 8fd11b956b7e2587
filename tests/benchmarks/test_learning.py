"""The learning benchmark's arithmetic: what its summary counts, and how damage is estimated."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.learning import ENOUGH, Student, summarise
from benchmarks.lessons import UNRELATED


def entry(name: str, items: int, learnt: bool, retention: dict[str, float]) -> dict[str, Any]:
    return {"lesson": name, "items": items, "learnt": learnt, "seconds": 10.0 * items, "retention": retention, "damage": 0.01 * items}


def course(seed: int, *lessons: dict[str, Any], recipe: str = "default", most_items: int = 3) -> dict[str, Any]:
    return {"recipe": recipe, "seed": seed, "most_items": most_items, "lessons": list(lessons)}


def test_a_lesson_that_was_not_learnt_counts_as_one_item_more_and_the_last_one_is_not_kept() -> None:
    first = course(0, entry("a", 1, True, {"a": 1.0}), entry("b", 3, False, {"a": ENOUGH, "b": 0.2}))
    second = course(1, entry("a", 2, True, {"a": 1.0}), entry("b", 2, True, {"a": 0.6, "b": 1.0}))
    prior = course(0, entry("a", 6, False, {"a": 0.0}), recipe="prior", most_items=6)
    summary = summarise([first, second, prior])
    assert summary["default"] | {"kept_median": None} == {
        "seeds": 2, "items_median": 2.0, "learnt": "3/4", "seconds_median": 20.0, "kept": "1/2", "kept_median": None,
        "damage_at_the_end_mean": 0.025,
    }  # fmt: skip
    assert summary["default"]["kept_median"] == pytest.approx(0.7)
    assert (summary["prior"]["items_median"], summary["prior"]["kept"]) == (7, "0/0")


def test_damage_is_the_kl_of_what_the_adapter_says_of_the_base_models_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens, A and B: 0.8 and 0.2 to the base model, 0.5 each to the adapter. The replies are as the base model would sample them."""
    answers = iter([letter for _ in UNRELATED for letter in ("AAAAB", "AAAAB", "AAAAB", "AAAAB")])

    def chat(*_: object, **__: object) -> dict[str, Any]:
        return {"choices": [{"message": {"content": next(answers)}}]}

    student = Student.__new__(Student)
    student.lora_id, student.base_model = "me/a", "base"
    student._service = SimpleNamespace(chat=chat)  # type: ignore[assignment]
    share = {"base": {"A": 0.8, "B": 0.2}, "me/a": {"A": 0.5, "B": 0.5}}
    monkeypatch.setattr(Student, "score", lambda _, model, __, text: [math.log(share[model][letter]) for letter in text])
    assert student.damage() == pytest.approx(0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5))
    assert student.damage() == student.damage(), "the base model is asked once"
