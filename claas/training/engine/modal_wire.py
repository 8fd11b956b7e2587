"""What the service and its app on Modal tell each other."""

from __future__ import annotations

from claas import __version__
from claas.core.settings import Settings


def tags_of(settings: Settings) -> dict[str, str]:
    """What the app is tagged with when it is deployed."""
    return {"claas": __version__, "serving": settings.modal_serving}
