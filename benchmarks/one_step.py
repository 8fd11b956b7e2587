"""One learning step, done once by one side in a process of its own: how long it takes and how far memory rises above what it starts from.

    python -m benchmarks.one_step claas '{"batch": 4, "response": 128}'

Shared by `step` and `memory`, which start it for every figure, so that no side meets another's memory, threads or caches.

The sides do the same work on the same tokens: a base-model teacher that reads the feedback, the student's forward and backward, the
clip, and one AdamW step on a fresh adapter; top-100 support with a tail, α 0.5, every token on policy. Outside it, on all sides:
sampling, rewards, tokenizing, loading. CLaaS' own rescoring pass after the step has no counterpart elsewhere: it is timed apart.

- `claas`: `LessonStep`, as the service runs it.
- `naive`: PEFT, one forward a sample with float32 logits of the whole vocabulary, all graphs held until one backward.
- `trl`: the training loop of TRL's experimental `SDPOTrainer`, from the beginning of its step to the end, with the batch handed to it where
  it would sample one. It is set to the same loss, in bfloat16 autocast as is its default, and without activation checkpointing, which is
  its default too and slower: CLaaS does not checkpoint a model of this size either.

Peak memory is that of the process on a CPU (Linux: the high-water mark is reset before the step), of torch's allocator on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from claas.adapters.initialise import DEFAULT_TARGETS, linear_shapes, write_initial_adapter
from claas.core.settings import load_settings
from claas.core.types import TrainingConfig
from claas.models.base_model import LoadedModel
from claas.models.load import choose_device, choose_dtype, load_base_model
from claas.training.defaults import default_lora
from claas.training.policy import Policy
from claas.training.samples import Sample
from claas.training.step import LessonStep

TOP_K = 100
ALPHA = 0.5
LEARNING_RATE = 1e-4
QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """B replies of T tokens each, after a prompt; the teacher's prompt is longer by the feedback. Lengths in tokens.

    The replies are to so many different `prompts`, as those of one group are to one; 0 gives each reply a prompt of its own.
    `vocab` None is the model's own, with its own weights; any other size gives the model random ones. `steps` counts those timed,
    after one to warm up. `model` is "default", the embedded default model, or "qwen3-8b", that model's sizes with random weights.
    """

    batch: int = 4
    response: int = 128
    prompt: int = 64
    feedback: int = 32
    prompts: int = 0
    vocab: int | None = None
    model: str = "default"
    device: str = "cpu"
    threads: int = 0
    steps: int = 3


# --- the same model and tokens for every side ---


def load(case: Case) -> LoadedModel:
    device = choose_device(case.device)
    config: PretrainedConfig
    if case.model == "default":
        model = load_base_model(load_settings(device=case.device))
        if case.vocab in (None, model.config.vocab_size):
            return model
        config, tokenizer = model.config, model.tokenizer
        config.vocab_size = case.vocab
    else:
        config, tokenizer = Qwen3Config(**QWEN3_8B | ({"vocab_size": case.vocab} if case.vocab else {})), None
    dtype = choose_dtype("auto", device)
    torch.manual_seed(0)
    with device:
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    return LoadedModel(case.model, case.model, config, tokenizer, module, device, dtype)


def make_samples(case: Case, vocab: int) -> list[Sample]:
    told = case.prompt + case.feedback
    ids = torch.randint(vocab, (case.batch, told + case.response), generator=torch.Generator().manual_seed(0))
    ids[:, :told] = ids[torch.arange(case.batch) % (case.prompts or case.batch), :told]
    return [
        Sample(
            source="sampled",
            teacher="base",
            student_prompt=tuple(row[: case.prompt]),
            teacher_prompt=tuple(row[:told]),
            control_prompt=None,
            response=tuple(row[told:]),
            served_logp=(-1.0,) * case.response,
            on_policy=True,
            age=0,
        )
        for row in ids.tolist()
    ]


# --- the sides: each yields a step to be called again and again, which returns its own seconds and loss ---

Step = Callable[[], dict[str, float]]


def claas_step(base: LoadedModel, folder: Path, samples: list[Sample]) -> Step:
    policy = Policy(base, folder)
    optimizer = policy.optimizer(folder, LEARNING_RATE)
    config = TrainingConfig(
        learning_rate=LEARNING_RATE, alpha=ALPHA, teacher_top_k=TOP_K, teacher="base", gradient_steps=1, min_signal=0.0, max_kl=1e9
    )

    def step() -> dict[str, float]:
        began = time.perf_counter()
        result = LessonStep(policy, optimizer, config, samples, lambda: None).run()
        took = time.perf_counter() - began
        assert result.outcome in ("applied", "undone") and len(result.grad_norms) == 1
        rescore = result.seconds["rescore"]
        return {"seconds": took - rescore, "rescore_s": rescore, "loss": float(result.before.divergence.mean())}

    return step


def naive_step(base: LoadedModel, folder: Path, samples: list[Sample]) -> Step:
    model = PeftModel.from_pretrained(base.tree(), str(folder), is_trainable=True, torch_device=str(base.device)).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)

    def logits(prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([[*prompt, *response]], device=base.device)
        out: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        return out[0, -len(response) - 1 : -1]

    def step() -> dict[str, float]:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for s in samples:
            with torch.no_grad(), model.disable_adapter():
                teacher_TV = logits(s.teacher_prompt, s.response)
            losses.append(plain_loss(logits(s.student_prompt, s.response), teacher_TV))
        loss = torch.cat(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {"loss": float(loss.detach()), "seconds": time.perf_counter() - began}

    return step


def plain_loss(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """The generalised Jensen–Shannon divergence on the student's top-K and a tail, as one would write it down, (T,)."""
    index_TK = student_TV.detach().topk(TOP_K, dim=-1).indices

    def buckets(logits_TV: Tensor) -> Tensor:
        logp_TV = logits_TV.log_softmax(-1)
        tail_T1 = logp_TV.scatter(-1, index_TK, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logp_TV.gather(-1, index_TK), tail_T1], dim=-1)

    p_TS, q_TS = buckets(student_TV), buckets(teacher_TV)
    m_TS = torch.logaddexp(p_TS + math.log(1 - ALPHA), q_TS + math.log(ALPHA))
    return ((1 - ALPHA) * p_TS.exp() * (p_TS - m_TS) + ALPHA * q_TS.exp() * (q_TS - m_TS)).sum(-1)


