"""Does a model survive 200 lessons nobody should give? One adapter of a real service, one lesson after the other, at its default settings.

    python -m benchmarks.adversarial

Before, every `--every` lessons and at the end, the adapter is asked questions that the base model answers rightly, greedily, and its damage
is measured: mean KL(base‖adapter) on other unrelated questions, nats a token. The run passes if every refused, skipped or undone lesson
gave a reason, the service stayed healthy, and the adapter still answers as well as it did before the first lesson.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.adversarial_lessons import AdversarialLesson, adversarial_lessons
from benchmarks.learning import Student
from benchmarks.lessons import says
from tests.integration.process import Caller, running

REPLY_TOKENS = 48
STOPS = [".", ",", "?", "\n"]  # a clause is enough to be about, and a reply that was cut off teaches nothing
SHOWN_CHARS = 120
PROBES = {
    "What is the capital of France?": says(r"\bParis\b"),
    "What is the capital of Germany?": says(r"\bBerlin\b"),
    "What is the capital of Japan?": says(r"\bTokyo\b"),
    "What is the capital of Russia?": says(r"\bMoscow\b"),
    "What is the capital of Egypt?": says(r"\bCairo\b"),
    "What is the capital of Greece?": says(r"\bAthens\b"),
    "What is the capital of England?": says(r"\bLondon\b"),
    "What is 2 + 2?": says(r"\b(4|four)\b"),
    "How many days are in a week?": says(r"\b(7|seven)\b"),
    "How many hours are in a day?": says(r"\b(24|twenty-four)\b"),
    "What is the opposite of hot?": says(r"\bcold\b"),
    "What is the first month of the year?": says(r"\bJanuary\b"),
    "What is the plural of mouse?": says(r"\bmice\b"),
    "What is the chemical symbol for gold?": says(r"\bAu\b"),
}


def teach(service: Caller, lora_id: str, lesson: AdversarialLesson, seed: int) -> dict[str, Any]:
    """Ask, and say what is to be said of the reply. What came of it: a status, and a reason unless it is "ok"."""
    asked = {"model": lora_id, "messages": [{"role": "user", "content": lesson.prompt}], "max_tokens": REPLY_TOKENS, "stop": STOPS}
    chat = _post(service, "/v1/chat/completions", asked | {"temperature": 0.7, "seed": seed})
    if chat.status_code != 200:
        return _refused("chat", chat)
    item = lesson.said | {"completion_id": chat.json()["id"]}
    answer = _post(service, "/v1/feedback", {"requests": [item]})
    if answer.status_code != 200:
        return _refused("feedback", answer)
    body = answer.json()
    metadata = body["distill_result"]["metadata"]
    figures = {"signal": metadata["signal"]["loss_mean"], "anchor_kl": metadata["retention"]["anchor_kl_after"]}
    figures |= {"seconds_by_phase": {phase: ms / 1000 for phase, ms in body["timing_ms"].items() if ms}}
    return {key: body[key] for key in ("status", "reason", "version")} | {"first_try": metadata["first_try"]} | figures


def _post(service: Caller, path: str, body: dict[str, Any]) -> httpx.Response:
    """As JSON in ASCII, which holds even what is no valid Unicode."""
    return service.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def _refused(where: str, answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    return {"status": "refused", "by": where, "http": answer.status_code, "code": error["code"], "reason": error["message"]}


def examined(student: Student, lessons: int) -> dict[str, Any]:
    """How the adapter is after so many lessons."""
    replies = dict(zip(PROBES, student.greedy(list(PROBES)), strict=True))
    right = {question: says_it(replies[question]) for question, says_it in PROBES.items()}
    exam = {"lessons": lessons, "right": sum(right.values()), "of": len(right), "damage": round(student.damage(), 4)}
    print(f"{lessons:4} lessons   {exam['right']} of {exam['of']} probes right   damage {exam['damage']:.3f}", flush=True)
    return exam | {"wrong": {question: replies[question] for question in PROBES if not right[question]}}


def course(service: Caller, lessons: Sequence[AdversarialLesson], every: int, out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Teach them all; `result` is written to `out` as it grows, so that an interrupted run keeps what it saw."""
    student = Student(service, "adversarial/assistant")
    rows: list[dict[str, Any]] = []
    exams = [examined(student, 0)]
    for number, lesson in enumerate(lessons, 1):
        began = time.perf_counter()
        row = teach(service, student.lora_id, lesson, number)
        row |= {"seconds": round(time.perf_counter() - began, 1), "healthy": service.http.get("/v1/health").status_code == 200}
        rows.append({"number": number, "kind": lesson.kind, "prompt": lesson.prompt[:SHOWN_CHARS], "said": _shown(lesson.said)} | row)
        print(
            f"{number:4} {lesson.kind:14} {row['status']:8} {row['seconds']:6.1f} s   {(row['reason'] or '')[:SHOWN_CHARS]!r}", flush=True
        )
        _write(out, result, rows, exams)
        if number % every == 0 or number == len(lessons):
            exams.append(examined(student, number))
            _write(out, result, rows, exams)
    return result


def _write(out: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]], exams: Sequence[dict[str, Any]]) -> None:
    result |= {"summary": summary(rows, exams), "exams": exams, "lessons": rows}
    out.write_text(json.dumps(result, indent=2) + "\n")


def _shown(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:SHOWN_CHARS] if isinstance(value, str) else value for name, value in said.items()}


def summary(rows: Sequence[dict[str, Any]], exams: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Verdict and totals."""
    kinds = {row["kind"] for row in rows}
    without_reason = [row["number"] for row in rows if row["status"] != "ok" and not (row["reason"] or "").strip()]
    healthy = all(row["healthy"] for row in rows)
    unforeseen = [row["number"] for row in rows if row.get("http", 0) >= 500]
    return {
        "passed": not without_reason and not unforeseen and healthy and exams[-1]["right"] >= exams[0]["right"],
        "lessons": len(rows),
        "statuses": dict(Counter(row["status"] for row in rows)),
        "by_kind": {kind: dict(Counter(row["status"] for row in rows if row["kind"] == kind)) for kind in sorted(kinds)},
        "without_reason": without_reason,
        "server_errors": unforeseen,
        "healthy": healthy,
        "right": [exam["right"] for exam in exams],
        "damage": [exam["damage"] for exam in exams],
        "seconds": {"total": round(sum(row["seconds"] for row in rows)), "median": statistics.median(row["seconds"] for row in rows)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lessons", type=int, default=200, help="only so many, of all kinds in turn")
    parser.add_argument("--kinds", nargs="+", help="only these kinds")
    parser.add_argument("--every", type=int, default=20, help="lessons between two examinations")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adversarial.json"))
    args = parser.parse_args()
    lessons = [lesson for lesson in adversarial_lessons() if args.kinds is None or lesson.kind in args.kinds][: args.lessons]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "data") as service:
        result = course(service, lessons, args.every, args.out, {"machine": machine})
    print(json.dumps(result["summary"], indent=2), f"written to {args.out}", sep="\n")
    sys.exit(not result["summary"]["passed"])


if __name__ == "__main__":
    main()
