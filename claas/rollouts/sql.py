"""Rollouts in the database. Knows nothing of feedback or of training."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from claas.core.errors import Conflict, NotFound
from claas.core.types import Rollout, utc_now
from claas.rollouts.store import RolloutStore
from claas.storage.database import Database
from claas.storage.models import RolloutRow

_SLACK = 20  # pruned once for every twentieth of max_count that was put, not at each put


class SqlRolloutStore(RolloutStore):
    """Keeps at most `max_count` rollouts (between two prunings a twentieth more), none older than `max_age_days`."""

    def __init__(self, database: Database, *, max_count: int, max_age_days: float) -> None:
        self._database = database
        self._max_count = max_count
        self._max_age = timedelta(days=max_age_days)
        self._every = max(1, max_count // _SLACK)
        self._puts = 0

    async def put(self, rollout: Rollout) -> None:
        self._puts += 1
        prune = self._puts % self._every == 0

        def write(session: Session) -> None:
            session.add(_row(rollout))
            session.flush()
            if prune:
                self._prune(session)

        try:
            await self._database.run(write)
        except IntegrityError as error:
            raise Conflict(f"a reply with the id {rollout.id!r} is already stored", param="completion_id") from error

    async def get(self, completion_id: str) -> Rollout:
        row = await self._database.run(lambda session: session.scalar(select(RolloutRow).where(RolloutRow.id == completion_id)))
        if row is None:
            raise NotFound(
                f"no reply {completion_id[:200]!r} is stored: it may have been pruned, or was never given here", param="completion_id"
            )
        return _rollout(row)

    async def find(self, lora_id: str, prompt: str, response: str) -> Rollout:
        row = await self._database.run(lambda session: self._find(session, lora_id, prompt, response))
        return _rollout(row)

    def _find(self, session: Session, lora_id: str, prompt: str, response: str) -> RolloutRow:
        same = (
            RolloutRow.lookup == _lookup(lora_id, prompt, response),
            RolloutRow.lora_id == lora_id,
            RolloutRow.prompt == prompt,
            RolloutRow.text == response,
        )
        tokens = select(RolloutRow.prompt_token_ids, RolloutRow.response_token_ids).where(*same).distinct().limit(2)
        if len(session.execute(tokens).all()) > 1:
            raise Conflict(
                f"several replies of {lora_id!r} read like this but were not the same: name one by its completion_id", param="completion_id"
            )
        row = session.scalar(select(RolloutRow).where(*same).order_by(RolloutRow.created_at.desc(), RolloutRow.number.desc()).limit(1))
        if row is None:
            raise NotFound(
                f"adapter {lora_id!r} has no stored reply with exactly this prompt and response: it may have been pruned; "
                "send the last user turn and the visible reply unchanged, or a completion_id",
                param="response",
            )
        return row

    async def prune(self) -> int:
        return await self._database.run(self._prune)

    def _prune(self, session: Session) -> int:
        newest_first = select(RolloutRow.number).order_by(RolloutRow.created_at.desc(), RolloutRow.number.desc())
        too_old = _delete(session, RolloutRow.created_at < utc_now() - self._max_age)
        return too_old + _delete(session, RolloutRow.number.in_(newest_first.offset(self._max_count)))

    async def delete_adapter(self, lora_id: str) -> int:
        return await self._database.run(lambda session: _delete(session, RolloutRow.lora_id == lora_id))


def _delete(session: Session, condition: Any) -> int:
    return cast(CursorResult[Any], session.execute(delete(RolloutRow).where(condition))).rowcount


def _lookup(lora_id: str | None, prompt: str, text: str) -> str:
    return hashlib.sha256(json.dumps([lora_id, prompt, text]).encode()).hexdigest()


def _row(rollout: Rollout) -> RolloutRow:
    return RolloutRow(
        **rollout.model_dump(exclude={"messages", "sampling"}),
        messages=[message.model_dump(mode="json") for message in rollout.messages],
        sampling=rollout.sampling.model_dump(mode="json"),
        prompt=rollout.prompt,
        lookup=_lookup(rollout.lora_id, rollout.prompt, rollout.text),
    )


def _rollout(row: RolloutRow) -> Rollout:
    return Rollout.model_validate({name: row.__dict__[name] for name in Rollout.model_fields})
