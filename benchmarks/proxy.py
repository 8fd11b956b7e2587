"""What CLaaS adds on top of vLLM asked directly: time to first token, time for each token, throughput, and CPU time.

    pip install 'claas[local,bench]' && python -m benchmarks.proxy

`claas serve` stands in front of a real vLLM. Both are asked by the same client for the same kind of chats, streamed, with `max_tokens` and
`temperature`: vLLM as any OpenAI client asks it, CLaaS with all that it does for that (exact ids and logprobs asked for, the reply stored).
They take turns, block by block, in an order that alternates from round to round; both speak through the same LoRA adapter, then both
through the base model. No two prompts are alike, so that no side finds the other's in vLLM's prefix cache.

Each client begins with a reply of a random length that does not count: then connections are open on either side, and clients are in step
neither with each other nor with vLLM. They pause for a random moment between two replies, of up to 0.1 s that does not count. A reply's
time for each token is that from its first to its last, over their number less one. Throughput is that of clients who always wait for a
reply. Intervals (95 %) are bootstrapped over rounds, and over the replies in them. A first token's time is aimed at by its mean: it waits
for vLLM's next step, anything from none of it to all, and of such times a mean is known far better than a median.

As with a vLLM that computes on a GPU and clients elsewhere, what CLaaS computes is taken from neither: it has a core of its own, and vLLM
and the client share the others. `--together` lets all three share all cores. The CPU seconds of each for 1,000 tokens say how much it is.

A CPU that computes a model takes a little longer or shorter each time, by more than CLaaS adds. With `--step-ms 20` a stand-in that only
speaks vLLM's protocol takes its place and gives each stream a token in that time: what remains is CLaaS's own part. Ids and logprobs are
asked of it directly too, since what they cost it says nothing of what they cost vLLM. It tells how long each request waited in it for
its first token, which hangs on when in a step it came (`stand_in_wait_ms_mean`): that is part of the first token's time, and most of its
noise. It is not left out: where client and stand-in share a core, what holds a request up on its way shortens its wait, and that differs by
side. Shorter steps have less of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from benchmarks.paced import first_token_waits
from benchmarks.stack import Reply, Sent, Stack, add_options, ask, machine, read, running_stack, write

Side = Literal["direct", "claas"]
SIDES: tuple[Side, ...] = ("direct", "claas")
ADAPTER = "assistant"
COLOURS = {"adapter": "#0969da", "base": "#8c959f"}
DRAWS = 1000
WARM_TOKENS = 8
LONGEST_PAUSE_S = 0.1
LEAST_ROUNDS = 2
EXACT = {"logprobs": True, "top_logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
"""What CLaaS asks vLLM for in each request."""


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure, CLaaS over vLLM (`ratio`) or less vLLM (`difference`), and the limit that it should keep."""

    figure: str
    measure: Literal["ratio", "difference"]
    limit: float
    at_most: bool = True

    def judge(self, low: float, high: float) -> str:
        """Met or missed if the whole interval is, else open: more rounds would tell."""
        if not self.at_most:
            return Aim(self.figure, self.measure, -self.limit).judge(-high, -low)
        return "met" if high <= self.limit else "missed" if low > self.limit else "open"

    def __str__(self) -> str:
        limit = f"{self.limit:g} times" if self.measure == "ratio" else f"{self.limit:+g} ms"
        return f"{'≤' if self.at_most else '≥'} {limit}"


AIMS = (
    Aim("first_token_ms_mean", "difference", 2.0),
    Aim("token_ms_median", "ratio", 1.03),
    Aim("tokens_per_s", "ratio", 0.97, at_most=False),
)


@dataclass(frozen=True, slots=True)
class Block:
    """Some clients that asked at the same time, each a few times. `seconds` is how long each waited for its replies, on average.

    `cpu_s` is what each process computed meanwhile. `waits` are what a stand-in kept each reply waiting for its first token, seconds.
    """

    replies: tuple[Reply, ...]
    seconds: float
    cpu_s: dict[str, float]
    waits: tuple[float, ...]

    @property
    def tokens(self) -> int:
        return sum(reply.tokens for reply in self.replies)


async def run_block(
    stack: Stack, side: Side, model: str, prompts: Iterator[str], clients: int, each: int, how: dict[str, Any], dice: random.Random
) -> Block:
    """`clients` clients, each asking `each` times in a row, on connections of their own."""
    url = stack.vllm_url if side == "direct" else stack.service.url
    waited = 0.0
    async with httpx.AsyncClient(base_url=url, timeout=600.0, verify=False, trust_env=False) as http:

        async def ask_once() -> Sent:
            nonlocal waited
            await asyncio.sleep(dice.uniform(0.0, LONGEST_PAUSE_S))
            began = time.perf_counter()
            sent = await ask(http, model, next(prompts), **how)
            waited += time.perf_counter() - began
            return sent

        async def client(warm_tokens: int) -> list[Sent]:
            await ask(http, model, next(prompts), **how | {"max_tokens": warm_tokens})
            return [await ask_once() for _ in range(each)]

        cpu = stack.cpu_seconds()
        sent = await asyncio.gather(*(client(dice.randint(1, how["max_tokens"])) for _ in range(clients)))
        cpu_after = stack.cpu_seconds()
    replies = tuple(map(read, itertools.chain.from_iterable(sent)))
    if failures := [reply.failure for reply in replies if reply.failure is not None or not reply.stamps]:
        raise RuntimeError(f"{side}: {len(failures)} of {len(replies)} requests failed, the first with: {failures[0]}")
    waits = first_token_waits(stack.vllm_url, [reply.prompt for reply in replies]) if stack.paced else [0.0] * len(replies)
    return Block(replies, waited / clients, {name: cpu_after[name] - cpu[name] for name in cpu}, tuple(waits))


