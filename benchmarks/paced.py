"""A stand-in for vLLM as a process: each stream gets a token every so many milliseconds, as from a GPU that nothing here has to wait for.

    python -m benchmarks.paced --step-ms 20

It is the tests' double of vLLM's protocol, and computes no model. Prints its URL, and runs until its standard input is closed. It keeps
how long each request waited in it for its first token: for the others' next step, anything from none of it to all. GET /waits tells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers import AutoTokenizer

from claas.core.settings import load_settings
from claas.models.default_model import default_model
from tests.doubles.vllm_engine import Run, VllmEngine
from tests.doubles.vllm_script import Asked, Said
from tests.doubles.vllm_server import VllmDouble

LONGEST = 128
CONTEXT = 8192


def say_much(_: Asked) -> Said:
    return Said("word " * LONGEST)


class PacedEngine(VllmEngine):
    """Takes the time from a request to its first token."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waits: list[tuple[Run, float]] = []
        self._added: dict[Run, float] = {}

    def add(self, run: Run) -> None:
        self._added[run] = time.perf_counter()
        super().add(run)

    def _step(self, run: Run) -> None:
        if (added := self._added.pop(run, None)) is not None:
            self.waits.append((run, time.perf_counter() - added))
        super()._step(run)


class PacedVllm(VllmDouble):
    """Tells those times, once: seconds, each beside its prompt as text."""

    engine: PacedEngine

    def app(self) -> Starlette:
        app = super().app()
        app.add_route("/waits", self._waits)
        return app

    async def _waits(self, http: Request) -> JSONResponse:
        told, self.engine.waits = self.engine.waits, []
        return JSONResponse([(self.engine.tokenizer.decode(run.prompt), waited) for run, waited in told])


def first_token_waits(url: str, prompts: Sequence[str]) -> list[float]:
    """How long a request with each of these prompts, which no other had, waited in the stand-in at `url` for its first token, seconds."""
    told: list[tuple[str, float]] = httpx.get(f"{url}/waits", timeout=30.0).raise_for_status().json()

    def waited(prompt: str) -> float:
        (found,) = (seconds for text, seconds in told if prompt in text)
        return found

    return [waited(prompt) for prompt in prompts]


@contextmanager
def running_paced(model_dir: Path, step_ms: float) -> Iterator[str]:
    """The URL of one in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.paced", "--step-ms", str(step_ms), "--base-model", str(model_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the stand-in did not start"
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, required=True)
    parser.add_argument("--base-model", type=Path, help="folder of the model whose tokenizer it has; default: the embedded one")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base_model or default_model(load_settings().cache_dir))
    sizes: dict[str, Any] = {"max_model_len": CONTEXT, "max_num_seqs": 256}
    with PacedVllm(tokenizer, engine_class=PacedEngine, script=say_much, step_s=args.step_ms / 1000, **sizes) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
