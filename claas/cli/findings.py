"""What `claas doctor` says of one part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """How one part is; `detail` says what to do unless it is ok."""

    part: str
    status: Status
    detail: str
