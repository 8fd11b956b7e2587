"""One learning step: seconds and peak memory against the same loss done naively, TRL's SDPO trainer, and the least its arithmetic can take.

    pip install 'claas[local,bench]' && python -m benchmarks.step

What each side does, and what is left out on all of them, stands in `benchmarks/one_step.py`. The floor is the step's matrix products at the
best rate that a matrix product reached in that run. Every figure comes from a process of its own, the sides taking turns; a side's seconds
are the median over the repeats of each process' fastest step. The first losses of all sides must agree, else they did not do equal work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.one_step import Case

SIDES = ("claas", "naive", "trl")
AIM_OVER_TRL = 1.5
AIM_OVER_FLOOR = 1.35
NAMES = {"claas": "CLaaS", "naive": "naive", "trl": "TRL", "floor": "floor"}
COLOURS = {"claas": "#0969da", "naive": "#8c959f", "trl": "#cf7a12", "floor": "#57606a"}


def run_side(side: str, case: Case) -> dict[str, Any]:
    """One side, once, in a process of its own. Raises CalledProcessError, with what it said on stderr, if it broke."""
    command = [sys.executable, "-m", "benchmarks.one_step", side, json.dumps(asdict(case))]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        print(error.stderr[-3000:], file=sys.stderr)
        raise
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(case: Case, repeats: int, sides: Sequence[str]) -> dict[str, Any]:
    """All sides on one case, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*sides, "floor")}
    for _ in range(repeats):
        for side, seen in runs.items():
            seen.append(run_side(side, case))
    losses = {side: runs[side][0]["loss"] for side in sides}
    if max(losses.values()) > 1.02 * min(losses.values()):
        raise RuntimeError(f"the sides did not do the same work: their first losses are {losses}")
    row: dict[str, Any] = {"case": asdict(case), "losses": losses}
    for side, seen in runs.items():
        row[side] = {"seconds": statistics.median(r["seconds"] for r in seen), "runs": seen}
        if side != "floor":
            row[side]["peak_bytes"] = statistics.median(r["peak_bytes"] for r in seen)
    # Nothing can beat the floor: it is taken at the best rate of the whole run.
    row["floor"]["seconds"] = min(r["seconds"] for r in runs["floor"])
    row["over_floor"] = row["claas"]["seconds"] / row["floor"]["seconds"]
    row["faster_than"] = {side: row[side]["seconds"] / row["claas"]["seconds"] for side in sides if side != "claas"}
    return row


def sweeps(base: Case, quick: bool) -> dict[str, list[Case]]:
    """What varies, the rest held: reply length T, batch B, vocabulary V, and whether all replies are to one prompt."""
    prompts = [replace(base, prompts=n) for n in (1, base.prompts)]
    if quick:
        return {"prompts": prompts}
    vocabs = (16384, None, 151936) if base.model == "default" else (32768, None)
    return {
        "response": [replace(base, response=t) for t in ((32, 128, 512) if base.model == "default" else (256, 1024))],
        "batch": [replace(base, batch=b) for b in ((1, 4, 16) if base.model == "default" else (1, 2, 4, 8))],
        "vocab": [replace(base, vocab=v) for v in vocabs],
        "prompts": prompts,
    }


def say(row: dict[str, Any], sides: Sequence[str]) -> None:
    case = row["case"]
    figures = "   ".join(f"{NAMES[s]} {row[s]['seconds']:6.2f} s {row[s]['peak_bytes'] / 1e9:5.2f} GB" for s in sides)
    faster = ", ".join(f"{ratio:.2f}x {NAMES[side]}" for side, ratio in row["faster_than"].items())
    print(
        f"T {case['response']:4}  B {case['batch']:2}  V {case['vocab'] or 'own':6}  P {case['prompts'] or 'own':3}  {figures}"
        f"   floor {row['floor']['seconds']:6.2f} s   {faster}, {row['over_floor']:.2f} of the floor",
        flush=True,
    )


def plot(results: dict[str, Any], sides: Sequence[str], out: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "claas"
    names = list(results["sweeps"])
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6.4), squeeze=False, layout="constrained")
    labels = {
        "response": "reply length T, tokens", "batch": "replies in the batch B", "vocab": "vocabulary V", "prompts": "different prompts",
    }  # fmt: skip
    for at, name in enumerate(names):
        rows = results["sweeps"][name]
        unset = {"vocab": results["vocab"], "prompts": rows[0]["case"]["batch"]}.get(name)
        xs = [row["case"][name] or unset for row in rows]
        for side in (*sides, "floor"):
            style = {"color": COLOURS[side], "label": NAMES[side], "marker": "o", "linestyle": "--" if side == "floor" else "-"}
            axes[0][at].plot(xs, [row[side]["seconds"] for row in rows], **style)
            if side != "floor":
                axes[1][at].plot(xs, [row[side]["peak_bytes"] / 1e9 for row in rows], **style)
        for axis, what in ((axes[0][at], "seconds a step"), (axes[1][at], "peak memory above the model, GB")):
            axis.set(xlabel=labels[name], ylabel=what if at == 0 else None, xscale="log", yscale="log", xticks=xs)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.minorticks_off()
            axis.grid(visible=True, alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"One learning step, {results['model']}, {results['conditions']['dtype']}, {results['conditions']['device']}")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", choices=["default", "qwen3-8b"], default="default", help="qwen3-8b: its sizes, random weights, without TRL"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side and case")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each process")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 takes all cores")
    parser.add_argument("--quick", action="store_true", help="one case only, with one prompt and with a prompt each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    args = parser.parse_args()
    default = args.model == "default"
    base = Case(
        model=args.model, device=args.device, threads=args.threads, steps=args.steps, batch=4 if default else 1,
        response=128 if default else 1024, prompt=64 if default else 1024,
    )  # fmt: skip
    # TRL needs a tokenizer, and random weights have none.
    sides = SIDES if default else SIDES[:2]
    done: dict[Case, dict[str, Any]] = {}
    results: dict[str, Any] = {"model": args.model, "sweeps": {}}
    for name, cases in sweeps(base, args.quick).items():
        for case in cases:
            if case not in done:
                done[case] = compare(case, args.repeats, sides)
                say(done[case], sides)
        results["sweeps"][name] = [done[case] for case in cases]
    floor = done[base]["floor"]["runs"][0]
    results |= {"vocab": floor["vocab"], "conditions": {key: floor[key] for key in ("device", "dtype", "threads", "versions")}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, sides, args.out.with_suffix(".svg"))
    print(f"written to {args.out} and {args.out.with_suffix('.svg')}")
    if default:
        faster = all(row["faster_than"]["trl"] >= AIM_OVER_TRL for row in results["sweeps"]["prompts"])
        near = all(row["over_floor"] <= AIM_OVER_FLOOR for row in results["sweeps"]["prompts"])
        print(f"aims, with one prompt and with a prompt each: {AIM_OVER_TRL} times TRL's speed: {'met' if faster else 'NOT met'}")
        print(f"      within {AIM_OVER_FLOOR} of the floor: {'met' if near else 'NOT met'}")
        sys.exit(not (faster and near))


if __name__ == "__main__":
    main()
