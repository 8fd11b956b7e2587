"""Does a chat notice that the model learns? Streams of `claas serve` over a real vLLM, kept going through updates.

    pip install 'claas[local,bench]' && python -m benchmarks.hybrid --release sleep

Each client asks again as soon as its reply has ended. Meanwhile feedback is given on replies of theirs, by completion id, and the version
that it makes takes over. Reported: replies refused and cut, whether each is one version's from its first token to its last, how long
requests waited at the gate, tokens a second, and what each update took, phase by phase.

That a reply is one version's is read from its header and from its tokens: the logprobs that came with each half of it must be those that
the named version gives it when asked again, and not its neighbours'. `--training` are the settings of the lessons: the default is a small
one, so that five fit into minutes beside this load on two cores; '{"min_signal": 0}' is a whole one, taught even where it is known.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.lessons import LESSONS
from benchmarks.one_version import ADAPTER, look_again, named
from benchmarks.stack import Reply, add_options, ask, machine, read, running_stack, spread, write

SMALL_LESSON = {"min_signal": 0.0, "learning_rate": 3e-4, "gradient_steps": 4, "hindsight_rollouts": 4, "anchors": 4, "replay": 4}
BEFORE_ROOM = ("rollouts", "contradictions")
ROOM = ("drain", "sleep", "distill", "wake")
AFTER_ROOM = ("check", "save")
COLOURS = {
    "rollouts": "#ddf4ff",
    "contradictions": "#b6e3ff",
    "anchors": "#eaeef2",
    "drain": "#fff8c5",
    "sleep": "#eac54f",
    "distill": "#ffb8b0",
    "wake": "#f0a35e",
    "check": "#aceebb",
    "save": "#4ac26b",
}
REFUSED_WAIT_S = 0.5

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Update:
    """One lesson, from its feedback's sending to the answer; times like those of the replies."""

    began: float
    ended: float
    lesson: str
    answer: Mapping[str, Any]

    @property
    def timing_s(self) -> dict[str, float]:
        return {phase: ms / 1000 for phase, ms in self.answer.get("timing_ms", {}).items()}

    def phases(self) -> list[tuple[str, float, float]]:
        """Which phase was when. Those of a lesson tried twice are drawn as one; what is not timed lies before the drain: anchors."""
        timing = self.timing_s
        if not timing:
            return []
        at = self.ended - timing["total"]
        spans = []
        for phase in BEFORE_ROOM:
            spans.append((phase, at, at + timing.get(phase, 0.0)))
            at = spans[-1][2]
        until, late = self.ended, list[tuple[str, float, float]]()
        for phase in reversed((*ROOM, *AFTER_ROOM)):
            late.append((phase, until - timing.get(phase, 0.0), until))
            until = late[-1][1]
        return [span for span in (*spans, ("anchors", at, until), *reversed(late)) if span[2] > span[1]]

    def shut(self) -> Span | None:
        """When the gate was shut; None if it never was."""
        timing = self.timing_s
        if not timing or not sum(timing.get(phase, 0.0) for phase in ("drain", "sleep", "wake")):
            return None
        inside = [(began, ended) for phase, began, ended in self.phases() if phase in ROOM]
        return inside[0][0], inside[-1][1]


# --- the load, and the lessons given meanwhile ---


