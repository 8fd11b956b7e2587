"""The double of Modal's control plane as tests use it: a server in a thread of its own, against which the SDK runs as it is."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpclib.server
from modal import Client
from modal_proto import api_pb2 as pb

from tests.modal_server.apps import Apps
from tests.modal_server.blobs import Blobs
from tests.modal_server.calls import Calls
from tests.modal_server.containers import Container, Containers
from tests.modal_server.dicts import Dicts
from tests.modal_server.faults import Faults
from tests.modal_server.functions import Functions
from tests.modal_server.images import Images, Mounts, Secrets
from tests.modal_server.launch import Launcher
from tests.modal_server.rpc import ControlPlane, Ids
from tests.modal_server.session import Session
from tests.modal_server.volumes import Volumes
from tests.modal_server.web import Fronts

T = TypeVar("T")
TOKEN = ("ak-double", "as-double")
TREE = Path(__file__).parents[2]


class ModalDouble:
    """Modal in a folder. `env` is what all its containers have besides what their app gives them, `scaledown_s` ends idle
    containers sooner than the app says, `web_wait_s` is how long a web request waits before it is redirected, and
    `volume_version` is that of Volumes whose maker names none."""

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str] | None = None,
        scaledown_s: float | None = None,
        web_wait_s: float = 150.0,
        volume_version: int = 2,
    ) -> None:
        self.url = ""
        self.faults = Faults(TOKEN)
        ids = Ids()
        self._blobs = Blobs(ids)
        self.fronts = Fronts(web_wait_s)
        self.images, self.secrets, self.dicts = Images(ids), Secrets(ids), Dicts(ids)
        self.mounts = Mounts(ids, self._blobs)
        self.volumes = Volumes(ids, self._blobs, self.mounts, folder / "volumes", volume_version)
        self.functions = Functions(ids, self.fronts.open)
        self.apps = Apps(ids, self.functions, self.volumes, self.mounts)
        self.function_calls = Calls(ids, self.functions, self.faults)
        self._launcher = Launcher(folder / "tasks", self.images, self.mounts, self.secrets, self.volumes, dict(env or {}), scaledown_s)
        self.containers = Containers(ids, self.functions, self.function_calls, self.apps, self.faults, self._launcher)
        self.volumes.watch_open_files(self.containers.open_files)
        self.fronts.serve(self.function_calls)
        self._plane = self._control_plane()
        self._clients: list[Client] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modal-double")
        self._grpc: grpclib.server.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def calls(self) -> Counter[str]:
        """How often each method was called."""
        return self._plane.calls

    @property
    def unimplemented(self) -> list[str]:
        """The methods that were called though the double does not answer them."""
        return self._plane.unimplemented

    def environment(self, token_secret: str = TOKEN[1]) -> dict[str, str]:
        """The variables by which the SDK of another process finds this server."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": TOKEN[0],
            "MODAL_TOKEN_SECRET": token_secret,
            "MODAL_CONFIG_PATH": "/nonexistent",
        }

    def client(self, token_secret: str = TOKEN[1]) -> Client:
        """A client of this server for `client=`, closed with the server."""
        client = Client(self.url, pb.CLIENT_TYPE_CLIENT, (TOKEN[0], token_secret))
        self._run(self._open(client))
        return client

    def modal(self, *arguments: str, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """What `modal ...` prints, run against this server from the root of the tree under test."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        variables = {**own, "PYTHONPATH": str(TREE), "COLUMNS": "200", **self.environment(), **(env or {})}
        command = [sys.executable, "-m", "modal", *arguments]
        ran = subprocess.run(command, cwd=TREE, env=variables, capture_output=True, text=True, timeout=120, check=False)
        printed = ran.stdout + ran.stderr
        assert ran.returncode == 0 or not check, printed
        return printed

    def live_containers(self, app: str = "") -> list[Container]:
        """Of one app, or of all."""
        found = self.apps.deployed(app) if app else None
        return self.containers.live(app_id=found.id if found else "")

    def kill_containers(self, app: str = "") -> int:
        """SIGKILL for all the containers of an app, in the middle of whatever they do; says how many there were."""
        containers = self.live_containers(app)
        self._run(self._kill(containers))
        return len(containers)

    def preempt_containers(self, app: str = "") -> int:
        """As `kill_containers`, but what they did begins anew in other containers, as when Modal needs the machine."""
        for container in self.live_containers(app):
            container.preempted = True
        return self.kill_containers(app)

    def logs(self) -> str:
        """What the containers printed, one after another."""
        return "\n".join(f"--- {task_id}\n{self._launcher.log(task_id)}" for task_id in self.containers.all)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, client: Client) -> None:
        self._clients.append(await client.__aenter__())

    async def _kill(self, containers: list[Container]) -> None:
        for container in containers:
            container.kill()
        await asyncio.gather(*(container.ended.wait() for container in containers))

    def _control_plane(self) -> ControlPlane:
        plane = ControlPlane(self.faults)
        parts = (self._blobs, self.images, self.mounts, self.secrets, self.volumes, self.dicts, self.functions, self.apps)
        for part in (Session(), *parts, self.function_calls, self.containers):
            plane.answer(part.rpcs())
        for streaming in (self.images, self.volumes, self.dicts, self.apps, self.function_calls):
            plane.stream(streaming.streams())
        return plane

    async def _start(self) -> None:
        self._blobs.url = await self.fronts.listen(self._blobs.app())
        self._grpc = grpclib.server.Server([self._plane])
        listening = socket.create_server(("127.0.0.1", 0))
        await self._grpc.start(sock=listening)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._launcher.url = self.url
        self.containers.run_forever()

    async def _stop(self) -> None:
        assert self._grpc is not None
        for client in self._clients:
            await client.close.aio()
        await self.containers.stop_all()
        await self.fronts.close()
        self._grpc.close()
        await self._grpc.wait_closed()
        self._launcher.clean()
