"""The engine behind the double of vLLM: a scheduler with its pause and sleep states, adapters' slots, a prefix cache, device memory.

The rules are those of vLLM 0.32 (`v1/engine/core.py`, `v1/executor/abstract.py`, `openai/models/serving.py`). It knows nothing of HTTP.
What a careful client never does is written into `violations`; what would crash a GPU worker crashes this one too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tests.doubles.vllm_script import BASE_VOICE, Limits, Script, Step, logprob_of, plan, ranked, speak

Mode = Literal["abort", "wait", "keep"]
TAGS = frozenset({"weights", "kv_cache"})
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = 16
GIB = 2**30


class Refused(Exception):
    """An answer in vLLM's shape. `breaks` closes the connection behind it, as an error that no route of vLLM expects does."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None, *, breaks: bool = False) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.param, self.breaks = status, kind, message, param, breaks


def failed_call(method: str, why: str, *, worker: bool = False) -> Refused:
    """The engine's process said no."""
    text = f"Worker failed with error '{why}', please check the stack trace above for the root cause" if worker else why
    return Refused(500, "InternalServerError", f"Call to {method} method failed: {text}", breaks=method != "add_lora")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter. Its `voice` is a digest of its weights as they were when they were read."""

    name: str
    path: str
    voice: str


@dataclass(slots=True)
class Memory:
    """Bytes of a device that nobody else uses. `stuck` bytes stay taken whatever is freed."""

    total: int = 24 * GIB
    weights: int = 16 * GIB
    kv_cache: int = 6 * GIB
    stuck: int = 0


@dataclass(eq=False, slots=True)
class Run:
    """One reply: waiting, then running. `out` gets a step for each token, or what broke it."""

    prompt: tuple[int, ...]
    raw: str
    limits: Limits
    adapter: Adapter | None
    scored: bool = False
    voice: str = BASE_VOICE
    left: deque[Step] = field(default_factory=deque)
    tokens: list[int] = field(default_factory=list)
    out: asyncio.Queue[Step | Refused] = field(default_factory=asyncio.Queue)


class VllmEngine:
    """`device` "cpu" is as vLLM's CPU build: states move, memory does not, and the KV cache cannot be dropped alone."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: Literal["cuda", "cpu"] = "cuda",
        model: str = "tiny",
        max_model_len: int = 512,
        max_loras: int = 2,
        max_lora_rank: int = 32,
        target_modules: Sequence[str] | None = TARGETS,
        max_logprobs: int = 64,
        max_num_seqs: int = 64,
        script: Script = speak,
        step_s: float = 0.0,
        memory: Memory | None = None,
        violations: list[str] | None = None,
    ) -> None:
        self.tokenizer, self.device, self.model, self.script = tokenizer, device, model, script
        self.max_model_len, self.max_logprobs, self.step_s = max_model_len, max_logprobs, step_s
        self.memory = memory or Memory()
        self.violations = violations if violations is not None else []
        self.adapters: dict[str, Adapter] = {}
        self.paused: Literal["new", "all"] | None = None
        self.asleep: set[str] = set()
        self.torn = False
        """Workers have unmapped some of their weights, and the engine does not know."""
        self.gauge = "awake"
        self.dead = False
        self.on_death: Callable[[], None] = lambda: None
        self.waiting: deque[Run] = deque()
        self.running: list[Run] = []
        self.started = time.time()
        self.lora_config = {
            "max_lora_rank": max_lora_rank, "max_loras": max_loras, "max_cpu_loras": max_loras, "fully_sharded_loras": False,
            "lora_dtype": "torch.bfloat16", "target_modules": list(target_modules) if target_modules is not None else None,
        }  # fmt: skip
        self._max_loras, self._max_rank, self._max_num_seqs = max_loras, max_lora_rank, max_num_seqs
        self._slots: OrderedDict[str, None] = OrderedDict()
        self._prefixes: dict[tuple[str, str, tuple[int, ...]], str] = {}
        self._ever: dict[str, Adapter] = {}
        self._drained: list[asyncio.Future[None]] = []
        self._news = asyncio.Event()

    # Generation

    def add(self, run: Run) -> None:
        self.waiting.append(run)
        self._news.set()

    def drop(self, run: Run) -> None:
        """The client has left: its slot is free."""
        if run in self.waiting:
            self.waiting.remove(run)
        if run in self.running:
            self.running.remove(run)
        self._news.set()

    async def loop(self) -> None:
        """Schedule for ever."""
        while not self.dead:
            self._admit()
            moving = [] if self.paused == "all" else list(self.running)
            if moving and (self.asleep or self.torn) and self.device == "cuda":
                self.crash("a step ran while memory was asleep: the scheduler was resumed too early")
                return
            if (
                self.device == "cpu"
                and self.lora_config["target_modules"] is None
                and len(moving) > 1
                and any(run.scored for run in moving)
            ):
                self.crash("prompt_logprobs shared a step with other requests, and lm_head may carry an adapter")
                return
            for run in moving:
                self._step(run)
            if not self.running:
                for future in self._drained:
                    if not future.done():
                        future.set_result(None)
                self._drained.clear()
            if moving:
                await asyncio.sleep(self.step_s)
            else:
                self._news.clear()
                if not (self.waiting and self.paused is None):
                    await self._news.wait()

    def _admit(self) -> None:
        for run in list(self.waiting) if self.paused is None else ():
            names = {other.adapter.name for other in self.running if other.adapter} | ({run.adapter.name} if run.adapter else set())
            if len(self.running) >= self._max_num_seqs or len(names) > self._max_loras:
                continue
            self.waiting.remove(run)
            if run.adapter and not self._into_slot(run.adapter):
                return
            run.voice = self._prefilled(run)
            run.left.extend(plan(self.tokenizer, run.raw, run.limits))
            self.running.append(run)

    def _prefilled(self, run: Run) -> str:
        """Whose keys and values are read: the prefix cache is salted by name and path, so weights changed in place are not seen."""
        own = run.adapter.voice if run.adapter else BASE_VOICE
        if len(run.prompt) <= BLOCK:
            return own
        salt = (run.adapter.name, run.adapter.path) if run.adapter else ("", "")
        return self._prefixes.setdefault((*salt, run.prompt[:BLOCK]), own)

    def _step(self, run: Run) -> None:
        step = run.left.popleft()
        if step.token is not None:
            run.tokens.append(step.token)
        run.out.put_nowait(step)
        if step.finish:
            self.running.remove(run)

    def logprobs(self, run: Run, at: int, k: int) -> list[tuple[int, float]]:
        """Of the reply's token `at`: it first, then the likeliest others, `k` in all and at least one."""
        return ranked(run.voice, (*run.prompt, *run.tokens[:at]), run.tokens[at], k, len(self.tokenizer))

    def prompt_logprobs(self, prompt: Sequence[int], adapter: Adapter | None, k: int) -> list[dict[int, tuple[float, int]] | None]:
        """Each prompt token's (logprob, rank), with `k` others. vLLM computes them afresh: no prefix cache is read."""
        voice = adapter.voice if adapter else BASE_VOICE
        found: list[dict[int, tuple[float, int]] | None] = [None]
        for at in range(1, len(prompt)):
            size = len(self.tokenizer)
            own = logprob_of(voice, prompt[:at], prompt[at])
            found.append({prompt[at]: (own, 1)} | {(prompt[at] + r) % size: (own - r, r + 1) for r in range(1, k)})
        return found

    # Pause and sleep

    async def pause(self, mode: Mode) -> None:
        if mode == "abort":
            self._abort("pause")
        self.paused = "all" if mode == "keep" else "new"
        if mode == "wait":
            await self._drain()
        if mode != "keep":
            self._prefixes.clear()

    def resume(self) -> None:
        if self.asleep:
            self.violations.append(f"resumed while {sorted(self.asleep)} slept")
        self.paused = None
        self._news.set()

    async def sleep(self, level: int, mode: Mode) -> None:
        if mode == "abort":
            self._abort("sleep")
        self.paused = "all" if mode == "keep" else "new"
        if mode == "wait":
            await self._drain()
        if level >= 1:
            self._prefixes.clear()
            self.asleep |= TAGS
        self.gauge = {0: "none", 1: "weights_offloaded", 2: "discard_all"}[level]

    def release_kv_cache(self) -> None:
        if self.paused is None or (self.paused == "new" and self.running):
            raise failed_call("release_kv_cache_memory", "release_kv_cache_memory() requires a completed pause first")
        if self.asleep:
            raise failed_call("release_kv_cache_memory", "release_kv_cache_memory() requires all executor memory to be resident")
        self._prefixes.clear()
        self.asleep.add("kv_cache")
        if self.device == "cpu":
            raise failed_call("release_kv_cache_memory", "Selective discard is not supported on CPU.", worker=True)
        self.gauge = "none"

    def wake(self, tags: Sequence[str] | None) -> bool:
        """True if all memory is back; only then does scheduling resume."""
        wanted = None if tags is None else [tag for tag in tags if tag != "scheduling"]
        if self.asleep and (wanted is None or (wanted and set(wanted) <= self.asleep)):
            self.asleep -= set(wanted) if wanted else TAGS
        if self.asleep:
            return False
        self.paused, self.gauge = None, "awake"
        self._news.set()
        return True

    async def sleep_half(self) -> None:
        await self.pause("wait")
        self.torn = True

    def wake_workers(self) -> None:
        """Behind the engine's back: all memory is back, and the engine's idea of it stays as it was."""
        self.torn = False

    def reset_prefix_cache(self) -> bool:
        if self.running:
            return False
        self._prefixes.clear()
        return True

    @property
    def is_sleeping(self) -> bool:
        return self.paused is not None or bool(self.asleep)

    @property
    def free_bytes(self) -> int:
        """What a trainer on the same device could take."""
        if self.dead:
            return self.memory.total
        asleep = self.asleep if self.device == "cuda" else set()
        taken = (0 if "weights" in asleep else self.memory.weights) + (0 if "kv_cache" in asleep else self.memory.kv_cache)
        return self.memory.total - max(taken, self.memory.stuck)

    async def _drain(self) -> None:
        if self.running:
            future = asyncio.get_running_loop().create_future()
            self._drained.append(future)
            await future

    def _abort(self, why: str) -> None:
        cut = [*self.running, *self.waiting]
        if cut:
            self.violations.append(f"{why} aborted {len(self.running)} running and {len(self.waiting)} waiting replies")
        self.running.clear()
        self.waiting.clear()
        for run in cut:
            run.out.put_nowait(Step(None, finish="abort"))

    def crash(self, why: str) -> None:
        """The engine process is gone: every reply breaks, and vLLM's server ends itself."""
        self.violations.append(why)
        self.dead = True
        for run in (*self.running, *self.waiting):
            run.out.put_nowait(Refused(500, "InternalServerError", "EngineCore encountered an issue."))
        self.on_death()

    # Adapters

    def load(self, name: str, path: str, *, in_place: bool) -> None:
        if not name or not path:
            raise Refused(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name == self.model:
            raise Refused(400, "InvalidUserInput", f"The lora adapter '{name}' conflicts with a served base model.")
        if not in_place and name in self.adapters:
            how = "If you want to load the adapter in place, set 'load_inplace' to True."
            raise Refused(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded. {how}")
        if in_place:
            self.violations.append(f"{name!r} was loaded in place")
        if ("weights" in self.asleep or self.torn) and self.device == "cuda":
            self.crash(f"{name!r} was loaded while the weights slept")
            raise failed_call("add_lora", "CUDA error: an illegal memory access was encountered", worker=True)
        adapter = Adapter(name, path, self._read(name, Path(path)))
        if (before := self._ever.setdefault(name, adapter)) != adapter:
            other = "another path" if before.path != path else "other weights"
            self.violations.append(f"{name!r} was loaded twice, the second time with {other}")
        self.adapters[name] = adapter
        self._into_slot(adapter)

    def unload(self, name: str) -> None:
        if not name:
            raise Refused(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self.adapters:
            raise Refused(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]

    def _read(self, name: str, folder: Path) -> str:
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            weights = (folder / "adapter_model.safetensors").read_bytes()
            json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        except FileNotFoundError:
            raise Refused(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {folder}") from None
        except ValueError as error:
            raise failed_call("add_lora", str(error), worker=True) from None
        if config["r"] > self._max_rank:
            text = f"LoRA rank {config['r']} is greater than max_lora_rank {self._max_rank}."
            raise failed_call("add_lora", text, worker=True)
        if config.get("use_dora"):
            raise failed_call("add_lora", "vLLM does not yet support DoRA.", worker=True)
        return hashlib.sha256(weights).hexdigest()[:8]

    def _into_slot(self, adapter: Adapter) -> bool:
        """The least recently used goes out; what was put out is read again from its folder, which must still be there."""
        if adapter.name not in self._slots and not Path(adapter.path).is_dir():
            self.crash(f"the folder of {adapter.name!r} was deleted while requests could name it")
            return False
        self._slots[adapter.name] = None
        self._slots.move_to_end(adapter.name)
        if len(self._slots) > self._max_loras:
            self._slots.popitem(last=False)
        return True
