"""What the benchmarks of the hybrid engine stand on: a real vLLM, `claas serve` in front of it, and a client that stamps what it is sent.

vLLM is the CPU build of `make test-vllm` (CLAAS_TEST_VLLM_PYTHON names another Python), or one that runs already. The client only takes
the time while a reply comes; what was sent is read when it has ended, so that reading it does not delay another reply's stamps.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil

from benchmarks.paced import running_paced
from claas.core.settings import load_settings
from claas.models.default_model import default_model
from tests.integration.process import Service, running
from tests.vllm.process import RealVllm

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"


# --- What runs ---


@dataclass(frozen=True, slots=True)
class Stack:
    """A service and the vLLM behind it, which is `vllm_pid` if it runs on this machine, and only a stand-in if it is `paced`."""

    service: Service
    vllm_url: str
    vllm_pid: int | None
    paced: bool = False

    def cpu_seconds(self) -> dict[str, float]:
        """What each process of this machine has computed since it began; vLLM's with all that it started."""
        here = {"client": [psutil.Process()], "proxy": [psutil.Process(self.service.process.pid)]}
        if self.vllm_pid is not None:
            vllm = psutil.Process(self.vllm_pid)
            here["vllm"] = [vllm, *vllm.children(recursive=True)]
        return {name: float(sum(sum(process.cpu_times()[:2]) for process in processes)) for name, processes in here.items()}


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This process, and those that it starts meanwhile, compute on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running_real(python: Path, model_dir: Path, log: Path) -> Iterator[str]:
    """The URL of a vLLM, its CPU build."""
    vllm = RealVllm(python, model_dir, log)
    try:
        vllm.start()
        yield vllm.url
    finally:
        vllm.stop()


@contextmanager
def running_stack(
    vllm_url: str | None, base_model: Path | None, *, apart: bool = False, step_ms: float | None = None, **environment: str
) -> Iterator[Stack]:
    """Start both, or the service alone in front of the vLLM at `vllm_url`; what was started is ended on leaving.

    With `apart` the service has a core of its own, and a vLLM that is started and the client share the others. With `step_ms` a
    stand-in is started instead of it, which gives each stream a token in that time.
    """
    python = Path(os.environ.pop("CLAAS_TEST_VLLM_PYTHON", "") or ROOT / ".venv-vllm" / "bin" / "python")
    *most, last = sorted(os.sched_getaffinity(0))
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        if vllm_url is None:
            model_dir = base_model or default_model(load_settings().cache_dir)
            vllm = running_real(python, model_dir, folder / "vllm.log") if step_ms is None else running_paced(model_dir, step_ms)
            with on_cores(most) if apart and most else nullcontext():
                vllm_url = ending.enter_context(vllm)
        with on_cores([last]) if apart and most else nullcontext():
            service = ending.enter_context(running(folder / "data", base_model=base_model, VLLM_BASE_URL=vllm_url, **environment))
        ending.enter_context(on_cores(most) if apart and most else nullcontext())
        yield Stack(service, vllm_url, _listener(vllm_url), step_ms is not None)


def add_options(parser: ArgumentParser, out: str, max_tokens: int) -> None:
    """The options of every benchmark on this stack."""
    parser.add_argument("--vllm-url", help="a vLLM that runs already, on a GPU for example; without one the CPU build is started")
    parser.add_argument("--base-model", type=Path, help="folder of the model that it serves; default: the embedded one")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="longest reply")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{out}.json"))


def write(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out} and {out.with_suffix('.svg')}")


def machine() -> dict[str, Any]:
    return {"cpus": len(os.sched_getaffinity(0)), "system": platform.platform(), "python": platform.python_version()}


def _listener(url: str) -> int | None:
    """The process that listens on the URL's port, if the URL is of this machine."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    found = (c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == parts.port)
    return next(found, None)


# --- Who asks ---


@dataclass(slots=True)
class Sent:
    """An answer as it came: when which bytes. Times are `time.perf_counter` seconds. `failure` is why it did not come, or not whole."""

    prompt: str
    asked: float
    speaker: str = ""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A streamed reply, read. `stamps` are the times of the events that showed text, `ended` of the one that gave the reason for the end.

    `tokens` is what the server counted, `logprobs` each token's text and logprob if they were asked for. A reply with a `failure` was
    `cut` if some of it had come, else refused.
    """

    prompt: str
    asked: float
    ended: float
    speaker: str
    id: str
    text: str
    tokens: int
    stamps: tuple[float, ...]
    finish: str | None
    logprobs: tuple[tuple[str, float], ...]
    failure: str | None

    @property
    def cut(self) -> bool:
        return self.failure is not None and bool(self.stamps)

    @property
    def first_token_s(self) -> float:
        return self.stamps[0] - self.asked

    @property
    def per_token_s(self) -> float:
        return (self.ended - self.stamps[0]) / max(1, self.tokens - 1)


async def ask(client: httpx.AsyncClient, model: str, prompt: str, *, max_tokens: int, temperature: float, **more: Any) -> Sent:
    """One streamed chat, as a plain OpenAI client asks for it, or with `more` in its body."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | more
    sent = Sent(prompt, time.perf_counter())
    try:
        async with client.stream("POST", CHAT, json=body) as answer:
            sent.speaker = answer.headers.get("x-claas-adapter", "")
            async for piece in answer.aiter_raw():
                sent.pieces.append((time.perf_counter(), piece))
            if answer.status_code != 200:
                sent.failure = f"status {answer.status_code}: {b''.join(piece for _, piece in sent.pieces)[:200].decode(errors='replace')}"
    except httpx.HTTPError as error:
        sent.failure = f"{type(error).__name__}: {error}"
    return sent


def read(sent: Sent) -> Reply:
    """The reply that was sent. Whatever did not end as a reply should has a failure."""
    text, finish, reply_id, failure, tokens = "", None, "", sent.failure, 0
    ended = sent.pieces[-1][0] if sent.pieces else sent.asked
    stamps: list[float] = []
    logprobs: list[tuple[str, float]] = []
    for at, event in _events(sent.pieces):
        if "error" in event:
            failure = failure or str(event["error"])
            continue
        reply_id = event["id"]
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            if said := choice["delta"].get("content"):
                stamps.append(at)
                text += said
            logprobs += [(entry["token"], entry["logprob"]) for entry in (choice.get("logprobs") or {}).get("content") or ()]
            if choice["finish_reason"]:
                finish, ended = choice["finish_reason"], at
    done = b"".join(piece for _, piece in sent.pieces[-2:]).endswith(b"data: [DONE]\n\n")
    if failure is None and (finish not in ("stop", "length") or not done):
        failure = f"ended with {finish!r}"
    return Reply(sent.prompt, sent.asked, ended, sent.speaker, reply_id, text, tokens, tuple(stamps), finish, tuple(logprobs), failure)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON events, each with the time at which the last of it was there."""
    rest = b""
    for at, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data: ")
            if data.startswith(b"{"):
                yield at, json.loads(data)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """How values are spread: their number, median, 95th percentile and largest."""
    if not values:
        return {"n": 0, "median": None, "p95": None, "max": None}
    median, p95 = np.percentile(values, (50, 95))
    return {"n": len(values), "median": round(float(median), 4), "p95": round(float(p95), 4), "max": round(max(values), 4)}
