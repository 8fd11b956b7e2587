"""Reads docker/ as Compose does: its own `config`, whichever version is here, in one shape."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "compose.yaml"
EXAMPLE = ROOT / "docker" / ".env.example"
KEYS = '["a-key-for-tests"]'


def compose_command() -> list[str] | None:
    """`docker compose` or `docker-compose`; neither needs an engine to check a file."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60, check=False).returncode == 0:
        return [docker, "compose"]
    standalone = shutil.which("docker-compose")
    return [standalone] if standalone else None


def example() -> dict[str, str]:
    """What docker/.env.example sets."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def config(command: list[str], folder: Path, variables: dict[str, str], profile: str = "local") -> subprocess.CompletedProcess[str]:
    """`compose config` of the real file with these variables, as if they stood in docker/.env."""
    env_file = folder / "compose.env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    whole = [*command, "--env-file", str(env_file), "-f", str(FILE), "--profile", profile, "config"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(whole, capture_output=True, text=True, timeout=120, env=environment, check=False)


@dataclass(frozen=True, slots=True)
class Mount:
    source: str
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class Service:
    """One service of Compose's output. Its version 1 writes ports, mounts and commands as one string each, version 2 as parts."""

    raw: dict[str, Any]

    @property
    def ports(self) -> list[str]:
        """`address:port:container port`."""
        written = [
            port if isinstance(port, str) else f"{port['host_ip']}:{port['published']}:{port['target']}"
            for port in self.raw.get("ports", [])
        ]
        return [port.removesuffix("/tcp") for port in written]

    @property
    def mounts(self) -> dict[str, Mount]:
        """By their place in the container."""
        found = []
        for volume in self.raw["volumes"]:
            if isinstance(volume, str):
                source, target, mode = volume.split(":")
                found.append(Mount(source, target, mode == "ro"))
            else:
                found.append(Mount(volume["source"], volume["target"], volume.get("read_only", False)))
        return {mount.target: mount for mount in found}

    @property
    def command(self) -> list[str]:
        command = self.raw["command"]
        return shlex.split(command) if isinstance(command, str) else [str(word) for word in command]

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.raw.get("environment", {}).items()}

    @property
    def waits_for(self) -> dict[str, str]:
        return {name: how["condition"] for name, how in self.raw.get("depends_on", {}).items()}


@dataclass(frozen=True, slots=True)
class Project:
    services: dict[str, Service]
    networks: dict[str, Any]


def parse(output: str, profile: str = "local") -> Project:
    """The services of the profile: Compose's version 1 prints them all."""
    read = yaml.safe_load(output)
    return Project({name: Service(raw) for name, raw in read["services"].items() if profile in raw["profiles"]}, read["networks"])
