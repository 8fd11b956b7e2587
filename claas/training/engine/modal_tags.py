"""What a deployment tells of itself without a container: tags of the app, which `claas doctor` compares with the settings here."""

from __future__ import annotations

import re

from claas import __version__
from claas.core.settings import Settings
from claas.models.default_model import DEFAULT_MODEL_ID
from claas.training.engine.modal_wire import SCHEMA

MAX_CHARS = 63
_OTHERS = re.compile(r"[^A-Za-z0-9._-]")  # Modal's tags are made of no others


def tags_of(settings: Settings) -> dict[str, str]:
    """The versions, and the settings that a lesson depends on."""
    told = {
        "claas": __version__,
        "schema": str(SCHEMA),
        "model": settings.modal_base_model or DEFAULT_MODEL_ID,
        "gpu": settings.modal_gpu,
        "serving": settings.modal_serving,
    }
    return {name: _OTHERS.sub("_", value)[-MAX_CHARS:] for name, value in told.items()}
