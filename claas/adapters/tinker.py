"""Adapters whose versions are checkpoints on a Tinker server: which they are, in the database. Knows no server.

A version is published by one transaction, and its number is never used again. A version that is being saved is on record before anything
of it is on the server, so that what a crash leaves there can be found.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from claas.core.adapter_id import parse_adapter_id
from claas.core.errors import BadRequest, ConfigurationError, Conflict, NotFound
from claas.core.types import AdapterVersion, Frozen
from claas.core.usage import TokenUse, metered
from claas.storage.database import Database
from claas.storage.models import TinkerAdapterRow, TinkerVersionRow


class TinkerAdapter(Frozen):
    """One adapter: the base model, as the server calls it, and which of its layers carry how much."""

    lora_id: str
    base_model: str
    rank: int = Field(ge=1)
    train_attn: bool = True
    train_mlp: bool = True


class TinkerVersion(Frozen):
    """One version's manifest and where it is on the server. Without a `state_path` it is the base model."""

    manifest: AdapterVersion
    state_path: str | None = None
    sampler_path: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.state_path, self.sampler_path) if path is not None)


class TinkerAdapters:
    """All adapters, the newest `keep_versions` of each: never the latest, nor the one it was trained from."""

    def __init__(self, database: Database, *, keep_versions: int) -> None:
        self._database = database
        self._keep_versions = keep_versions

    async def create(self, adapter: TinkerAdapter, state_path: str | None = None, sampler_path: str | None = None) -> None:
        """A new adapter with its version 0. Raises Conflict if the id is taken."""
        row = TinkerAdapterRow(**adapter.model_dump(), latest=0, next_version=1)
        manifest = AdapterVersion(lora_id=adapter.lora_id, version=0, base_model=adapter.base_model)
        first = _row(TinkerVersion(manifest=manifest, state_path=state_path, sampler_path=sampler_path))
        try:
            await self._database.run(lambda session: session.add_all([row, first]))
        except IntegrityError as error:
            raise Conflict(f"the adapter id {adapter.lora_id!r} is taken", param="lora_id") from error

    async def adapter(self, lora_id: str) -> TinkerAdapter:
        """Raises NotFound."""
        row = await self._database.run(lambda session: _adapter_row(session, lora_id))
        return TinkerAdapter.model_validate({name: row.__dict__[name] for name in TinkerAdapter.model_fields})

    async def adapters(self, prefix: str = "") -> list[str]:
        """All ids that begin with `prefix`, sorted."""
        ids = await self._database.run(lambda session: session.scalars(select(TinkerAdapterRow.lora_id)).all())
        return sorted(lora_id for lora_id in ids if lora_id.startswith(prefix))

    async def latest(self, lora_id: str) -> int:
        """Raises NotFound."""
        return await self._database.run(lambda session: _adapter_row(session, lora_id).latest)

    async def versions(self, lora_id: str) -> list[TinkerVersion]:
        """Oldest first. Raises NotFound."""

        def read(session: Session) -> list[TinkerVersion]:
            adapter = _adapter_row(session, lora_id)
            return [_version(row, adapter.base_model) for row in _published(session, lora_id)]

        return await self._database.run(read)

    async def version(self, lora_id: str, number: int | None = None) -> TinkerVersion:
        """One version, the latest unless another is named. Raises NotFound."""

        def read(session: Session) -> TinkerVersion:
            adapter = _adapter_row(session, lora_id)
            return _version(_version_row(session, lora_id, adapter.latest if number is None else number), adapter.base_model)

        return await self._database.run(read)

    async def reserve(self, lora_id: str, run_id: str) -> int:
        """The number of a version that `run_id` is about to save. Raises NotFound."""

        def take(session: Session) -> int:
            adapter = _adapter_row(session, lora_id)
            manifest = AdapterVersion(lora_id=lora_id, version=adapter.next_version, base_model=adapter.base_model)
            row = _row(TinkerVersion(manifest=manifest))
            row.run_id, row.published = run_id, False
            session.add(row)
            adapter.next_version += 1
            return manifest.version

        return await self._database.run(take)

    async def publish(self, version: TinkerVersion) -> None:
        """Make a reserved version appear, whole. Raises NotFound if the adapter was deleted meanwhile."""
        new = _row(version)

        def write(session: Session) -> None:
            if session.get(TinkerVersionRow, (new.lora_id, new.version)) is None:
                raise NotFound(f"the adapter {new.lora_id!r} was deleted meanwhile", param="lora_id")
            session.merge(new)

        await self._database.run(write)

    async def unreserve(self, lora_id: str, number: int) -> None:
        """Forget a version that was not published."""
        rows = TinkerVersionRow
        query = delete(rows).where(rows.lora_id == lora_id, rows.version == number, rows.published.is_(False))
        await self._database.run(lambda session: session.execute(query))

    async def set_latest(self, lora_id: str, number: int) -> list[TinkerVersion]:
        """Let a version serve; returns those that are superseded by it, and forgotten. Raises NotFound."""

        def write(session: Session) -> list[TinkerVersion]:
            adapter = _adapter_row(session, lora_id)
            latest = _version_row(session, lora_id, number)
            adapter.latest = number
            rows = _published(session, lora_id)
            droppable = [row for row in rows if row.version not in (number, latest.parent)]
            dropped = droppable[: max(0, len(rows) - self._keep_versions)]
            for row in dropped:
                session.delete(row)
            return [_version(row, adapter.base_model) for row in dropped]

        return await self._database.run(write)

    async def set_sampler(self, lora_id: str, number: int, sampler_path: str) -> None:
        """Where the version speaks through from now on."""
        rows = TinkerVersionRow
        query = update(rows).where(rows.lora_id == lora_id, rows.version == number).values(sampler_path=sampler_path)
        await self._database.run(lambda session: session.execute(query))

    async def discard(self, lora_id: str, number: int) -> TinkerVersion:
        """Forget one version that is not the latest; returns it. Raises NotFound, Conflict."""

        def write(session: Session) -> TinkerVersion:
            adapter, row = _adapter_row(session, lora_id), _version_row(session, lora_id, number)
            if adapter.latest == number:
                raise Conflict(f"version {number} of {lora_id!r} is the one that serves: roll back to another first", param="version")
            session.delete(row)
            return _version(row, adapter.base_model)

        return await self._database.run(write)

    async def delete(self, lora_id: str) -> list[TinkerVersion] | None:
        """Forget an adapter; returns all its versions, None if there was none."""

        def write(session: Session) -> list[TinkerVersion] | None:
            adapter = session.get(TinkerAdapterRow, lora_id)
            if adapter is None:
                return None
            versions = [_version(row, adapter.base_model) for row in _published(session, lora_id)]
            session.execute(delete(TinkerVersionRow).where(TinkerVersionRow.lora_id == lora_id))
            session.delete(adapter)
            return versions

        return await self._database.run(write)

    @asynccontextmanager
    async def charged(self, lora_id: str | None) -> AsyncIterator[None]:
        """Tokens that the block uses are added to what the adapter, if one is named, has used, whether it ends well or not."""
        with metered() as usage:
            try:
                yield
            finally:
                if lora_id is not None and usage.tokens:
                    added = {column: column + usage.tokens.get(use, 0) for use, column in _USED.items()}
                    query = update(TinkerAdapterRow).where(TinkerAdapterRow.lora_id == lora_id).values(added)
                    await self._database.run(lambda session: session.execute(query))

    async def used(self, lora_id: str) -> dict[TokenUse, int]:
        """Tokens that the adapter's chats and lessons have used so far. Raises NotFound."""
        row = await self._database.run(lambda session: _adapter_row(session, lora_id))
        return {use: row.__dict__[column.key] for use, column in _USED.items()}

    async def unfinished(self) -> list[tuple[str, str, int]]:
        """(run id, adapter, number) of every version that was being saved when the service stopped; forgets them."""

        def take(session: Session) -> list[tuple[str, str, int]]:
            rows = session.scalars(select(TinkerVersionRow).where(TinkerVersionRow.published.is_(False))).all()
            for row in rows:
                session.delete(row)
            return [(row.run_id or "", row.lora_id, row.version) for row in rows]

        return await self._database.run(take)