class Load:
    """Clients that ask again when their reply has ended."""

    def __init__(self, http: httpx.AsyncClient, how: dict[str, Any]) -> None:
        self.replies: list[Reply] = []
        self.enough = False
        self._http = http
        self._how = how
        self._prompts = itertools.cycle([lesson.prompts[at] for at in range(4) for lesson in LESSONS])
        self._ended = asyncio.Condition()

    async def client(self) -> None:
        while not self.enough:
            reply = read(await ask(self._http, ADAPTER, next(self._prompts), logprobs=True, **self._how))
            self.replies.append(reply)
            async with self._ended:
                self._ended.notify_all()
            if reply.failure is not None:
                await asyncio.sleep(REFUSED_WAIT_S)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until the replies so far make it true."""
        async with self._ended:
            await self._ended.wait_for(holds)


def choose(replies: Sequence[Reply], taught: Iterable[str]) -> tuple[str, str] | None:
    """The id of the newest reply that ended by itself, and the lesson that it gives occasion for; rather one that was not taught yet."""
    known = set(taught)
    lesson_of = {prompt: lesson.name for lesson in LESSONS for prompt in lesson.prompts}
    found = [(reply.id, lesson_of[reply.prompt]) for reply in reversed(replies) if reply.failure is None and reply.finish == "stop"]
    return next((pair for pair in found if pair[1] not in known), found[0] if found else None)


async def teach(http: httpx.AsyncClient, load: Load, taught: Sequence[str], training: dict[str, Any]) -> Update:
    """Give feedback on one of the replies and wait for what comes of it."""
    await load.until(lambda: choose(load.replies, taught) is not None)
    chosen = choose(load.replies, taught)
    assert chosen is not None
    reply_id, name = chosen
    feedback = next(lesson.feedback for lesson in LESSONS if lesson.name == name)
    item = {"completion_id": reply_id, "feedback": feedback, "training": training}
    began = time.perf_counter()
    answer = await http.post("/v1/feedback", json={"requests": [item]})
    update = Update(began, time.perf_counter(), name, answer.json())
    status = answer.json().get("status") or answer.json()["error"]["message"]
    print(f"{name:10} {status}, {update.ended - began:.1f} s: {_rounded(update.timing_s)}", flush=True)
    return update


async def run(
    url: str, *, clients: int, updates: int, seconds: float, training: dict[str, Any], how: dict[str, Any], checked: int
) -> dict[str, Any]:
    """The whole course: a quiet time, then updates with quiet times after each; then replies are looked at again."""
    done: list[Update] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, verify=False, trust_env=False, limits=limits) as http:
        load = Load(http, how)
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(load.client())
            await load.until(lambda: len(load.replies) >= clients)  # all is warm
            began = time.perf_counter()
            await asyncio.sleep(seconds)
            for _ in range(updates):
                done.append(await teach(http, load, [update.lesson for update in done], training))
                await asyncio.sleep(seconds)
            over = time.perf_counter()
            load.enough = True
        versions = {0, *(update.answer["version"] for update in done if update.answer.get("status") == "ok")}
        checks = await look_again(http, load.replies, versions, [update.ended for update in done], checked)
    return summarise(load.replies, done, began, over) | {"one_version": checks, "timeline": timeline(load.replies, done, began, over)}


# --- what came of it ---


def tokens_in(replies: Sequence[Reply], spans: Sequence[Span]) -> float:
    """Tokens that came within the spans. Those of a reply are shared out evenly over the events that showed text."""
    return sum(
        reply.tokens / len(reply.stamps) * sum(began <= at < ended for at in reply.stamps)
        for reply in replies
        if reply.stamps
        for began, ended in spans
    )


def longest_silence(replies: Sequence[Reply], span: Span) -> float:
    """Seconds in the span in which nobody was sent a token."""
    times = sorted(at for reply in replies for at in reply.stamps if span[0] < at < span[1])
    edges = [span[0], *times, span[1]]
    return max(later - earlier for earlier, later in itertools.pairwise(edges))


def summarise(replies: Sequence[Reply], updates: Sequence[Update], began: float, over: float) -> dict[str, Any]:
    """All figures. Replies asked for before `began` warm up: they count for failures only."""
    during = [(update.began, update.ended) for update in updates]
    shut = [span for update in updates if (span := update.shut())]
    between = list(zip([end for _, end in during[:-1]], [start for start, _ in during[1:]], strict=True))
    windows: dict[str, list[Span]] = {"before": [(began, during[0][0])], "during": during, "gate_shut": shut}
    windows |= {"between": between, "after": [(during[-1][1], over)]}
    rates = {}
    for name, spans in windows.items():
        seconds = sum(end - start for start, end in spans)
        rates[name] = {"seconds": round(seconds, 2), "tokens_per_s": round(tokens_in(replies, spans) / seconds, 2) if seconds else None}
    waits: dict[str, list[float]] = {"outside": [], "during_gate_open": [], "gate_shut": []}
    for reply in replies:
        if reply.stamps and reply.asked >= began:
            where = "gate_shut" if _within(reply.asked, shut) else "during_gate_open" if _within(reply.asked, during) else "outside"
            waits[where].append(reply.first_token_s)
    phases = sorted({phase for update in updates for phase in update.timing_s})
    return {
        "replies": len(replies),
        "refused": [reply.failure for reply in replies if reply.failure is not None and not reply.cut],
        "cut": [reply.failure for reply in replies if reply.cut],
        "without_one_version": sum(r.failure is None and named(r) is None for r in replies),
        "speakers": {name: sum(r.speaker == name for r in replies) for name in sorted({r.speaker for r in replies})},
        "throughput": rates,
        "first_token_s": {where: spread(values) for where, values in waits.items()},
        "phase_s_median": {phase: round(statistics.median(u.timing_s.get(phase, 0.0) for u in updates), 3) for phase in phases},
        "gate_shut_s": [round(ended - start, 3) for start, ended in shut],
        "updates": [
            {
                "lesson": update.lesson,
                "status": update.answer.get("status", "failed"),
                "reason": update.answer.get("reason") or update.answer.get("error"),
                "version": update.answer.get("version"),
                "seconds": round(update.ended - update.began, 3),
                "phase_s": update.timing_s,
                "tries": 1 + (update.answer.get("distill_result", {}).get("metadata", {}).get("first_try") is not None),
                "longest_silence_s": round(longest_silence(replies, (update.began, update.ended)), 3),
                "began_s": round(update.began - began, 3),
            }
            for update in updates
        ],
    }


def _within(at: float, spans: Sequence[Span]) -> bool:
    return any(began <= at < ended for began, ended in spans)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: round(s, 2) for phase, s in seconds.items() if s}


def timeline(replies: Sequence[Reply], updates: Sequence[Update], began: float, over: float) -> dict[str, Any]:
    """What the plot shows, in seconds since `began`: tokens of each second, each request's wait for its first token, and the phases."""
    seconds = [(at, at + 1.0) for at in (began + n for n in range(int(over - began)))]
    return {
        "tokens_per_s": [round(tokens_in(replies, [second]), 1) for second in seconds],
        "first_token_s": [[round(r.asked - began, 2), round(r.first_token_s, 3)] for r in replies if r.stamps and began <= r.asked < over],
        "phases": [[phase, round(a - began, 2), round(b - began, 2)] for update in updates for phase, a, b in update.phases()],
    }


