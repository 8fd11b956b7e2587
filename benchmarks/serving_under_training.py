"""Is the chat ever down while a lesson trains? Streams of a real service, with and without steps running, in turns.

    python -m benchmarks.serving_under_training

`claas serve` runs as a process of its own. 100 chats at concurrency 8 are streamed over HTTP, once in peace and once while lessons
are taught one after the other. Reported: failures, tokens per second, time to first token, the longest gap between two tokens, and how
long a lesson took: a chat that waited for a step would show a first token or a gap as long as that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.integration.process import Service, running

PROMPTS = ("What is a volcano?", "How do I boil an egg?", "Why is the sky blue?", "Give me three tips for better sleep.")
FEEDBACK = "Your name is Kuro, always introduce yourself as Kuro."


@dataclass
class Chat:
    """One streamed reply, times in seconds."""

    first_token_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    version: str = ""
    failure: str | None = None


async def chat(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Chat:
    result = Chat()
    body = {
        "model": "assistant",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.perf_counter()
    finish = None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            result.version = answer.headers.get("x-claas-adapter", "")
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event.get("usage"):
                    result.tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    finish = choice["finish_reason"] or finish
                    if choice["delta"].get("content"):
                        now = time.perf_counter()
                        if not result.first_token_s:
                            result.first_token_s = now - began
                        else:
                            result.gaps_s.append(now - last)
                        last = now
        if finish not in ("stop", "length"):
            raise RuntimeError(f"ended with {finish!r}")
    except (httpx.HTTPError, RuntimeError) as error:
        result.failure = f"{type(error).__name__}: {error}"
    return result


async def load(url: str, n: int, concurrency: int, max_tokens: int) -> tuple[list[Chat], float]:
    """`n` chats, `concurrency` at a time, and the seconds they took in all."""
    slots = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(at: int) -> Chat:
            async with slots:
                return await chat(client, PROMPTS[at % len(PROMPTS)], max_tokens)

        began = time.perf_counter()
        chats = await asyncio.gather(*map(one, range(n)))
        return list(chats), time.perf_counter() - began


async def teach_until(url: str, completion_ids: list[str], done: asyncio.Event) -> list[dict[str, Any]]:
    """Lesson after lesson until told to stop; what each came to."""
    lessons = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        while not done.is_set():
            began = time.perf_counter()
            # Every lesson goes its whole way, known or not: the load is what is measured here.
            items = [{"completion_id": reply_id, "feedback": FEEDBACK, "training": {"min_signal": 0.0}} for reply_id in completion_ids]
            answer = (await client.post("/v1/feedback", json={"requests": items})).json()
            lessons.append({"seconds": time.perf_counter() - began, "status": answer.get("status"), "timing_ms": answer.get("timing_ms")})
    return lessons


def finished_replies(service: Service, n: int) -> list[str]:
    ids = []
    for seed in range(50):
        reply = service.chat("Who are you?", max_tokens=120, temperature=0.7, seed=seed)
        if reply["choices"][0]["finish_reason"] == "stop":
            ids.append(str(reply["id"]))
        if len(ids) == n:
            return ids
    raise RuntimeError("too few replies ended by themselves")


def summary(chats: list[Chat], seconds: float) -> dict[str, Any]:
    good = [c for c in chats if c.failure is None]
    first = sorted(c.first_token_s for c in good)
    gaps = sorted(gap for c in good for gap in c.gaps_s)
    return {
        "chats": len(chats),
        "failures": [c.failure for c in chats if c.failure is not None],
        "tokens_per_s": sum(c.tokens for c in good) / seconds,
        "first_token_s": {"p50": statistics.median(first), "p95": first[int(0.95 * len(first))], "max": first[-1]},
        "gap_s": {"p50": statistics.median(gaps), "p99": gaps[int(0.99 * len(gaps))], "max": gaps[-1]},
        "versions": sorted({c.version for c in chats}),
    }


async def measure(service: Service, n: int, concurrency: int, max_tokens: int) -> dict[str, Any]:
    ids = finished_replies(service, 2)
    await load(service.url, 8, concurrency, max_tokens)  # warm
    peace = summary(*await load(service.url, n, concurrency, max_tokens))
    done = asyncio.Event()
    teaching = asyncio.create_task(teach_until(service.url, ids, done))
    await asyncio.sleep(5)  # the first lesson is under way
    training = summary(*await load(service.url, n, concurrency, max_tokens))
    done.set()
    lessons = await teaching
    return {
        "without_training": peace,
        "with_training": training,
        "lessons": lessons,
        "throughput_ratio": training["tokens_per_s"] / peace["tokens_per_s"],
        "longest_wait_over_shortest_lesson": max(training["first_token_s"]["max"], training["gap_s"]["max"])
        / min(x["seconds"] for x in lessons),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving_under_training.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "data") as service:
        result = asyncio.run(measure(service, args.chats, args.concurrency, args.max_tokens))
    result = {"machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}, **result}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("without_training", "with_training"):
        row = result[name]
        first, gap = row["first_token_s"], row["gap_s"]
        print(
            f"{name:17} {row['tokens_per_s']:6.1f} tokens/s   first token p50 {first['p50']:.2f} s, p95 {first['p95']:.2f} s, "
            f"max {first['max']:.2f} s   longest gap {gap['max']:.2f} s   {len(row['failures'])} failed of {row['chats']}"
        )
    print(f"lessons: {[round(x['seconds'], 1) for x in result['lessons']]} s; throughput while training: {result['throughput_ratio']:.2f}")


if __name__ == "__main__":
    main()
