"""What the containers on Modal are made of: pinned packages, CLaaS as it is here, and the settings that it has here.

The pins are those of `constraints.txt`, which is not in the package; a test holds them together.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import modal
from pydantic import AliasChoices, AliasPath

from claas.core.settings import Settings

PYTHON = "3.12"
VLLM = "vllm==0.32.0"
CORE = (
    "alembic==1.20.1",
    "fastapi==0.165.0",
    "filelock==4.2.11",
    "httptools==0.9.0",
    "httpx==0.28.1",
    "platformdirs==4.14.7",
    "pydantic-settings==2.16.3",
    "pydantic==2.14.3",
    "rich==15.0.0",
    "sqlalchemy==2.1.9",
    "typer==0.29.2",
    "uvicorn==0.54.0",
    "uvloop==0.23.0",
)
"""What CLaaS needs, whatever it does."""
TRAINING = (
    "accelerate==1.15.0",
    "aiohttp==3.14.5",
    "gguf==0.19.0",
    "numpy==2.4.6",
    "peft==0.21.2",
    "psycopg-binary==3.3.9",
    "psycopg==3.3.9",
    "safetensors==0.8.0",
    "torch==2.13.0",
    "transformers==5.23.0",
)
"""What a worker and the service need besides."""
GUARD = ("platformdirs==4.14.7", "pydantic-settings==2.16.3")
"""What the guard needs that is not vLLM's own."""
BAKED = frozenset(
    {
        "allowed_init_base_models",
        "attn_implementation",
        "base_model_id",
        "completion_cache_size",
        "default_adapter",
        "default_max_tokens",
        "dtype",
        "feedback_drain_timeout_s",
        "feedback_lock_timeout_s",
        "keep_versions",
        "max_batch",
        "max_body_bytes",
        "max_context",
        "max_queue",
        "rollout_max_age_days",
        "trust_remote_code",
        "vllm_gate_timeout_s",
        "vllm_max_adapters",
    }
)
"""Settings that mean the same in a container, beside those of Modal. No key, and no folder or address of this machine's, is among them."""


def worker_image(settings: Settings) -> modal.Image:
    """For who computes with the base model, and for the service."""
    return _with_claas(modal.Image.debian_slim(PYTHON).pip_install(*CORE, *TRAINING), settings)


def vllm_image(settings: Settings) -> modal.Image:
    """For vLLM and the guard in front of it."""
    return _with_claas(modal.Image.debian_slim(PYTHON).pip_install(VLLM, *GUARD), settings)


def container_environment(settings: Settings) -> dict[str, str]:
    """The variables that make `load_settings` in a container say what `settings` say: those that were set, and where models are kept."""
    said = settings.model_dump(mode="json", include=settings.model_fields_set)
    models = PurePosixPath(settings.modal_models_path)
    environment = {_variable(name): _text(value) for name, value in said.items() if _is_baked(name) and value is not None}
    return environment | {"CLAAS_CACHE_DIR": str(models / "claas"), "HF_HOME": str(models / "hub")}


def _is_baked(name: str) -> bool:
    return name in BAKED or name.startswith("modal_")


def _with_claas(image: modal.Image, settings: Settings) -> modal.Image:
    return image.env(container_environment(settings)).add_local_python_source("claas")


def _variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    assert not isinstance(alias, AliasChoices | AliasPath)
    return alias or f"CLAAS_{name.upper()}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