def trl_steps(base: LoadedModel, folder: Path, samples: list[Sample], case: Case) -> list[dict[str, float]]:
    """The whole run of TRL's trainer, one dict for each step."""
    import datasets
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    def rows(tokens: list[tuple[int, ...]]) -> Tensor:
        return torch.tensor(tokens, device=base.device)

    batch = {
        "prompt_ids": rows([s.student_prompt for s in samples]),
        "completion_ids": rows([s.response for s in samples]),
        "teacher_input_ids": rows([s.teacher_prompt + s.response for s in samples]),
    }
    masks = {name.replace("_input_ids", "_attention_mask").replace("_ids", "_mask"): torch.ones_like(ids) for name, ids in batch.items()}
    records: list[dict[str, float]] = []

    class Given(SDPOTrainer):  # type: ignore[misc]
        """The trainer, given its batch."""

        def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
            return batch | masks

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.began
            records.append({"seconds": seconds, "loss": trainer._metrics["train"]["self_distillation/distillation_loss"][-1]})

    args = SDPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=base.device.type == "cpu",
        bf16=base.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        per_device_train_batch_size=case.batch,
        num_generations=case.batch,
        max_steps=case.steps + 1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.0,
        max_grad_norm=1.0,
        distillation_mode="topk_logits",
        distillation_topk=TOP_K,
        distillation_alpha=ALPHA,
        distillation_add_tail=True,
        teacher_model_kind="base",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prompts = datasets.Dataset.from_dict({"prompt": ["x"] * 64})
    rank, alpha = default_lora(base.n_params)
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(DEFAULT_TARGETS), task_type="CAUSAL_LM")
    trainer = Given(
        model=base.tree(), reward_funcs=_no_reward, args=args, train_dataset=prompts, processing_class=base.tokenizer, peft_config=lora,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    return records


def _no_reward(**_: Any) -> list[float]:
    raise AssertionError("nothing is sampled here")


# --- what a step must cost at least ---


def step_flops(base: LoadedModel, case: Case) -> float:
    """Floating point operations of a step's matrix products: each once, a prompt of several replies too; no gradient of frozen weights."""
    shapes = [shape for name, shape in linear_shapes(base.config).items() if name.rpartition(".")[2] in DEFAULT_TARGETS]
    config, (rank, _) = base.config, default_lora(base.n_params)
    prompts, told = case.prompts or case.batch, case.prompt + case.feedback
    student, teacher = (prompts * prompt + case.batch * case.response for prompt in (case.prompt, told))
    weights = sum(o * i for o, i in shapes)
    backbone = 2 * weights * (2 * student + teacher)
    adapter = 3 * 2 * rank * sum(o + i for o, i in shapes) * student
    head = 3 * 2 * config.hidden_size * config.vocab_size * case.response * case.batch
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)

    def seen(prompt: int) -> int:
        """Twice the pairs of a position and one that it sees. A reply's positions see its prompt too."""
        return prompts * prompt**2 + case.batch * ((prompt + case.response) ** 2 - prompt**2)

    # Two products, and twice that backward.
    attention = 2 * config.num_hidden_layers * width * (3 * seen(case.prompt) + seen(told))
    return float(backbone + adapter + head + attention)


