"""A Tinker checkpoint's archive → a zip that PEFT and vLLM load. What the server left out of the config is read off the weights."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from typing import Any

from pydantic import JsonValue

from claas.adapters.export import peft_zip
from claas.adapters.store import CONFIG, WEIGHTS
from claas.core.errors import BackendUnavailable
from claas.core.types import AdapterVersion

MAX_FILE_BYTES = 2**34


def as_peft_zip(archive: bytes, version: AdapterVersion) -> bytes:
    """The adapter in the tar archive, as a zip in PEFT's layout. Raises BackendUnavailable if there is none in it."""
    try:
        files = _files(archive)
        config: dict[str, JsonValue] = json.loads(files[CONFIG])
        modules = _modules(files[WEIGHTS])
    except (tarfile.TarError, OSError, KeyError, ValueError, struct.error) as error:
        raise BackendUnavailable("the Tinker server's archive of this version holds no adapter in PEFT's layout") from error
    known: dict[str, JsonValue] = {"task_type": "CAUSAL_LM", "target_modules": modules}
    return peft_zip(config | {name: value for name, value in known.items() if not config.get(name)}, files[WEIGHTS], version)


def _files(archive: bytes) -> dict[str, bytes]:
    """The files by their last name; names are never used to write."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isfile() and entry.size <= MAX_FILE_BYTES else None
            if content is not None:
                found[entry.name.rpartition("/")[2]] = content.read()
    return found


def _modules(weights: bytes) -> list[JsonValue]:
    """The last names of the layers that these safetensors adapt: without them PEFT would adapt its own choice, in silence."""
    (length,) = struct.unpack("<Q", weights[:8])
    header: dict[str, Any] = json.loads(weights[8 : 8 + length])
    names = {key.partition(".lora_")[0].rpartition(".")[2] for key in header if ".lora_" in key}
    if not names:
        raise ValueError("no LoRA weights")
    return [*sorted(names)]
