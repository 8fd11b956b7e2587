"""What a container starts with: its arguments, its files, its variables and its Volumes."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from modal_proto import api_pb2 as pb

from tests.modal_server import processes
from tests.modal_server.functions import Deployed
from tests.modal_server.images import Images, Mounts, Secrets
from tests.modal_server.volumes import Volumes

# What a container has of this machine's environment; the rest of it is the app's to bring.
KEPT = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass
class Launcher:
    """Starts containers in folders of their own; `env` is what the machines of this Modal have, `scaledown_s` overrules the apps'."""

    folder: Path
    images: Images
    mounts: Mounts
    secrets: Secrets
    volumes: Volumes
    env: dict[str, str]
    scaledown_s: float | None
    url: str = ""
    _mount_points: processes.MountPoints = field(default_factory=processes.MountPoints)

    def log(self, task_id: str) -> str:
        """What a container printed."""
        path = self.folder / task_id / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def restore(self, task_id: str) -> None:
        """The sign that the container waits for after its snapshot."""
        path = self._restore_path(task_id)
        half = path.with_suffix(".half")
        half.write_text(json.dumps({"task_id": task_id}))
        half.replace(path)

    def clean(self) -> None:
        """Mount points that were made for containers."""
        self._mount_points.remove()

    async def start(self, task_id: str, function: Deployed, layout: pb.AppLayout, environment: str) -> asyncio.subprocess.Process:
        folder = self.folder / task_id
        code = folder / "root"
        code.mkdir(parents=True)
        definition = pb.Function()
        definition.CopyFrom(function.definition)
        definition.resources.gpu_config.Clear()
        definition.is_checkpointing_function = definition.checkpointing_enabled
        for mount_id in definition.mount_ids:
            self.mounts.write(mount_id, code)
        for layer in self.images.layers(definition.image_id):
            self.mounts.write(layer.context_mount_id, code)
        arguments = pb.ContainerArguments(
            task_id=task_id,
            function_id=function.id,
            app_id=function.app_id,
            function_def=definition,
            checkpoint_id=f"ch-{task_id}" if definition.checkpointing_enabled else "",
            app_layout=layout,
            serialized_params=function.parameters,
            environment_name=environment,
        )
        (folder / "arguments").write_bytes(arguments.SerializeToString())
        variables = self._variables(task_id, definition, code)
        return await processes.start(self._binds(task_id, definition), variables, code, folder / "log")

    def _restore_path(self, task_id: str) -> Path:
        return self.folder / task_id / "restore.json"

    def _binds(self, task_id: str, definition: pb.Function) -> list[processes.Bind]:
        binds = []
        for mount in definition.volume_mounts:
            copy = self.volumes.mount(mount.volume_id, task_id, self.folder / task_id / mount.volume_id)
            source = copy / mount.sub_path.strip("/")
            source.mkdir(parents=True, exist_ok=True)
            self._mount_points.ensure(Path(mount.mount_path))
            binds.append(processes.Bind(source, mount.mount_path, mount.read_only))
        return binds

    def _variables(self, task_id: str, definition: pb.Function, code: Path) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        secrets = {name: value for secret_id in definition.secret_ids for name, value in self.secrets.environment(secret_id).items()}
        return {
            **kept,
            "HOME": str(code),
            **self.env,
            **self.images.environment(definition.image_id),
            **secrets,
            "PYTHONPATH": str(code),
            "PYTHONUNBUFFERED": "1",
            "MODAL_SERVER_URL": self.url,
            "MODAL_TASK_ID": task_id,
            "MODAL_IS_REMOTE": "1",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(self.folder / task_id / "arguments"),
            "MODAL_RESTORE_STATE_PATH": str(self._restore_path(task_id)),
            "MODAL_ENABLE_SNAP_RESTORE": "1",
            "MODAL_OVERRIDE_HEADERS": f"x-task-id:{task_id}",
            "MODAL_CONFIG_PATH": "/nonexistent",
        }
