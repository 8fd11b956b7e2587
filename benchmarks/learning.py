"""How many times must it be told? Lesson after lesson on one adapter of a real service, by recipe and seed.

    python -m benchmarks.learning

Each lesson is taught until at least 80 % of its probes comply, greedily, or the rounds are over; one round is one feedback request on
replies to its prompts. After each lesson the probes of every lesson so far are asked again: the rows of the retention matrix. Damage is
the mean KL(base‖adapter), nats a token, estimated on replies that the base model sampled to unrelated questions at temperature 1.

Controls: `in-context` has the feedback in the prompt and no training (what the model can do at all when it is told), and `prior` is the
recipe this one replaces: one step on the reply itself, frozen base teacher, learning rate 3e-5, no rollouts, no replay, no anchors.
`hindsight-KIND` is the default with another teacher of the hindsight rollouts, `own-KIND` teaches the replies themselves by that teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from benchmarks.lessons import LESSONS, UNRELATED, Lesson
from claas.core.types import TeacherKind
from claas.training.hindsight import HINDSIGHT_BLOCK
from tests.integration.process import Caller, Service, running

ENOUGH = 0.8
PROBE_TOKENS = 48
REPLY_TOKENS = 160
TRIES = 3
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "no-replay": {"replay": 0},
    "no-anchors": {"anchors": 0},
    **{f"hindsight-{kind}": {"hindsight_teacher": kind} for kind in ("live", "ema", "snapshot", "book")},  # the default's is base
    **{f"own-{kind}": {"hindsight_rollouts": 0, "own_replies": True, "teacher": kind} for kind in get_args(TeacherKind)},
    "prior": {
        "learning_rate": 3e-5,
        "gradient_steps": 1,
        "minibatch": 0,
        "hindsight_rollouts": 0,
        "own_replies": True,
        "teacher": "base",
        "anchors": 0,
        "replay": 0,
        "min_signal": 0.0,
    },
}


class Student:
    """One adapter of a running service, as seen from outside."""

    def __init__(self, service: Caller, lora_id: str) -> None:
        self._service = service
        self.lora_id = lora_id
        answer = service.http.post("/v1/lora/init", json={"lora_id": lora_id})
        assert answer.status_code == 200, answer.text
        self.base_model = service.get("/v1/models")["data"][0]["id"]

    def greedy(self, questions: Sequence[str], told: str = "") -> list[str]:
        """Greedy replies; `told` is a feedback that stands in the prompt."""
        block = HINDSIGHT_BLOCK.replace("{feedback}", told) if told else ""

        def ask(question: str) -> str:
            reply = self._service.chat(question + block, self.lora_id, max_tokens=PROBE_TOKENS, temperature=0.0)
            return str(reply["choices"][0]["message"]["content"])

        return _together(ask, questions)

    def teach(self, lesson: Lesson, training: dict[str, Any], seed: int) -> dict[str, Any]:
        """One round: replies to the prompts, and the feedback on all that ended by themselves."""

        def reply_id(number: int) -> str | None:
            for attempt in range(TRIES):
                draw = 1000 * seed + TRIES * number + attempt
                fields: dict[str, Any] = {"max_tokens": REPLY_TOKENS, "temperature": 0.7, "seed": draw}
                reply = self._service.chat(lesson.prompts[number], self.lora_id, **fields)
                if reply["choices"][0]["finish_reason"] == "stop":
                    return str(reply["id"])
            return None

        ids = [found for found in _together(reply_id, range(len(lesson.prompts))) if found is not None]
        items = [{"completion_id": found, "feedback": lesson.feedback, "training": training} for found in ids]
        answer = self._service.http.post("/v1/feedback", json={"requests": items})
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def score(self, model: str, question: str, completion: str) -> list[float]:
        body = {"model": model, "messages": [{"role": "user", "content": question}], "completion": completion}
        answer = self._service.http.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        return [float(logprob) for logprob in answer.json()["logprobs"]]

    def damage(self) -> float:
        """KL(base‖adapter) on unrelated questions, nats a token."""

        def gaps(question: str) -> list[float]:
            fields: dict[str, Any] = {"max_tokens": PROBE_TOKENS, "temperature": 1.0, "seed": 7}
            text = str(self._service.chat(question, self.base_model, **fields)["choices"][0]["message"]["content"])
            base, new = (self.score(model, question, text) for model in (self.base_model, self.lora_id))
            return [b - n for b, n in zip(base, new, strict=True)]

        return float(statistics.mean(gap for column in _together(gaps, UNRELATED) for gap in column))


def _together(work: Any, items: Sequence[Any]) -> list[Any]:
    """All at once, so that the service can batch them; results in order."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(work, items))


