"""The journal: what every step did, in the database, and one JSON file with its details. Written once, never changed.

Dashboard, metrics and CLI read it; nothing decides by it.
"""

from __future__ import annotations

import re
import threading
from datetime import UTC
from pathlib import Path

from pydantic import JsonValue
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from claas.core.errors import Conflict
from claas.core.types import AdapterVersion, StepRecord
from claas.storage.columns import to_json
from claas.storage.database import Database
from claas.storage.files import disk_errors, write_atomically
from claas.storage.models import AdapterVersionRow, StepRow

MAX_LOG_FILES = 10_000
_PRUNE_EVERY = 100


class Journal:
    """Step records, the adapter versions they made, and `log_dir/YYYY-MM-DD/<request_id>.json` for each lesson (the newest 10,000)."""

    def __init__(self, database: Database, log_dir: Path, *, max_log_files: int = MAX_LOG_FILES) -> None:
        self._database = database
        self._log_dir = log_dir
        self._max_log_files = max_log_files
        self._written = 0
        self._files = threading.Lock()

    async def record(
        self, step: StepRecord, detail: dict[str, JsonValue] | None = None, *, version_record: AdapterVersion | None = None
    ) -> str:
        """Store the step, with `detail` the log file, and, if the step was applied, its `version_record`: all of it or nothing.

        Returns the log file's path relative to the log folder, "" without `detail`.
        Raises Conflict for a step id that is taken, StorageFull.
        """
        log_path = "" if detail is None else self.log_path(step)

        def write(session: Session) -> None:
            session.add(StepRow(**step.model_dump(), log_path=log_path or None))
            if version_record is not None and step.outcome == "applied":
                session.merge(AdapterVersionRow(**version_record.model_dump()))
            session.flush()
            if detail is not None:  # before the commit: a step that is on record has its file
                self._write_log(self._log_dir / log_path, to_json(detail))

        try:
            await self._database.run(write)
        except IntegrityError as error:
            raise Conflict(f"a step {step.id!r} is already on record") from error
        return log_path

    def log_path(self, step: StepRecord) -> str:
        """Where the step's log file lies, relative to the log folder."""
        return f"{step.created_at.astimezone(UTC):%Y-%m-%d}/{_file_name(step.request_id)}.json"

    async def steps(self, lora_id: str | None = None, limit: int = 100) -> list[StepRecord]:
        """The newest steps, newest first; of one adapter if it is named."""
        query = select(StepRow).order_by(StepRow.number.desc()).limit(limit)
        if lora_id is not None:
            query = query.where(StepRow.lora_id == lora_id)
        return await self._database.run(lambda session: [_step(row) for row in session.scalars(query)])

    async def by_request(self, request_id: str) -> StepRecord | None:
        """The newest step of a request."""
        query = select(StepRow).where(StepRow.request_id == request_id).order_by(StepRow.number.desc()).limit(1)
        row = await self._database.run(lambda session: session.scalar(query))
        return None if row is None else _step(row)

    async def delete_adapter(self, lora_id: str) -> int:
        """Remove an adapter's steps, versions and log files; returns how many steps."""

        def write(session: Session) -> int:
            paths = session.scalars(select(StepRow.log_path).where(StepRow.lora_id == lora_id)).all()
            session.execute(delete(StepRow).where(StepRow.lora_id == lora_id))
            session.execute(delete(AdapterVersionRow).where(AdapterVersionRow.lora_id == lora_id))
            with self._files:
                for path in filter(None, paths):
                    (self._log_dir / path).unlink(missing_ok=True)
            return len(paths)

        return await self._database.run(write)

    def _write_log(self, path: Path, text: str) -> None:
        with self._files, disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
            self._written += 1
            if self._written % min(_PRUNE_EVERY, self._max_log_files) == 0:
                self._prune_logs()

    def _prune_logs(self) -> None:
        oldest_first = sorted(self._log_dir.glob("*/*.json"), key=lambda path: (path.parent.name, path.stat().st_mtime_ns))
        for path in oldest_first[: -self._max_log_files]:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _file_name(request_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", request_id)[:100]


def _step(row: StepRow) -> StepRecord:
    return StepRecord.model_validate({name: row.__dict__[name] for name in StepRecord.model_fields})
