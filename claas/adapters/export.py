"""Adapter versions as zip files that PEFT and vLLM load. No tensors: the weights' file goes out as it is."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from pydantic import JsonValue

from claas.adapters.store import CONFIG, WEIGHTS
from claas.core.types import AdapterVersion

_README = "README.md"


def export_zip(folder: Path, version: AdapterVersion) -> bytes:
    """A zip of the version's config and weights with a model card; no optimizer moments, and no path of this machine."""
    return peft_zip(json.loads((folder / CONFIG).read_bytes()), (folder / WEIGHTS).read_bytes(), version)


def peft_zip(config: Mapping[str, JsonValue], weights: bytes, version: AdapterVersion) -> bytes:
    """The same of a config and weights that are at hand."""
    base = _public_name(version.base_model)
    named = {**config, "base_model_name_or_path": base}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, method in (
            (_README, _model_card(version, base).encode(), zipfile.ZIP_DEFLATED),
            (CONFIG, json.dumps(named, indent=2, sort_keys=True).encode(), zipfile.ZIP_DEFLATED),
            (WEIGHTS, weights, zipfile.ZIP_STORED),  # random bits do not shrink
        ):
            entry = zipfile.ZipInfo(name, version.created_at.timetuple()[:6])
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, compress_type=method)
    return out.getvalue()


def _public_name(base_model: str) -> str:
    """A hub id as it is; of a local folder its last name only."""
    for path in (PurePosixPath(base_model), PureWindowsPath(base_model)):
        if path.is_absolute() or ".." in path.parts or base_model.startswith(("~", ".")):
            return path.name
    return base_model


def _model_card(version: AdapterVersion, base: str) -> str:
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, claas]
---
# {version.lora_id}, version {version.version}

A LoRA adapter for `{base}`, taught by feedback with CLaaS on {version.created_at:%Y-%m-%d}.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```
"""
