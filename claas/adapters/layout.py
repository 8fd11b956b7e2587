"""How adapters lie in a folder, be it on a disk or on a Volume: names, and what the small files say. Reads and writes nothing.

::

    <flat name>/adapter.json      its id, base model and the next version's number
                latest            the number of the version that serves
                v0/ v1/ …         published versions: they appear whole and are never touched again
                .staging-…        a version being written
    .trash-…, <flat name>/.trash-…   renamed out of sight, being deleted
"""

from __future__ import annotations

import re
import secrets
from datetime import datetime

from claas.core.types import Frozen
from claas.storage.files import TEMPORARY

ADAPTER = "adapter.json"
LATEST = "latest"
NEW, STAGING, TRASH = ".new-", ".staging-", ".trash-"
LEFTOVERS = (NEW, STAGING, TRASH, TEMPORARY)
_VERSION = re.compile(r"v(0|[1-9][0-9]*)")


class Adapter(Frozen):
    """What `adapter.json` holds. `created_at` tells an adapter from one of the same id that was deleted before."""

    lora_id: str
    base_model: str
    next_version: int = 0
    created_at: datetime | None = None


def version_folder(number: int) -> str:
    """The name of a published version's folder."""
    return f"v{number}"


def version_number(folder: str) -> int | None:
    """The number of the version that a folder of this name holds, if it is one."""
    match = _VERSION.fullmatch(folder)
    return int(match[1]) if match else None


def unique(prefix: str) -> str:
    """A name that nobody else takes."""
    return prefix + secrets.token_hex(8)