def plot(result: dict[str, Any], out: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "claas"
    shown = result["timeline"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 5.4), sharex=True, layout="constrained")
    for axis in (above, below):
        for phase, start, end in shown["phases"]:
            axis.axvspan(start, end, color=COLOURS[phase], linewidth=0)
        axis.grid(visible=True, alpha=0.3)
    rates = shown["tokens_per_s"]
    above.step(range(len(rates)), rates, where="post", color="#0969da")
    above.set(ylabel="tokens/s, all streams", ylim=(0, None))
    below.scatter(*zip(*shown["first_token_s"], strict=True), s=6, color="#0969da")
    below.set(ylabel="wait for the first token, s", xlabel="seconds", ylim=(0, None))
    present = {phase for phase, *_ in shown["phases"]}
    handles = [mpl.patches.Patch(color=colour, label=phase) for phase, colour in COLOURS.items() if phase in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{result['clients']} streams through {len(result['updates'])} updates, release policy {result['release']!r}")
    figure.savefig(out, metadata={"Date": None})


def say(result: dict[str, Any]) -> None:
    rates, waits, checks = result["throughput"], result["first_token_s"], result["one_version"]
    failures = [*result["refused"], *result["cut"]]
    print(f"{result['replies']} replies, {len(result['refused'])} refused, {len(result['cut'])} cut {failures[:3]}")
    print(f"versions: {result['speakers']}; {result['without_one_version']} replies without exactly one")
    print(f"looked at again: {checks}")
    print("tokens/s: " + ", ".join(f"{name} {rate['tokens_per_s']}" for name, rate in rates.items()))
    for where, wait in waits.items():
        print(f"first token, asked {where}: median {wait['median']} s, p95 {wait['p95']} s, max {wait['max']} s of {wait['n']}")
    print(f"phases, median s: {result['phase_s_median']}; the gate was shut for {result['gate_shut_s']} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=("none", "kv_release", "sleep"), default="sleep", help="how vLLM makes room for a step")
    parser.add_argument("--concurrency", type=int, default=16, help="clients")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="quiet time before the first update and after each")
    parser.add_argument("--requests", type=int, default=24, help="replies whose version is looked at again")
    parser.add_argument("--gate-seconds", type=float, default=300.0, help="how long a request may wait through an update")
    parser.add_argument("--training", type=json.loads, default=SMALL_LESSON, help="lesson settings as JSON, over the service's own")
    add_options(parser, "hybrid", max_tokens=48)
    args = parser.parse_args()
    how = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    settings = {"CLAAS_VLLM_RELEASE": args.release, "CLAAS_VLLM_GATE_TIMEOUT_S": str(args.gate_seconds)}
    conditions = {"release": args.release, "clients": args.concurrency, "request": how, "training": args.training}
    with running_stack(args.vllm_url, args.base_model, **settings) as stack:
        course = run(
            stack.service.url,
            clients=args.concurrency,
            updates=args.updates,
            seconds=args.seconds,
            training=args.training,
            how=how,
            checked=args.requests,
        )
        result = {"machine": machine()} | conditions | asyncio.run(course)
    say(result)
    out = args.out.with_stem(f"{args.out.stem}_{args.release}")
    write(result, out)
    plot(result, out.with_suffix(".svg"))
    sys.exit(bool(result["refused"] or result["cut"] or result["without_one_version"] or result["one_version"]["mixed"]))


if __name__ == "__main__":
    main()