def figures(replies: Sequence[Reply], tokens: int, seconds: float) -> dict[str, float]:
    """What replies came to; `tokens` in `seconds` is their throughput."""
    first = [1000 * reply.first_token_s for reply in replies]
    first_p50, first_p95 = np.percentile(first, (50, 95))
    token_p50, token_p95 = np.percentile([1000 * reply.per_token_s for reply in replies], (50, 95))
    return {
        "first_token_ms_mean": float(np.mean(first)),
        "first_token_ms_median": float(first_p50),
        "first_token_ms_p95": float(first_p95),
        "token_ms_median": float(token_p50),
        "token_ms_p95": float(token_p95),
        "tokens_per_s": tokens / seconds,
    }


def pooled(blocks: Sequence[Block]) -> dict[str, float]:
    """The figures of all blocks together."""
    replies = [reply for block in blocks for reply in block.replies]
    return figures(replies, sum(block.tokens for block in blocks), sum(block.seconds for block in blocks))


def compare(direct: Sequence[Block], claas: Sequence[Block], rng: np.random.Generator, draws: int = DRAWS) -> dict[str, dict[str, Any]]:
    """For each figure both sides' values, and their ratio and difference with intervals. Blocks of the same number are of one round."""
    ours, theirs = pooled(claas), pooled(direct)
    drawn: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(draws):
        rounds = rng.integers(len(direct), size=len(direct)).tolist()
        drawn.append((_redrawn(claas, rounds, rng), _redrawn(direct, rounds, rng)))
    compared = {}
    for name in ours:
        ratio = np.percentile([mine[name] / other[name] for mine, other in drawn], (2.5, 97.5))
        difference = np.percentile([mine[name] - other[name] for mine, other in drawn], (2.5, 97.5))
        compared[name] = {
            "direct": round(theirs[name], 3),
            "claas": round(ours[name], 3),
            "ratio": [round(float(x), 4) for x in (ours[name] / theirs[name], *ratio)],
            "difference": [round(float(x), 3) for x in (ours[name] - theirs[name], *difference)],
        }
    return compared


def _redrawn(blocks: Sequence[Block], rounds: Sequence[int], rng: np.random.Generator) -> dict[str, float]:
    """The figures of these rounds' blocks, with each block's replies drawn again."""
    chosen = [blocks[at] for at in rounds]
    replies = [block.replies[at] for block in chosen for at in rng.integers(len(block.replies), size=len(block.replies))]
    return figures(replies, sum(block.tokens for block in chosen), sum(block.seconds for block in chosen))


def cpu_of(blocks: Sequence[Block]) -> dict[str, float]:
    """CPU seconds of each process for 1,000 tokens."""
    tokens = sum(block.tokens for block in blocks)
    return {name: round(1000 * sum(block.cpu_s[name] for block in blocks) / tokens, 4) for name in blocks[0].cpu_s}


def summarise(blocks: dict[tuple[int, str, Side], list[Block]], seed: int = 0) -> list[dict[str, Any]]:
    """A row for each concurrency and model."""
    rows = []
    for concurrency, model in dict.fromkeys((c, m) for c, m, _ in blocks):
        direct, claas = (blocks[concurrency, model, side] for side in SIDES)
        compared = compare(direct, claas, np.random.default_rng(seed))
        verdicts = {aim.figure: aim.judge(*compared[aim.figure][aim.measure][1:]) for aim in AIMS}
        replies = {side: sum(len(b.replies) for b in blocks[concurrency, model, side]) for side in SIDES}
        cpu = {side: cpu_of(blocks[concurrency, model, side]) for side in SIDES}
        rows.append({"concurrency": concurrency, "model": model, "rounds": len(direct), "replies": replies} | compared)
        waits = {side: round(1000 * float(np.mean([b.waits for b in blocks[concurrency, model, side]])), 3) for side in SIDES}
        rows[-1] |= {"stand_in_wait_ms_mean": waits, "cpu_s_per_1000_tokens": cpu, "aims": verdicts}
    return rows


