"""One learning step of an 8B model on one GPU, its base weights waiting in host memory: seconds by phase and peak device memory against B.

    pip install 'claas[local]' && python -m benchmarks.gpu_step

The model has Qwen3-8B's sizes and random bfloat16 weights, so nothing is downloaded. Each step is what the engine does when another
process serves on the same GPU: base weights in, adapter and optimizer made, the whole `LessonStep`, base weights out. The first step of
each B warms up and is told apart. Needs a CUDA device with about 22 GiB free; writes nothing without one.

`--tiny` runs the same script on the CPU with a toy model, to see that it runs. Its figures mean nothing, and no file is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.one_step import ALPHA, LEARNING_RATE, QWEN3_8B, TOP_K, Case, conditions, make_samples
from claas.adapters.initialise import write_initial_adapter
from claas.core.types import TrainingConfig
from claas.models.base_model import LoadedModel
from claas.training.defaults import default_lora
from claas.training.memory import checkpointed, free_memory, meter_of, step_bytes, synchronize
from claas.training.policy import Policy
from claas.training.residency import Visiting
from claas.training.samples import Sample
from claas.training.step import LessonStep

AIM_BYTES = 22 * 2**30
TINY: dict[str, Any] = QWEN3_8B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 512,
}  # fmt: skip
TRAINING = TrainingConfig(
    learning_rate=LEARNING_RATE, alpha=ALPHA, teacher_top_k=TOP_K, teacher="base", gradient_steps=1, min_signal=0.0, max_kl=1e9
)


def build(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype, attention: str) -> LoadedModel:
    """Random weights, drawn on the device, then at home on the host."""
    torch.manual_seed(0)
    config = Qwen3Config(**sizes)
    with device:
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    module = module.to("cpu").eval().requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return LoadedModel("qwen3-8b", "qwen3-8b", config, None, module, device, dtype)


def one_step(base: LoadedModel, residency: Visiting, folder: Path, samples: list[Sample]) -> dict[str, float]:
    """Seconds of each phase of one step, and of all of it."""
    began = time.perf_counter()
    with residency.on_device() as seconds:
        policy = Policy(base, folder, max(sample.length for sample in samples))
        optimizer = policy.optimizer(folder, LEARNING_RATE)
        synchronize(base.device)
        ready = time.perf_counter()
        result = LessonStep(policy, optimizer, TRAINING, samples, lambda: None).run()
        learnt = time.perf_counter()
        assert len(result.grad_norms) == 1 and result.after is not None, result.reason
        phases = dict(result.seconds)
        del policy, optimizer, result
    whole = time.perf_counter() - began
    return {**phases, **seconds, "adapter": ready - began - seconds["load"], "step": learnt - ready, "whole": whole}


def measure(base: LoadedModel, residency: Visiting, case: Case, repeats: int) -> dict[str, Any]:
    """One B: the first step, the median of the others, and the device memory that they took."""
    rank, alpha = default_lora(base.n_params)
    samples = make_samples(case, base.config.vocab_size)
    tokens = max(sample.length for sample in samples)
    meter = meter_of(base.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_initial_adapter(folder, base.config, base_model=base.id, rank=rank, alpha=alpha, target_modules=None)
        steps = []
        for _ in range(repeats + 1):
            with meter.watch():
                steps.append(one_step(base, residency, folder, samples))
    return {
        "batch": case.batch,
        "first_seconds": steps[0],
        "seconds": {phase: statistics.median(step[phase] for step in steps[1:]) for phase in steps[0]},
        "peak_device_bytes": meter.most if base.device.type == "cuda" else None,
        "estimated_bytes": step_bytes(base, tokens, weights=residency.visiting_bytes),
        "layers_computed_twice": checkpointed(base, tokens),
        "free_bytes_afterwards": free_memory(base.device),
    }


def say(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    peak = "no figure" if row["peak_device_bytes"] is None else f"{row['peak_device_bytes'] / 2**30:.2f} GiB"
    print(
        f"B {row['batch']:2}   load {seconds['load']:6.2f} s   step {seconds['step']:6.2f} s   offload {seconds['offload']:6.2f} s   "
        f"whole {seconds['whole']:6.2f} s   peak {peak} (estimated {row['estimated_bytes'] / 2**30:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="replies in the lesson")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--response", type=int, default=1024, help="tokens of each reply")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each B, after one to warm up")
    parser.add_argument("--attention", choices=["sdpa", "eager", "flash_attention_2"], default="sdpa")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU, to see that the script runs; writes no file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_step.json"))
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device and found none: run it on one, or see that the script runs with --tiny")
    device, dtype = (torch.device("cpu"), torch.float32) if args.tiny else (torch.device("cuda", 0), torch.bfloat16)
    base = build(TINY if args.tiny else QWEN3_8B, device, dtype, args.attention)
    began = time.perf_counter()
    residency = Visiting(base)
    settled = time.perf_counter() - began
    label = "TINY MODEL ON THE CPU: these figures mean nothing" if args.tiny else "Qwen3-8B's sizes, random weights"
    print(f"{label}; {settled:.1f} s to settle in host memory, once", flush=True)
    rows = []
    for batch in args.batches:
        case = Case(batch=batch, response=args.response, prompt=args.prompt)
        rows.append(measure(base, residency, case, args.repeats))
        say(rows[-1])
    results = {
        "label": label,
        "tiny": args.tiny,
        "settings": {name: vars(args)[name] for name in ("prompt", "response", "repeats", "attention")},
        "conditions": conditions(base),
        "settle_seconds": settled,
        "base_bytes": sum(p.nbytes for p in base.module.parameters()),
        "rows": rows,
    }
    if args.tiny:
        print(json.dumps(results))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    met = max(row["peak_device_bytes"] for row in rows) <= AIM_BYTES
    print(f"written to {args.out}; the aim, a step within {AIM_BYTES / 2**30:.0f} GiB: {'met' if met else 'NOT met'}")
    sys.exit(not met)


if __name__ == "__main__":
    main()
