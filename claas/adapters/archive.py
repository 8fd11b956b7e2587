"""Adapter versions from zip files in PEFT's layout. What comes in is somebody else's, so nothing of it is trusted.

Imports torch, as `initialise` does.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers import PretrainedConfig

from claas.adapters.initialise import KEY_PREFIX, linear_shapes
from claas.adapters.store import CONFIG, WEIGHTS
from claas.core.errors import BadRequest

MAX_RANK = 256
_ENTRY = b"PK\x01\x02"  # what each entry of a zip's list of files begins with
_MAX_ENTRIES = 1000
_MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 2**24
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What PEFT's LoraConfig may also say and would change the computation: each must be absent or say nothing.
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# These take part of the base's weights into the adapter, which then fits a changed base only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")


class _LoraConfig(BaseModel):
    """The fields of `adapter_config.json` that matter here; the rest is looked at one by one."""

    model_config = ConfigDict(extra="ignore")

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=MAX_RANK)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    bias: Literal["none"] = "none"


def import_zip(archive: bytes, folder: Path, *, config: PretrainedConfig, base_model: str) -> None:
    """Write the archive's adapter to `folder`, in float32 and under PEFT's names, if it fits the base model of `config`.

    The files may lie at the top or in one folder. Anything that CLaaS would not compute as its author did is refused.

    Raises BadRequest, saying what to change.
    """
    shapes = linear_shapes(config)
    if archive.count(_ENTRY) > _MAX_ENTRIES:  # before they are parsed: each of millions would become an object
        raise _refused(f"holds more than {_MAX_ENTRIES} files: pack the two of the adapter alone")
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            entries = _entries(opened)
            lora = _check_config(_read(opened, entries[CONFIG], _MAX_CONFIG_BYTES))
            most = 4 * lora.r * sum(map(sum, shapes.values())) + _MAX_HEADER_BYTES
            weights = _read(opened, entries[WEIGHTS], most)
    except BadRequest:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as error:  # zipfile raises all of these
        raise _refused("is not a zip file that can be read: make it without a password, with the usual compression") from error
    tensors = _check_tensors(weights, shapes, lora.r)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(lora, tensors, shapes, base_model), indent=2, sort_keys=True), encoding="utf-8")


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The two files that count, found by name; names are never used to write."""
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for entry in archive.infolist():
        *parents, name = entry.filename.split("/")
        if name not in (CONFIG, WEIGHTS) or len(parents) > 1:
            continue
        if name in found or parents in ([""], [".."]):
            raise _refused(f"holds {name!r} more than once, or outside of it")
        found[name] = entry
        folders.add(tuple(parents))
    missing = [name for name in (CONFIG, WEIGHTS) if name not in found]
    if missing or len(folders) != 1:
        lacks = f"; it has no {missing[0]!r}" if missing else ""
        raise _refused(f"must hold {CONFIG!r} and {WEIGHTS!r}, both at the top or both in one folder{lacks}")
    return found


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """One file, never more than `most` bytes of it, whatever its entry claims. The rarer compressions may ask for gigabytes to begin."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refused(f"holds {entry.filename[:200]!r} in an unusual compression: use the usual one, deflate")
    with archive.open(entry) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _refused(f"holds a {entry.filename[:200]!r} larger than any that fits the base model")
    return content


def _check_config(content: bytes) -> _LoraConfig:
    try:
        raw: dict[str, JsonValue] = json.loads(content)
        lora = _LoraConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or CONFIG
        raise _refused(f"has a {field!r} in its {CONFIG} that is not supported: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _refused(f"has an {CONFIG} that is not JSON") from error
    unsupported = [name for name in _UNSUPPORTED if raw.get(name)]
    if str(raw.get("init_lora_weights", "")).lower().startswith(_CHANGES_BASE):
        unsupported.append("init_lora_weights")
    if unsupported:
        raise _refused(f"uses {', '.join(map(repr, unsupported))}: only plain LoRA adapters can be served and trained here")
    return lora


def _check_tensors(content: bytes, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, torch.Tensor]:
    """The weights under PEFT's names, in float32. Raises BadRequest for any tensor too many, too few, misshapen or not finite."""
    try:
        loaded = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _refused(f"has an {WEIGHTS} that is not in the safetensors format") from error
    tensors: dict[str, torch.Tensor] = {}
    halves: dict[str, set[str]] = {}
    for key, tensor in loaded.items():
        match = _KEY.fullmatch(key)
        if match is None or match["layer"] not in shapes:
            raise _refused(f"has weights {key[:200]!r}, for which the base model has no linear layer")
        layer, half = match["layer"], match["half"]
        out_features, in_features = shapes[layer]
        expected = (rank, in_features) if half == "A" else (out_features, rank)
        shape = tuple(tensor.shape)
        if shape != expected:
            raise _refused(f"has weights {key[:200]!r} of shape {shape}, where the base model and rank {rank} need {expected}")
        if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all():
            raise _refused(f"has weights {key[:200]!r} that are not finite numbers in float32, float16 or bfloat16")
        if half in halves.setdefault(layer, set()):
            raise _refused(f"has weights for {layer!r} twice, under different names")
        halves[layer].add(half)
        tensors[f"{KEY_PREFIX}{layer}.lora_{half}.weight"] = tensor.to(torch.float32).contiguous()
    alone = [layer for layer, both in halves.items() if len(both) != 2]
    if alone or not tensors:
        raise _refused(f"has only one of lora_A and lora_B for {alone[0]!r}" if alone else "has no weights")
    return tensors


def _config(lora: _LoraConfig, tensors: Iterable[str], shapes: Iterable[str], base_model: str) -> dict[str, Any]:
    """A fresh `adapter_config.json`. Targets are short names where these mean just the adapted layers, full names otherwise."""
    layers = {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for key in tensors}
    short = {layer.rpartition(".")[2] for layer in layers}
    meant = {layer for layer in shapes if layer.rpartition(".")[2] in short}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.r,
        "lora_alpha": int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(short if meant == layers else layers),
        "inference_mode": True,
    }


def _refused(what: str) -> BadRequest:
    return BadRequest(f"the archive {what}", param="archive")
