"""Embedded serving against transformers' own `generate`: tokens per second on the same model, dtype and threads, in one process.

    python -m benchmarks.embedded_serving

`generate` is greedy, bare token ids out at the end. Serving streams every token with its text and logprob through an event loop. Each
measurement runs in a fresh thread, so that neither side meets the other's thread pool; the two sides take turns, and the figure is
the median of the pairs' ratios. The adapter's counterpart is PEFT's `generate`; with several adapters in one batch, its `adapter_names`.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from claas.adapters.initialise import write_initial_adapter
from claas.adapters.store import WEIGHTS
from claas.core.settings import load_settings
from claas.core.types import ChatMessage, LoraRuntimeRef, SamplingParams
from claas.inference.base import GenerationRequest
from claas.inference.embedded import EmbeddedInference
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare, in_fresh_thread
from claas.models.load import load_base_model

QUESTIONS = (
    "What is a volcano?",
    "How do airplanes fly, and why do they not fall down when the engines stop?",
    "Why is the sky blue?",
    "Explain recursion to a child of eight years, with an example from daily life.",
    "Give me three tips for better sleep.",
    "Who was Marie Curie?",
    "Write a short poem about autumn.",
    "What does a plumber do all day long?",
)
ADAPTERS = 4

T = TypeVar("T")
Names = Sequence[str | None]


@dataclass(frozen=True)
class Case:
    """How many requests at once, and the adapter of each."""

    name: str
    adapters: Names

    @property
    def n_requests(self) -> int:
        return len(self.adapters)


CASES = (
    Case("base, 1 request", (None,)),
    Case("base, 8 requests", (None,) * 8),
    Case("adapter, 1 request", ("a0",)),
    Case("adapter, 8 requests", ("a0",) * 8),
    Case(f"{ADAPTERS} adapters and base, 8 requests", tuple(f"a{i}" if i < ADAPTERS else None for i in range(8))),
)


def alone(work: Callable[[], T], threads: int) -> T:
    """Run `work` in a thread of its own, with `threads` torch threads that end with it."""

    def run() -> T:
        torch.get_num_threads()
        torch.set_num_threads(threads)
        return work()

    return in_fresh_thread("claas-peer", run)


def make_adapters(model: LoadedModel, folder: Path) -> dict[str, LoraRuntimeRef]:
    """Adapters of rank 32 on every linear layer, with a B that is not zero: else they would cost nothing."""
    refs = {}
    for i in range(ADAPTERS):
        path = folder / f"a{i}"
        path.mkdir()
        write_initial_adapter(path, model.config, base_model=model.id, rank=32, alpha=64, target_modules=None, seed=i)
        tensors = load_file(path / WEIGHTS)
        save_file({k: torch.randn_like(t) * 1e-3 if "lora_B" in k else t for k, t in tensors.items()}, path / WEIGHTS)
        refs[f"a{i}"] = LoraRuntimeRef(lora_id=f"a{i}", version=1, vllm_name=f"a{i}", lora_path=str(path))
    return refs


def load_peft(model: LoadedModel, refs: dict[str, LoraRuntimeRef]) -> PeftModel:
    """PEFT over a tree of its own, with every adapter loaded."""
    (first, ref), *others = refs.items()
    wrapped = PeftModel.from_pretrained(model.tree(), ref.lora_path, adapter_name=first)
    for name, other in others:
        wrapped.load_adapter(other.lora_path, adapter_name=name)
    return wrapped.eval()


def run_generate(model: LoadedModel, plain: nn.Module, wrapped: PeftModel, case: Case, n_tokens: int) -> float:
    """Tokens per second of `generate` on left-padded prompts."""
    prompts = [render(model.tokenizer, [ChatMessage(role="user", content=q)], {}) for q in QUESTIONS[: case.n_requests]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how: dict[str, Any] = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    generate: Any = plain.generate
    if any(case.adapters):
        generate = wrapped.generate
        wrapped.set_adapter(next(name for name in case.adapters if name))
        if len(set(case.adapters)) > 1:
            how["adapter_names"] = [name or "__base__" for name in case.adapters]
    began = time.perf_counter()
    with torch.inference_mode():
        out = generate(input_ids=ids, attention_mask=mask, **how)
    took = time.perf_counter() - began
    assert out.shape[1] == longest + n_tokens
    return case.n_requests * n_tokens / took


async def run_serving(model: LoadedModel, refs: dict[str, LoraRuntimeRef], case: Case, n_tokens: int, threads: int) -> tuple[float, float]:
    """Tokens per second of streams that are read to their end, and the median time to the first token in seconds."""
    backend = EmbeddedInference(model, ComputeShare(threads), max_batch=8)
    for name in {name for name in case.adapters if name}:
        await backend.activate(refs[name])
    params = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)
    first: list[float] = []

    async def read(question: str, adapter: str | None) -> int:
        asked = time.perf_counter()
        messages = (ChatMessage(role="user", content=question),)
        ref = refs[adapter] if adapter else None
        stream = await backend.stream(GenerationRequest(messages=messages, adapter=ref, sampling=params))
        n = 0
        async for chunk in stream:
            if not n:
                first.append(time.perf_counter() - asked)
            assert all(token.logprob <= 0 for token in chunk.tokens)
            n += len(chunk.tokens)
        return n

    try:
        await read(QUESTIONS[0], case.adapters[0])  # the first request meets cold caches, as `generate` did when it was warmed up
        first.clear()
        began = time.perf_counter()
        counts = await asyncio.gather(*(read(q, a) for q, a in zip(QUESTIONS, case.adapters, strict=False)))
        took = time.perf_counter() - began
    finally:
        await backend.aclose()
    assert counts == [n_tokens] * case.n_requests
    return sum(counts) / took, statistics.median(first)


def measure(n_tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    """All cases, the two sides taking turns."""
    model = load_base_model(load_settings())
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        refs = alone(lambda: make_adapters(model, Path(folder)), threads)
        plain, wrapped = model.tree(), alone(lambda: load_peft(model, refs), threads)
        for case in CASES:
            alone(lambda: run_generate(model, plain, wrapped, case, 4), threads)  # noqa: B023 - it is over before the next case
            pairs = []
            for _ in range(repeats):
                generate = alone(lambda: run_generate(model, plain, wrapped, case, n_tokens), threads)  # noqa: B023
                serving, first = asyncio.run(run_serving(model, refs, case, n_tokens, threads))
                pairs.append({"generate": round(generate, 2), "serving": round(serving, 2), "first_token_s": round(first, 4)})
            ratio = statistics.median(p["serving"] / p["generate"] for p in pairs)
            medians = {key: round(statistics.median(p[key] for p in pairs), 3) for key in pairs[0]}
            results[case.name] = {"ratio": round(ratio, 3), "median": medians, "pairs": pairs}
            print(
                f"{case.name:36} serving {medians['serving']:7.1f} tok/s   generate {medians['generate']:7.1f} tok/s"
                f"   ratio {ratio:5.2f}   first token {medians['first_token_s'] * 1000:5.0f} ms",
                flush=True,
            )
    return {
        "model": model.id,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": threads,
        "tokens_a_request": n_tokens,
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))},
        "cases": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each reply")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side and case")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads of either side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedded_serving.json"))
    args = parser.parse_args()
    results = measure(args.tokens, args.repeats, args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
