"""Peak memory of one learning step against the batch B and the reply length T: flat in B, once one micro-batch is full.

    pip install 'claas[local,bench]' && python -m benchmarks.memory

Samples go through the model in micro-batches of a bounded number of tokens, so a larger batch takes longer and not more room. What is kept
from one micro-batch to the next are the targets: about 2 KB a reply token. Every figure comes from a process of its own, and is how far
that process' memory rose above what the loaded model took.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.one_step import Case
from benchmarks.step import run_side
from claas.training.samples import MICRO_BATCH_TOKENS

PROMPT = 64
FEEDBACK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--responses", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--model", choices=["default", "qwen3-8b"], default="default", help="qwen3-8b: its sizes, random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 takes all cores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    growth: dict[int, float] = {}
    for response in args.responses:
        peaks: dict[int, int] = {}
        for batch in args.batches:
            case = Case(
                batch=batch, response=response, prompt=PROMPT, feedback=FEEDBACK, model=args.model, device=args.device,
                threads=args.threads, steps=1,
            )  # fmt: skip
            figures = run_side("claas", case)
            peaks[batch] = figures["peak_bytes"]
            rows.append({"case": asdict(case), "peak_bytes": peaks[batch], "seconds": figures["seconds"]})
            print(f"T {response:4}  B {batch:2}   {peaks[batch] / 1e6:7.0f} MB   {figures['seconds']:6.2f} s", flush=True)
        growth[response] = growth_when_full(peaks, response)
        print(
            f"T {response:4}: the largest batch takes {growth[response]:.2f} times the memory of the first that fills a micro-batch",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"model": args.model, "rows": rows, "growth_when_full": growth}, indent=2) + "\n")
    plot(rows, args.out.with_suffix(".svg"))
    print(f"written to {args.out} and {args.out.with_suffix('.svg')}")


def growth_when_full(peaks: dict[int, int], response: int) -> float:
    """The largest batch's peak over that of the first batch that fills a micro-batch."""
    room = MICRO_BATCH_TOKENS // (PROMPT + FEEDBACK + response)
    full = min((b for b in peaks if b >= room), default=max(peaks))
    return peaks[max(peaks)] / peaks[full]


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "claas"
    figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
    for response in sorted({row["case"]["response"] for row in rows}):
        mine = [row for row in rows if row["case"]["response"] == response]
        xs = [row["case"]["batch"] for row in mine]
        axis.plot(xs, [row["peak_bytes"] / 1e9 for row in mine], marker="o", label=f"T = {response}")
        axis.set(xscale="log", xticks=xs, xlabel="replies in the batch B", ylabel="peak memory above the model, GB")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