# --- The upstream's file ---


class _Entry(Frozen):
    """What upstream's `tinker_state.json` holds of an adapter."""

    tinker_path: str = Field(pattern=r"^tinker://")
    base_model: str
    rank: int
    step: int = 0
    sampler_weights_path: str | None = None
    old_paths: list[str] | None = None


def read_state_file(path: Path) -> dict[str, _Entry]:
    """The adapters of an upstream `tinker_state.json`. Raises ConfigurationError."""
    try:
        raw: JsonValue = json.loads(path.read_bytes())
        entries: dict[str, Any] = raw if isinstance(raw, dict) else {"": raw}
        return {parse_adapter_id(lora_id): _Entry.model_validate(entry) for lora_id, entry in entries.items()}
    except (OSError, ValueError, ValidationError, BadRequest) as error:
        raise ConfigurationError(
            f"tinker_state_path: {path.name!r} cannot be read as an upstream tinker_state.json ({type(error).__name__})"
        ) from error


async def import_state_file(adapters: TinkerAdapters, path: Path, base_model: str) -> list[str]:
    """Make an adapter of each that is not here yet, its version 0 what the file has; returns a line for each. Raises ConfigurationError."""
    known = set(await adapters.adapters())
    lines = []
    for lora_id, entry in read_state_file(path).items():
        if lora_id in known:
            continue
        if entry.base_model != base_model:
            lines.append(f"adapter {lora_id!r} is of {entry.base_model!r}, not of {base_model!r}: left out")
            continue
        adapter = TinkerAdapter(lora_id=lora_id, base_model=base_model, rank=entry.rank)
        await adapters.create(adapter, entry.tinker_path, entry.sampler_weights_path)
        lines.append(f"adapter {lora_id!r} imported, after {entry.step} steps")
    return lines