def share(lesson: Lesson, replies: Sequence[str]) -> float:
    return sum(map(lesson.complies, replies)) / len(replies)


def course(service: Service, recipe: str, seed: int, lessons: Sequence[Lesson], rounds: int) -> dict[str, Any]:
    """All lessons in a row on one adapter."""
    student = Student(service, f"{recipe}-{seed}/assistant")
    taught: list[dict[str, Any]] = []
    for number, lesson in enumerate(lessons):
        began = time.perf_counter()
        shares, outcomes = [share(lesson, student.greedy(lesson.probes))], list[dict[str, Any]]()
        while shares[-1] < ENOUGH and len(outcomes) < rounds:
            answer = student.teach(lesson, RECIPES[recipe], seed=100 * seed + len(outcomes))
            outcomes.append({"status": answer["status"], **_figures(answer)})
            shares.append(share(lesson, student.greedy(lesson.probes)))
        seconds = time.perf_counter() - began
        replies = {known.name: student.greedy(known.probes) for known in lessons[: number + 1]}
        row = {known.name: share(known, replies[known.name]) for known in lessons[: number + 1]}
        entry = {
            "lesson": lesson.name,
            "shares": shares,
            "learnt": shares[-1] >= ENOUGH,
            "rounds": len(outcomes),
            "seconds": round(seconds, 1),
        }
        entry |= {"outcomes": outcomes, "retention": row, "damage": round(student.damage(), 4), "replies": replies}
        entry["unrelated"] = dict(zip(UNRELATED, student.greedy(UNRELATED), strict=True))
        taught.append(entry)
        print(
            f"{recipe:12} seed {seed}  {lesson.name:9} {' → '.join(f'{s:.0%}' for s in shares):24} {seconds:6.0f} s   "
            f"damage {entry['damage']:.3f}   kept {row}",
            flush=True,
        )
    return {"recipe": recipe, "seed": seed, "lessons": taught}


def _figures(answer: dict[str, Any]) -> dict[str, Any]:
    metadata = answer["distill_result"]["metadata"]
    return {key: metadata[key] for key in ("reason", "first_try", "update", "retention", "cost") if key in metadata}


def in_context(service: Service, lessons: Sequence[Lesson]) -> dict[str, float]:
    """What the untrained model does with the feedback in its prompt: the ceiling of what the teacher can teach."""
    student = Student(service, "in-context/assistant")
    return {lesson.name: share(lesson, student.greedy(lesson.probes, lesson.feedback)) for lesson in lessons}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--lessons", nargs="+", choices=[lesson.name for lesson in LESSONS], default=[lesson.name for lesson in LESSONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="feedback requests a lesson may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.json"))
    args = parser.parse_args()
    lessons = [lesson for lesson in LESSONS if lesson.name in args.lessons]
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "recipes": {name: RECIPES[name] for name in args.recipes},
        "courses": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "data") as service:
        result["in_context"] = in_context(service, lessons)
        print(f"in-context   {result['in_context']}", flush=True)
        for seed in args.seeds:
            for recipe in args.recipes:
                result["courses"].append(course(service, recipe, seed, lessons, args.rounds))
                args.out.write_text(json.dumps(result, indent=2) + "\n")  # an interrupted run keeps what it saw
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
