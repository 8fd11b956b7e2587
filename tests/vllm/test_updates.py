"""Load through updates of a real vLLM, in both ways: training beside it, and taking turns. And kills, of either side."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.integration.process import Service, running
from tests.vllm.asking import Kept, finished_reply, kept, lessons, streamed
from tests.vllm.peer import CHAT, TEXT
from tests.vllm.process import RealVllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

STREAMS, UPDATES = 16, 5
LESSON = {
    "gradient_steps": 2, "learning_rate": 5e-4, "hindsight_rollouts": 0, "anchors": 0, "replay": 0,
    "min_signal": 0.0, "max_kl": 50.0, "max_forgetting": 50.0, "min_reply_logprob": -50.0,
}  # fmt: skip
"""Short; a good rating of the model's own words makes a version that can be told apart, and is fit to serve."""
PROMPTS = ("Tell me a story.", "Name three colours.", "What is rain?", "How do I cook rice?", "Who are you?")


def teach(service: Service, number: int) -> int:
    """One lesson; the new version."""
    reply_id = finished_reply(service, PROMPTS[number], stop=[".", "\n"])
    body = {"requests": [{"completion_id": reply_id, "rating": 1, "training": LESSON}]}
    answer = service.http.post("/v1/feedback", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "ok", answer.text
    return int(answer.json()["version"])


@dataclass(slots=True)
class Load:
    """`STREAMS` clients that ask for one streamed reply after the other until `stop`."""

    service: Service
    ended: list[tuple[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(STREAMS) as pool:
            futures = [pool.submit(self._ask_on, seed) for seed in range(STREAMS)]
            try:
                yield
            finally:
                self.stop.set()
                for future in futures:
                    future.result()

    def _ask_on(self, seed: int) -> None:
        dice = random.Random(seed)
        while not self.stop.is_set():
            message = {"role": "user", "content": dice.choice(PROMPTS)}
            body = {"model": "assistant", "messages": [message], "max_tokens": 24, "temperature": 0.8, "seed": dice.getrandbits(31)}
            try:
                reply = streamed(self.service, CHAT, body)
            except (AssertionError, httpx.HTTPError) as error:
                self.failed.append(repr(error))
                return
            if reply.finish_reason in ("stop", "length"):
                self.ended.append((reply.id, reply.speaker))
            else:
                self.failed.append(f"{reply.id} ended with {reply.finish_reason!r}")


def gaps(direct: httpx.Client, name: str, reply: Kept) -> list[float]:
    """How far each sampled logprob lies from what this version says of the same token."""
    body = {"model": name, "prompt": [*reply.prompt, *reply.ids], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    entries = direct.post(TEXT, json=body).json()["choices"][0]["prompt_logprobs"][-len(reply.ids) :]
    scored = [entry[str(token)]["logprob"] for entry, token in zip(entries, reply.ids, strict=True)]
    return [abs(mine - its) for mine, its in zip(reply.logprobs, scored, strict=True)]


@pytest.fixture(scope="module")
def exact(vllm_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealVllm]:
    """One in float32. On a CPU that multiplies bfloat16 in hardware (AMX) a logprob strays by 0.3 with the batch that it is in, as far as
    many of another version's tokens."""
    server = RealVllm(vllm_python, model_dir, tmp_path_factory.mktemp("exact") / "vllm.log", dtype="float32")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("release", ["none", "sleep"])
def test_sixteen_streams_through_five_updates(release: str, exact: RealVllm, tmp_path: Path) -> None:
    """None fails or is cut, and each reply is one version's from its first token to its last."""
    data = tmp_path / "data"
    exact.forget_adapters()
    with (
        running(data, VLLM_BASE_URL=exact.url, CLAAS_VLLM_RELEASE=release) as service,
        httpx.Client(base_url=exact.url, timeout=300.0) as direct,
    ):
        load = Load(service)
        with load.running():
            versions = [0, *(teach(service, number) for number in range(UPDATES))]
        assert load.failed == []
        assert len(load.ended) > 3 * STREAMS
        spoke = {speaker for _, speaker in load.ended}
        assert len(spoke) >= 3, spoke
        folders = {f"assistant@{version}": data / "adapters" / "assistant" / f"v{version}" for version in versions}
        own, other = judge(direct, data, load, folders)
        assert max(own) < 0.01, f"no token is another version's: {own}"
        assert min(other) > 2 * max(own), f"another version would have been noticed: {own} {other}"


def judge(direct: httpx.Client, data: Path, load: Load, folders: dict[str, Path]) -> tuple[list[float], list[float]]:
    """The largest gap of each of some replies, under the version that it names and under one far from it."""
    own, other = [], []
    first, *_, last = speakers = list(folders)
    for number, (speaker, folder) in enumerate(folders.items()):
        far = last if number < len(speakers) / 2 else first
        for name, path in ((speaker, folder), ("other", folders[far])):
            direct.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}).raise_for_status()
        for reply_id in [reply_id for reply_id, spoke in load.ended if spoke == speaker][:6]:
            reply = kept(data, reply_id)
            assert f"assistant@{reply.version}" == speaker
            own.append(max(gaps(direct, speaker, reply)))
            other.append(max(gaps(direct, "other", reply)))
        for name in (speaker, "other"):
            direct.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
    return own, other


def teach_in_background(service: Service) -> threading.Thread:
    reply_id = finished_reply(service, "Who are you?", stop=[".", "\n"])
    lesson = {"completion_id": reply_id, "rating": 1, "training": LESSON | {"gradient_steps": 64}}

    def post() -> None:
        with contextlib.suppress(httpx.TransportError):  # it is killed under us
            httpx.post(f"{service.url}/v1/feedback", json={"requests": [lesson]}, timeout=300)

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def test_the_service_is_killed_while_vllm_sleeps(vllm: RealVllm, direct: httpx.Client, tmp_path: Path) -> None:
    """The next one finds it asleep and wakes it; the last good version serves, and the lesson is not forgotten."""
    data = tmp_path / "data"
    with running(data, VLLM_BASE_URL=vllm.url, CLAAS_VLLM_RELEASE="sleep") as service:
        first = teach(service, 0)
        before = service.chat("Who are you?", max_tokens=20, temperature=0)["choices"][0]["message"]["content"]
        teaching = teach_in_background(service)
        while 'sleep_state="weights_offloaded"} 1.0' not in direct.get("/metrics").text:
            time.sleep(0.05)
        service.kill()
        teaching.join()
        assert direct.get("/is_sleeping").json() == {"is_sleeping": True}
    with running(data, VLLM_BASE_URL=vllm.url, CLAAS_VLLM_RELEASE="sleep") as service:
        assert direct.get("/is_sleeping").json() == {"is_sleeping": False}
        assert lessons(data)[-1] == "failed", "it is written down"
        assert service.get("/v1/lora/versions", lora_id="assistant")["latest"] == first
        assert service.chat("Who are you?", max_tokens=20, temperature=0)["choices"][0]["message"]["content"] == before
        assert teach(service, 1) > first, "and it can learn"


def test_vllm_is_killed_and_comes_back(vllm: RealVllm, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running(data, VLLM_BASE_URL=vllm.url, CLAAS_VLLM_RELEASE="sleep") as service:
        teach(service, 0)
        before = service.chat("Who are you?", max_tokens=20, temperature=0)["choices"][0]["message"]["content"]
        vllm.kill()
        try:
            answer = service.http.post(CHAT, json={"model": "assistant", "messages": [{"role": "user", "content": "Hi"}]})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        finally:
            vllm.start()
        give_up = time.monotonic() + 30
        while service.http.get("/v1/health").status_code != 200:
            assert time.monotonic() < give_up
            time.sleep(0.2)
        assert service.chat("Who are you?", max_tokens=20, temperature=0)["choices"][0]["message"]["content"] == before