async def measure(
    stack: Stack, levels: Sequence[int], each: int, seconds: float, how: Mapping[Side, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rounds, each with all cells and both sides of them, as many as fit into `seconds`. `how` is what each side is asked for."""
    names = await asyncio.to_thread(names_of, stack)
    numbers = itertools.count()
    dice = random.Random(0)
    prompts = (f"{number}. Write a long story about the number {number}, and about those who live there." for number in numbers)
    for model, side in itertools.product(names, SIDES):  # caches and connections of either side are warm before anything counts
        await run_block(stack, side, names[model][side], prompts, max(levels), 1, how[side] | {"max_tokens": WARM_TOKENS}, dice)
    blocks: dict[tuple[int, str, Side], list[Block]] = {(c, m, s): [] for c in levels for m in names for s in SIDES}
    began, longest = time.perf_counter(), 0.0
    for turn in itertools.count():
        if turn >= LEAST_ROUNDS and time.perf_counter() - began + longest > seconds:
            break
        round_began = time.perf_counter()
        for concurrency, model in itertools.product(levels, names):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                done = await run_block(stack, side, names[model][side], prompts, concurrency, each, how[side], dice)
                blocks[concurrency, model, side].append(done)
        longest = max(longest, time.perf_counter() - round_began)
        print(f"round {turn + 1}: {time.perf_counter() - round_began:.0f} s", flush=True)
    return summarise(blocks)


def names_of(stack: Stack) -> dict[str, dict[Side, str]]:
    """What the adapter and the base model are called, on either side."""
    stack.service.chat("Hello", ADAPTER, max_tokens=1)  # from here on vLLM knows the adapter
    cards = httpx.get(f"{stack.vllm_url}/v1/models", timeout=30.0).json()["data"]
    base = next(card["id"] for card in cards if card["parent"] is None)
    (adapter,) = (card["id"] for card in cards if str(card["id"]).startswith(f"claas-{ADAPTER}-v"))
    service_base = stack.service.get("/v1/models")["data"][0]["id"]
    return {"adapter": {"direct": adapter, "claas": ADAPTER}, "base": {"direct": base, "claas": service_base}}


def say(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['concurrency']} at once, {row['model']}, {row['rounds']} rounds")
        for aim in AIMS:
            seen, form = row[aim.figure], ".3f" if aim.measure == "ratio" else "+.1f"
            at, low, high = (format(value, form) for value in seen[aim.measure])
            print(
                f"  {aim.figure:22}{seen['direct']:9.2f} direct {seen['claas']:9.2f} CLaaS   {aim.measure} {at} [{low}, {high}]"
                f"   aim {aim}: {row['aims'][aim.figure]}"
            )
        print(f"  CPU s for 1,000 tokens: direct {row['cpu_s_per_1000_tokens']['direct']}, CLaaS {row['cpu_s_per_1000_tokens']['claas']}")


def plot(result: dict[str, Any], out: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "claas"
    figure, axes = plt.subplots(1, len(AIMS), figsize=(4 * len(AIMS), 3.6), layout="constrained")
    titles = ("added to the first token, ms", "time for each token, CLaaS over vLLM", "tokens/s, CLaaS over vLLM")
    levels = sorted({row["concurrency"] for row in result["rows"]})
    for axis, aim, title in zip(axes, AIMS, titles, strict=True):
        for shift, (model, colour) in zip((0.97, 1.03), COLOURS.items(), strict=True):
            values = [row[aim.figure][aim.measure] for row in result["rows"] if row["model"] == model]
            bars = [[at - low for at, low, _ in values], [high - at for at, _, high in values]]
            style = {"color": colour, "label": model, "marker": "o", "capsize": 3}
            axis.errorbar([shift * level for level in levels], [at for at, _, _ in values], bars, **style)
        axis.axhline(aim.limit, linestyle="--", color="#cf222e", label="aim")
        axis.set(title=title, xscale="log", xticks=levels, xlabel="requests at once")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(frameon=False)
    machine = result["machine"]
    figure.suptitle(f"vLLM through CLaaS against vLLM asked directly ({machine['cpus']} cores, vLLM {machine['vllm']})")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--each", type=int, default=2, help="replies to each client in a block that count")
    parser.add_argument("--seconds", type=float, default=420.0, help="as many rounds as fit, but at least two")
    parser.add_argument("--step-ms", type=float, help="instead of vLLM a stand-in, which gives each stream a token in that time")
    parser.add_argument("--together", action="store_true", help="let vLLM, CLaaS and the client share all cores")
    add_options(parser, "proxy", max_tokens=32)
    args = parser.parse_args()
    if args.vllm_url and args.step_ms is not None:
        parser.error("--step-ms starts a stand-in, and --vllm-url names who runs already: give one of them")
    how = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    sides: dict[Side, dict[str, Any]] = {"direct": how if args.step_ms is None else how | EXACT, "claas": how}
    cores = machine()
    with running_stack(args.vllm_url, args.base_model, apart=not args.together, step_ms=args.step_ms) as stack:
        rows = asyncio.run(measure(stack, args.concurrency, args.each, args.seconds, sides))
    place = "elsewhere" if args.vllm_url else "on the same cores" if args.together else "on all cores but one"
    cores |= {"vllm": place if args.step_ms is None else f"a stand-in, {args.step_ms:g} ms a token, {place}"}
    result = {"machine": cores, "request": how, "rows": rows}
    say(rows)
    write(result, args.out)
    plot(result, args.out.with_suffix(".svg"))
    sys.exit(any("missed" in row["aims"].values() for row in rows))


if __name__ == "__main__":
    main()
