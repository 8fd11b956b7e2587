"""What the double of Tinker remembers and does: runs, models in memory, checkpoints. It knows the API's types and no HTTP."""

from __future__ import annotations

import io
import json
import random
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors.torch import save
from tinker import types
from torch import Tensor

from claas.models.base_model import LoadedModel
from tests.doubles.tinker_faults import Ways
from tests.doubles.tinker_model import ALPHA, BadData, Base, Tensors, Trainee, model_pass, sample

Kind = Literal["weights", "sampler_weights"]
LOSSES = ("cross_entropy", "importance_sampling")


class Refused(Exception):
    """Answered at once with this status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Failed(Exception):
    """The future fails."""

    def __init__(self, text: str, category: str = "user") -> None:
        super().__init__(text)
        self.text, self.category = text, category


@dataclass(frozen=True, slots=True)
class Run:
    """A model as it is on record: it outlives its place in memory."""

    model_id: str
    session_id: str
    base_model: str
    lora: types.LoraConfig
    metadata: Mapping[str, Any]
    created: float


@dataclass(slots=True)
class Checkpoint:
    run: Run
    kind: Kind
    name: str
    lora: Mapping[str, Tensor]
    moments: Mapping[str, tuple[Tensor, Tensor]]
    steps: int
    created: float
    expires: float | None = None

    @property
    def path(self) -> str:
        return f"tinker://{self.run.model_id}/{self.kind}/{self.name}"


@dataclass(slots=True)
class Live:
    """A model in memory. `speaks` is the sampler checkpoint that was put in its place, if sampling has no place of its own."""

    trainee: Trainee
    speaks: str | None = None
    broken: bool = False


@dataclass(slots=True)
class TinkerEngine:
    """`runs`, `checkpoints` and `samplers` are durable; `live` is memory, gone with the process. `clock` is the time, for TTLs."""

    model: LoadedModel
    ways: Ways
    violations: list[str]
    runs: dict[str, Run] = field(default_factory=dict)
    checkpoints: dict[tuple[str, Kind, str], Checkpoint] = field(default_factory=dict)
    samplers: dict[str, str] = field(default_factory=dict)
    sessions: set[str] = field(default_factory=set)
    live: dict[str, Live] = field(default_factory=dict)
    late_s: float = 0.0
    _base: Base | None = None

    @property
    def base(self) -> Base:
        if self._base is None:
            self._base = Base(self.model.tree())
        return self._base

    def now(self) -> float:
        return time.time() + self.late_s

    # Looking up

    def run(self, model_id: str) -> Run:
        if model_id not in self.runs:
            raise Refused(404, "Model not found")
        return self.runs[model_id]

    def loaded(self, model_id: str) -> Live:
        if model_id not in self.live:
            raise Failed(f"Model {model_id} not loaded (likely stale request from previous server)", "user")
        return self.live[model_id]

    def checkpoint(self, model_id: str, kind: Kind, name: str) -> Checkpoint:
        found = self.checkpoints.get((model_id, kind, name))
        if found is not None and found.expires is not None and found.expires <= self.now():
            found = None
        if found is None:
            raise Refused(404, f"Checkpoint not found: {model_id}/{name}")
        return found

    def at(self, path: str, kind: Kind) -> Checkpoint:
        """The checkpoint of a `tinker://` path."""
        run, *rest = path.removeprefix("tinker://").split("/")
        if not path.startswith("tinker://") or rest[:-1] not in ([kind], [] if kind == "sampler_weights" else [kind]):
            raise Refused(400, f"Invalid tinker path format. Expected: tinker://model_id/{kind}/checkpoint_id")
        return self.checkpoint(run, kind, rest[-1])

    def check_base(self, name: str) -> None:
        if self.ways.knows_models and name != self.model.id:
            raise Refused(400, f"Base model {name!r} is not supported")

    # What futures do

    def create(self, run: Run) -> dict[str, Any]:
        if self.ways.models is not None and len(self.live) >= self.ways.models:
            raise Failed(f"Maximum number of LoRA adapters ({self.ways.models + 1}) reached", "server")
        self.live[run.model_id] = Live(Trainee(self.base.new_lora(run.lora)))
        return {"type": "create_model", "model_id": run.model_id}

    def unload(self, model_id: str) -> dict[str, Any]:
        self.live.pop(model_id, None)
        return {"type": "unload_model", "model_id": model_id}

    def load(self, model_id: str, source: Checkpoint, *, optimizer: bool) -> dict[str, Any]:
        live = self.loaded(model_id)
        if source.run.lora.rank != self.runs[model_id].lora.rank:
            raise Failed(f"Rank mismatch: checkpoint has rank {source.run.lora.rank}")
        trainee = Trainee({name: p.clone() for name, p in source.lora.items()})
        if optimizer or not self.ways.moments_optional:
            trainee.moments, trainee.steps = dict(source.moments), source.steps
        live.trainee, live.broken = trainee, False
        return {"type": "load_weights", "path": source.path, "model_id": model_id}

    def model_pass(self, model_id: str, given: Any, *, backward: bool) -> tuple[list[dict[str, Tensor]], float]:
        """`given`: the API's ForwardBackwardInput."""
        live = self.loaded(model_id)
        if given.loss_fn not in LOSSES:
            raise Failed(f"the double computes {' and '.join(LOSSES)}, not {given.loss_fn}")
        try:
            return model_pass(self.base, live.trainee, given.data, given.loss_fn, reduction=self.ways.reduction, backward=backward)
        except (BadData, KeyError) as error:
            raise Failed(str(error)) from error

    def optim_step(self, model_id: str, params: types.AdamParams) -> dict[str, Any]:
        live = self.loaded(model_id)
        if not live.trainee.data:
            self.violations.append(f"{model_id}: optim_step without gradients")
        norm = live.trainee.adam(params, clip=self.ways.clips, mean=self.ways.reduction == "mean")
        names = {} if self.ways.reduction == "sum" else {"skyrl.ai/grad_norm": norm, "skyrl.ai/learning_rate": params.learning_rate}
        return {"metrics": names or None}

    def save(self, model_id: str, kind: Kind, name: str, ttl_seconds: int | None) -> str:
        """The path. What is saved is a copy."""
        live = self.loaded(model_id)
        if live.broken:
            self.violations.append(f"{model_id}: {name!r} was saved after a request that failed")
        if live.trainee.data:
            self.violations.append(f"{model_id}: {name!r} was saved with gradients that no optim_step applied")
        trainee = live.trainee
        copied = {key: p.clone() for key, p in trainee.lora.items()}
        expires = self.now() + ttl_seconds if ttl_seconds is not None and self.ways.checkpoints_end else None
        made = Checkpoint(self.runs[model_id], kind, name, copied, dict(trainee.moments), trainee.steps, self.now(), expires)
        self.checkpoints[model_id, kind, name] = made
        return made.path if self.ways.kinds or kind == "weights" else f"tinker://{model_id}/{name}"

    def weights_of(self, sampler: str) -> Mapping[str, Tensor]:
        """What speaks for a sampling session: the base model (a name) or a checkpoint (a path)."""
        if not sampler.startswith("tinker://"):
            if sampler != self.model.id:
                raise Failed(f"Engine is configured for '{self.model.id}' but request specified '{sampler}'")
            return {}
        source = self.at(sampler, "sampler_weights")
        if self.ways.own_slot:
            return source.lora
        live = self.live.get(source.run.model_id)
        if live is None:
            raise Failed(f"Model {source.run.model_id} not loaded")
        if live.speaks != source.name:
            live.trainee.lora, live.speaks = {name: p.clone() for name, p in source.lora.items()}, source.name
        return live.trainee.lora

    def sample(self, sampler: str, request: types.SampleRequest) -> dict[str, Any]:
        lora, prompt, params = self.weights_of(sampler), request.prompt.to_ints(), request.sampling_params
        if not prompt or len(prompt) + (params.max_tokens or 1) > self.model.max_context:
            raise Failed(f"a prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} do not fit into {self.model.max_context}")
        seed = random.getrandbits(31) if params.seed is None else params.seed
        said = [sample(self.base, lora, prompt, params, self.model.tokenizer, seed + i) for i in range(request.num_samples)]
        answer: dict[str, Any] = {
            "sequences": [{"tokens": s.tokens, "logprobs": s.logprobs, "stop_reason": "stop" if s.stopped else "length"} for s in said],
        }
        if request.prompt_logprobs or request.topk_prompt_logprobs:
            with torch.no_grad():
                answer |= self._of_prompt(self.base.logprobs(lora, prompt), prompt, request)
        return answer

    def _of_prompt(self, logp_NV: Tensor, prompt: Sequence[int], request: types.SampleRequest) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if request.prompt_logprobs:
            own = logp_NV[:-1].gather(-1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0].tolist()
            found["prompt_logprobs"] = [None, *own] if self.ways.first_is_none else own
        if request.topk_prompt_logprobs and self.ways.topk:
            top = logp_NV[:-1].topk(request.topk_prompt_logprobs, dim=-1)
            rows = [list(zip(ids, logps, strict=True)) for ids, logps in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
            found["topk_prompt_logprobs"] = [None, *rows]
        return found

    # Checkpoints

    def delete(self, model_id: str, kind: Kind, name: str) -> None:
        self.checkpoint(model_id, kind, name)
        del self.checkpoints[model_id, kind, name]

    def archive(self, model_id: str, kind: Kind, name: str) -> bytes:
        """A tar with PEFT's two files."""
        source = self.checkpoint(model_id, kind, name)
        tensors: Tensors = {f"base_model.model.{key}.weight": p.contiguous() for key, p in source.lora.items()}
        targets = sorted({key.rpartition(".")[0].rpartition(".")[2] for key in source.lora})
        config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": source.run.lora.rank, "lora_alpha": ALPHA}
        config |= {"bias": "none", "base_model_name_or_path": source.run.base_model}
        config |= {"target_modules": targets if self.ways.kinds else None}
        files = {"adapter_model.safetensors": save(tensors), "adapter_config.json": json.dumps(config).encode()}
        if self.ways.kinds:
            files["checkpoint_complete"] = b""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:" if self.ways.kinds else "w:gz") as tar:
            for file, content in files.items():
                entry = tarfile.TarInfo(file)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return packed.getvalue()