# --- Rows ---

_USED: dict[TokenUse, InstrumentedAttribute[int]] = {
    "sampled": TinkerAdapterRow.sampled_tokens,
    "scored": TinkerAdapterRow.scored_tokens,
    "trained": TinkerAdapterRow.trained_tokens,
}


def _adapter_row(session: Session, lora_id: str) -> TinkerAdapterRow:
    row = session.get(TinkerAdapterRow, lora_id)
    if row is None:
        raise NotFound(f"there is no adapter {lora_id!r}", param="lora_id")
    return row


def _version_row(session: Session, lora_id: str, number: int) -> TinkerVersionRow:
    row = session.get(TinkerVersionRow, (lora_id, number))
    if row is None or not row.published:
        raise NotFound(f"the adapter {lora_id!r} has no version {number}", param="version")
    return row


def _published(session: Session, lora_id: str) -> list[TinkerVersionRow]:
    rows = TinkerVersionRow
    query = select(rows).where(rows.lora_id == lora_id, rows.published.is_(True)).order_by(rows.version)
    return list(session.scalars(query))


def _row(version: TinkerVersion) -> TinkerVersionRow:
    manifest = version.manifest
    return TinkerVersionRow(
        lora_id=manifest.lora_id,
        version=manifest.version,
        parent=manifest.parent,
        feedback_ids=list(manifest.feedback_ids),
        metrics=manifest.metrics,
        run_id=None,
        published=True,
        state_path=version.state_path,
        sampler_path=version.sampler_path,
        created_at=manifest.created_at,
    )


def _version(row: TinkerVersionRow, base_model: str) -> TinkerVersion:
    manifest = AdapterVersion(
        lora_id=row.lora_id,
        version=row.version,
        parent=row.parent,
        base_model=base_model,
        created_at=row.created_at,
        feedback_ids=tuple(row.feedback_ids),
        metrics=row.metrics,
    )
    return TinkerVersion(manifest=manifest, state_path=row.state_path, sampler_path=row.sampler_path)
