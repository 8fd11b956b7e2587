"""A throw-away PostgreSQL server for the tests: Debian's own, in a temporary folder, on a Unix socket only."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

_STASH = pytest.StashKey["PostgresServer"]()
_USER = "claas"


class PostgresServer:
    """Runs from its making until `stop`. A test run that is killed takes the server with it."""

    def __init__(self) -> None:
        binaries = _binaries()
        self._folder = Path(tempfile.mkdtemp(prefix="claas-pg-"))  # short: a socket's path holds at most 107 characters
        self._names = itertools.count()
        command = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            account = pwd.getpwnam("postgres")
            os.chown(self._folder, account.pw_uid, account.pw_gid)
            command = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        data = str(self._folder / "data")
        subprocess.run(
            [*command, binaries / "initdb", "-D", data, "-U", _USER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=self._folder,
        )
        settings = {"listen_addresses": "", "unix_socket_directories": self._folder, "fsync": "off", "shared_buffers": "16MB"}
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(command or ["setpriv"]),
                    "--pdeathsig=INT",
                    binaries / "postgres",
                    *("-D", data),
                    *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
                ],
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        self._psql = [str(binaries / "psql"), "-h", str(self._folder), "-U", _USER, "-d", "postgres", "-qc"]
        self._await_ready([str(binaries / "pg_isready"), "-q", "-h", str(self._folder)])

    def _await_ready(self, question: list[str]) -> None:
        deadline = time.monotonic() + 60
        while subprocess.run(question, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("PostgreSQL did not start:\n" + (self._folder / "log").read_text())
            time.sleep(0.05)

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test{next(self._names)}"
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{_USER}@/{name}?host={self._folder}"

    def execute(self, sql: str) -> None:
        """Run a statement as the server's owner."""
        subprocess.run([*self._psql, sql], check=True, capture_output=True)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)  # ends connections, then itself
        self._process.wait(timeout=60)
        shutil.rmtree(self._folder)


def postgres_server(config: pytest.Config) -> PostgresServer:
    """The server of this test run, started when first asked for."""
    if _STASH not in config.stash:
        server = PostgresServer()
        config.add_cleanup(server.stop)
        config.stash[_STASH] = server
    return config.stash[_STASH]


def _binaries() -> Path:
    """Where Debian keeps the server's programs, newest version first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]), reverse=True)
    if not found:
        missing = "these tests need a real PostgreSQL server: install Debian's package `postgresql` (apt-get install postgresql)"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)  # a laptop with Python, pip and make only still has the tests on SQLite
    return found[0].parent
