"""How many times must it be told? Lesson after lesson on one adapter of a real service, by recipe and seed.

    pip install 'claas[local,bench]' && python -m benchmarks.learning

Each lesson is taught one feedback item at a time, each on the reply to another prompt, until at least 80 % of its probes comply, greedily,
or `--items` were given. After each lesson the probes of every lesson so far are asked again: the rows of the retention matrix. Damage is
the mean KL(base‖adapter), nats a token, estimated on replies that the base model sampled to unrelated questions at temperature 1.

Controls: `in_context` has the feedback in the prompt and no training (what the model can do at all when it is told), `in_context_together`
that of all the lessons, and `prior` is the recipe this one replaces: one step on the reply itself, frozen base teacher, learning rate 3e-5,
no rollouts, no replay, no anchors.
`hindsight-KIND` is the default with another teacher of the hindsight rollouts, `own-KIND` teaches the replies themselves by that teacher.

A run adds its courses to those in the file, in place of older ones of the same recipe and seed: a long benchmark can be run in parts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from benchmarks.lessons import LESSONS, UNRELATED, Lesson
from claas.core.types import TeacherKind
from claas.training.hindsight import HINDSIGHT_BLOCK
from tests.integration.process import Caller, Service, running

ENOUGH = 0.8
PROBE_TOKENS = 48
REPLY_TOKENS = 256
TRIES = 5
UNRELATED_REPLIES = 4
MOST_DAMAGE = 0.05
KEPT_FIGURES = ("reason", "first_try", "update", "retention", "cost")
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "no-replay": {"replay": 0},
    "no-anchors": {"anchors": 0},
    "no-imagined": {"imagined_prompts": 0},
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

    def teach(self, lesson: Lesson, number: int, training: dict[str, Any], seed: int) -> dict[str, Any]:
        """One feedback item, on a reply to the lesson's prompt of this number (they come in turn). Replies cut off are asked again."""
        for attempt in range(TRIES):
            fields: dict[str, Any] = {"max_tokens": REPLY_TOKENS, "temperature": 0.7, "seed": 1000 * seed + TRIES * number + attempt}
            reply = self._service.chat(lesson.prompts[(seed + number) % len(lesson.prompts)], self.lora_id, **fields)
            if reply["choices"][0]["finish_reason"] == "stop":
                break
        item = {"completion_id": reply["id"], "feedback": lesson.feedback, "training": training}
        answer = self._service.http.post("/v1/feedback", json={"requests": [item]})
        result: dict[str, Any] = answer.json()
        return result | {"status": "refused", "reason": result["error"]["message"]} if answer.status_code != 200 else result

    def score(self, model: str, question: str, completion: str) -> list[float]:
        body = {"model": model, "messages": [{"role": "user", "content": question}], "completion": completion}
        answer = self._service.http.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        return [float(logprob) for logprob in answer.json()["logprobs"]]

    @cached_property
    def _unrelated(self) -> list[tuple[str, str, list[float]]]:
        """Unrelated questions, replies that the base model sampled to them, and its logprobs of these."""

        def ask(asked: tuple[str, int]) -> tuple[str, str, list[float]]:
            question, seed = asked
            fields: dict[str, Any] = {"max_tokens": PROBE_TOKENS, "temperature": 1.0, "seed": seed}
            text = str(self._service.chat(question, self.base_model, **fields)["choices"][0]["message"]["content"])
            return question, text, self.score(self.base_model, question, text)

        return _together(ask, [(question, seed) for question in UNRELATED for seed in range(UNRELATED_REPLIES)])

    def damage(self) -> float:
        """KL(base‖adapter) on unrelated questions, nats a token, without bias: the mean of r − 1 − ln r, r = P(adapter) / P(base).

        Of replies that the base model sampled, r − 1 has the mean 0, so this is the KL as −ln r is, and varies far less from reply to reply
        (Schulman 2020, "Approximating KL divergence").
        """

        def terms(known: tuple[str, str, list[float]]) -> list[float]:
            question, text, base = known
            ratios = [n - b for n, b in zip(self.score(self.lora_id, question, text), base, strict=True)]
            return [math.expm1(ratio) - ratio for ratio in ratios]

        return float(statistics.mean(term for column in _together(terms, self._unrelated) for term in column))