def gemm_rate(base: LoadedModel, positions: int) -> float:
    """The best rate of a matrix product that was seen, in operations a second: square ones, and the model's own over `positions` rows."""
    config = base.config
    best = 0.0
    for rows, inner, outer in ((1024,) * 3, (2048,) * 3, (positions, config.hidden_size, config.intermediate_size)):
        a, b = (torch.randn(size, device=base.device).to(base.dtype) for size in ((rows, inner), (outer, inner)))
        for _ in range(12):
            began = _now(base.device)
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * rows * inner * outer / (_now(base.device) - began))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- memory ---


def reset_peak(device: torch.device) -> int:
    """Forget the highest memory use so far. Returns the present one, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


# --- one side in this process ---


def measure(side: str, case: Case) -> dict[str, Any]:
    """The fastest step after the first, the loss of the first, and by how many bytes memory rose above what the loaded model took."""
    base = load(case)
    positions = (case.prompts or case.batch) * case.prompt + case.batch * case.response
    if side == "floor":
        rate, flops = gemm_rate(base, positions), step_flops(base, case)
        return {"seconds": flops / rate, "flops": flops, "gemm_flops_per_s": rate, "vocab": base.config.vocab_size, **conditions(base)}
    rank, alpha = default_lora(base.n_params)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_initial_adapter(folder, base.config, base_model=base.id, rank=rank, alpha=alpha, target_modules=None)
        samples = make_samples(case, base.config.vocab_size)
        if side == "trl":
            import trl.experimental.sdpo  # noqa: F401 - a library's own size is not the step's
        start = reset_peak(base.device)
        if side == "trl":
            steps = trl_steps(base, folder, samples, case)
        else:
            step = (claas_step if side == "claas" else naive_step)(base, folder, samples)
            steps = [step() for _ in range(case.steps + 1)]
        rise = peak(base.device) - start
    best = min(steps[1:], key=lambda s: s["seconds"])
    return {**best, "loss": steps[0]["loss"], "peak_bytes": rise, "all_seconds": [round(s["seconds"], 4) for s in steps]}


def conditions(base: LoadedModel) -> dict[str, Any]:
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return {
        "device": torch.cuda.get_device_name() if base.device.type == "cuda" else cpu,
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", choices=["claas", "naive", "trl", "floor"])
    parser.add_argument("case", type=json.loads)
    args = parser.parse_args()
    fields: Mapping[str, Any] = args.case
    case = Case(**fields)
    torch.set_num_threads(case.threads or len(os.sched_getaffinity(0)))
    print(json.dumps(measure(args.side, case)))


if __name__ == "__main__":
    main()
