"""An app with one of everything that the double must run, for its own tests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import modal

MOUNT = os.environ.get("SAMPLE_MOUNT", "/sample-volume")
NAME = os.environ.get("SAMPLE_APP", "sample")

base = modal.Image.debian_slim(python_version="3.11").uv_pip_install("einops==0.8.1")
image = base.env({"SAMPLE_GREETING": "good day", "SAMPLE_MOUNT": MOUNT})
volume = modal.Volume.from_name("sample-files", create_if_missing=True, version=2)
secret = modal.Secret.from_dict({"SAMPLE_SECRET": "hush"})
app = modal.App(NAME, image=image, secrets=[secret], tags={"sample": "v1"})


class SampleError(Exception):
    """Of a type that both sides know."""


@app.cls(gpu="L40S", volumes={MOUNT: volume}, enable_memory_snapshot=True, scaledown_window=2, timeout=600, max_containers=2)
class Worker:
    @modal.enter(snap=True)
    def load(self) -> None:
        if os.environ.get("SAMPLE_BROKEN"):
            raise ValueError("the sample is broken")
        if os.environ.get("SAMPLE_CHILD"):
            subprocess.Popen(["sleep", "300"], start_new_session=True)
        self.steps = ["snapshot"]

    @modal.enter(snap=False)
    def move(self) -> None:
        self.steps.append("restored")

    @modal.method()
    def describe(self, name: str) -> dict[str, Any]:
        variables = {key: os.environ.get(key) for key in ("SAMPLE_GREETING", "SAMPLE_SECRET", "DOUBLE_ENV", "NOT_FOR_CONTAINERS")}
        return {"name": name, "steps": self.steps, "task": os.environ["MODAL_TASK_ID"], **variables}

    @modal.method()
    def fail(self, text: str) -> None:
        raise SampleError(text)

    @modal.method()
    def echo(self, payload: bytes) -> bytes:
        return payload

    @modal.method()
    def sleep(self, seconds: float, begun: str) -> str:
        modal.Dict.from_name("sample-dict", create_if_missing=True)[begun] = os.environ["MODAL_TASK_ID"]
        time.sleep(seconds)
        return "slept"

    @modal.method()
    def write(self, path: str, text: str, commit: bool = True) -> str:
        file = Path(MOUNT) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if commit:
            volume.commit()
        return os.environ["MODAL_TASK_ID"]

    @modal.method()
    def read(self, path: str, reload: bool) -> str | None:
        if reload:
            volume.reload()
        file = Path(MOUNT) / path
        return file.read_text() if file.exists() else None

    @modal.method()
    def reload_while_open(self, path: str) -> str:
        with (Path(MOUNT) / path).open():
            try:
                volume.reload()
            except RuntimeError as exc:
                return str(exc)
        return "reloaded"

    @modal.method()
    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@app.cls(volumes={MOUNT: volume.with_mount_options(read_only=True)}, max_containers=1)
@modal.concurrent(max_inputs=8)
class Web:
    @modal.enter()
    def begin(self) -> None:
        self.started = time.monotonic()

    @modal.asgi_app()
    def web(self) -> Callable[..., Awaitable[None]]:
        return _asgi


@app.cls(startup_timeout=1)
class Stuck:
    """Is never ready."""

    @modal.enter()
    def begin(self) -> None:
        time.sleep(60)

    @modal.method()
    def answer(self) -> int:
        return 42


@app.function(timeout=1)
def late() -> None:
    time.sleep(60)


@app.function()
def plain(a: int, b: int = 2) -> int:
    return a + b


async def _asgi(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """`/slow` sends a chunk, waits for a file in the Volume that never comes unless the client goes, `/` echoes."""
    if scope["type"] != "http":
        return
    body = (await receive())["body"]
    headers = [(b"content-type", b"text/plain"), (b"x-path", scope["path"].encode()), *[h for h in scope["headers"] if h[0] == b"x-echo"]]
    await send({"type": "http.response.start", "status": 200 if scope["path"] != "/teapot" else 418, "headers": headers})
    async for chunk in _chunks(scope, body):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chunks(scope: dict[str, Any], body: bytes) -> AsyncIterator[bytes]:
    yield scope["method"].encode() + b" " + scope["path"].encode() + b"?" + scope["query_string"] + b"\n"
    yield body
    if scope["path"] == "/write":
        try:
            (Path(MOUNT) / "forbidden").write_text("x")
        except OSError as exc:
            yield str(exc.strerror).encode()
    if scope["path"] == "/slow":
        for number in range(3):
            await asyncio.sleep(0.4)
            yield f"{number}\n".encode()