def _together(work: Any, items: Sequence[Any]) -> list[Any]:
    """All at once, so that the service can batch them; results in order."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(work, items))


def share(lesson: Lesson, replies: Sequence[str]) -> float:
    return sum(map(lesson.complies, replies)) / len(replies)


def course(service: Service, recipe: str, seed: int, lessons: Sequence[Lesson], most_items: int) -> dict[str, Any]:
    """All lessons in a row on one adapter."""
    student = Student(service, f"{recipe}-{seed}/assistant")
    taught: list[dict[str, Any]] = []
    for number, lesson in enumerate(lessons):
        began = time.perf_counter()
        shares, outcomes = [share(lesson, student.greedy(lesson.probes))], list[dict[str, Any]]()
        while shares[-1] < ENOUGH and len(outcomes) < most_items:
            outcomes.append(_figures(student.teach(lesson, len(outcomes), RECIPES[recipe], seed)))
            shares.append(share(lesson, student.greedy(lesson.probes)))
        seconds = time.perf_counter() - began
        replies = {known.name: student.greedy(known.probes) for known in lessons[: number + 1]}
        row = {known.name: share(known, replies[known.name]) for known in lessons[: number + 1]}
        entry = {
            "lesson": lesson.name,
            "shares": shares,
            "learnt": shares[-1] >= ENOUGH,
            "items": len(outcomes),
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
    if answer["status"] == "refused":
        return {"status": answer["status"], "reason": answer["reason"]}
    metadata = answer["distill_result"]["metadata"]
    return {"status": answer["status"]} | {key: metadata[key] for key in KEPT_FIGURES if key in metadata}


def in_context(service: Service, lessons: Sequence[Lesson]) -> tuple[dict[str, float], dict[str, float]]:
    """What the untrained model does with a lesson's feedback in its prompt, the ceiling of what the teacher can teach, and with that of all
    these lessons: what it keeps of them without training."""
    student = Student(service, "in-context/assistant")
    all_told = "\n".join(lesson.feedback for lesson in lessons)
    alone = {lesson.name: share(lesson, student.greedy(lesson.probes, lesson.feedback)) for lesson in lessons}
    return alone, {lesson.name: share(lesson, student.greedy(lesson.probes, all_told)) for lesson in lessons}


def summarise(courses: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each recipe over its seeds. A lesson that was not learnt counts as one item more than its course gave it."""
    summary = {}
    for recipe in dict.fromkeys(course["recipe"] for course in courses):
        courses_of_recipe = [course for course in courses if course["recipe"] == recipe]
        own = [course["lessons"] for course in courses_of_recipe]
        entries = [entry for lessons in own for entry in lessons]
        needed = [e["items"] if e["learnt"] else course["most_items"] + 1 for course in courses_of_recipe for e in course["lessons"]]
        kept = [share for lessons in own for name, share in lessons[-1]["retention"].items() if name != lessons[-1]["lesson"]]
        summary[recipe] = {
            "seeds": len(own),
            "items_median": statistics.median(needed),
            "learnt": f"{sum(e['learnt'] for e in entries)}/{len(entries)}",
            "seconds_median": statistics.median(e["seconds"] for e in entries),
            "kept": f"{sum(share >= ENOUGH for share in kept)}/{len(kept)}",
            "kept_median": statistics.median(kept) if kept else None,
            "damage_at_the_end_mean": round(statistics.mean(lessons[-1]["damage"] for lessons in own), 4),
        }
    return summary


def plot(result: dict[str, Any], out: Path) -> None:
    """Compliance lesson by lesson for each recipe, over seeds (the diagonal and below: retention), and damage."""
    from matplotlib import pyplot as plt

    recipes = list(result["summary"])
    figure, axes = plt.subplots(1, len(recipes) + 1, figsize=(3.6 * (len(recipes) + 1), 3.6), squeeze=False, layout="constrained")
    for axis, recipe in zip(axes[0], recipes, strict=False):
        own = [course["lessons"] for course in result["courses"] if course["recipe"] == recipe]
        names = [entry["lesson"] for entry in own[0]]
        cells = [
            [statistics.mean(lessons[row]["retention"].get(name, math.nan) for lessons in own) for name in names]
            for row in range(len(names))
        ]
        axis.imshow(cells, vmin=0, vmax=1, cmap="Blues")
        for row, line in enumerate(cells):
            for column, cell in enumerate(line[: row + 1]):
                axis.text(column, row, f"{cell:.1f}", ha="center", va="center", color="white" if cell > 0.6 else "black")
        axis.set(title=recipe, xticks=range(len(names)), yticks=range(len(names)), yticklabels=[f"after {name}" for name in names])
        axis.set_xticklabels(names, rotation=60)
        axes[0][-1].plot(
            names, [statistics.mean(lessons[row]["damage"] for lessons in own) for row in range(len(names))], marker="o", label=recipe
        )
    axes[0][-1].axhline(MOST_DAMAGE, linestyle="--", color="gray")
    axes[0][-1].set(title="damage, nats a token")
    axes[0][-1].tick_params(axis="x", rotation=60)
    axes[0][-1].legend(frameon=False)
    figure.suptitle("Share of held-out probes that comply, after each lesson")
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--lessons", nargs="+", choices=[lesson.name for lesson in LESSONS], default=[lesson.name for lesson in LESSONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=6, help="feedback items a lesson may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.json"))
    args = parser.parse_args()
    lessons = [lesson for lesson in LESSONS if lesson.name in args.lessons]
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"courses": []}
    result["machine"] = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "data") as service:
        alone, result["in_context_together"] = in_context(service, lessons)
        result["in_context"] = result.get("in_context", {}) | alone
        print(f"in context   {alone}\n    together {result['in_context_together']}", flush=True)
        for seed in args.seeds:
            for recipe in args.recipes:
                done = course(service, recipe, seed, lessons, args.items)
                others = [c for c in result["courses"] if (c["recipe"], c["seed"]) != (recipe, seed)]
                result["courses"] = [*others, done | {"training": RECIPES[recipe], "most_items": args.items}]
                result["summary"] = summarise(result["courses"])
                args.out.write_text(json.dumps(result, indent=2) + "\n")  # an interrupted run keeps what it saw
    plot(result, args.out.with_suffix(".svg"))
    for recipe, figures in result["summary"].items():
        print(f"{recipe:16} {figures}")
    print(f"written to {args.out} and {args.out.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
