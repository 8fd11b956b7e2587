"""The FeedbackStore: every feedback item, from the moment it is accepted. Knows nothing of replies or of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.sql import Select

from claas.core.errors import BadRequest, Conflict, NotFound
from claas.core.types import Feedback, FeedbackState
from claas.storage.database import Database
from claas.storage.models import FeedbackRow

MAX_KEY_CHARS = 200
FeedbackList = list[Feedback]  # named here: inside the class, `list` is a method


class FeedbackStore:
    """Feedback items by id, request, key and state, in the order they came."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, items: Sequence[Feedback]) -> None:
        """Store all items or none. An idempotency key is unique within its adapter.

        Raises:
            Conflict: an id or an idempotency key is taken.
            BadRequest: an idempotency key of more than 200 characters.
            StorageFull: nothing was stored.
        """
        if any(len(item.idempotency_key or "") > MAX_KEY_CHARS for item in items):
            raise BadRequest(f"an idempotency_key has at most {MAX_KEY_CHARS} characters", param="idempotency_key")
        try:
            await self._database.run(lambda session: session.add_all([_row(item) for item in items]))
        except IntegrityError as error:
            if "idempotency_key" in str(error.orig):
                raise Conflict("this idempotency_key was already used for this adapter", param="idempotency_key") from error
            raise Conflict("this feedback id is already stored", param="id") from error

    async def get(self, feedback_id: str) -> Feedback:
        """Raises NotFound."""
        found = await self._select(select(FeedbackRow).where(FeedbackRow.id == feedback_id))
        if not found:
            raise NotFound(f"there is no feedback {feedback_id[:200]!r}", param="id")
        return found[0]

    async def by_key(self, lora_id: str, idempotency_key: str) -> Feedback | None:
        """The item that came with this key for this adapter."""
        same = (FeedbackRow.lora_id == lora_id, FeedbackRow.idempotency_key == idempotency_key)
        return next(iter(await self._select(select(FeedbackRow).where(*same))), None)

    async def by_request(self, request_id: str) -> FeedbackList:
        """All items of one request."""
        return await self._select(select(FeedbackRow).where(FeedbackRow.request_id == request_id).order_by(FeedbackRow.number))

    async def in_state(self, state: FeedbackState) -> FeedbackList:
        """All items in this state, oldest first."""
        return await self._select(select(FeedbackRow).where(FeedbackRow.state == state).order_by(FeedbackRow.number))

    async def being_retracted(self) -> FeedbackList:
        """All items that were asked to be retracted and are not yet, oldest first."""
        return await self._select(select(FeedbackRow).where(FeedbackRow.retracting).order_by(FeedbackRow.number))

    async def list(self, lora_id: str | None = None, limit: int = 100) -> FeedbackList:
        """The newest items, newest first; of one adapter if it is named."""
        query = select(FeedbackRow).order_by(FeedbackRow.number.desc()).limit(limit)
        return await self._select(query if lora_id is None else query.where(FeedbackRow.lora_id == lora_id))

    async def set_state(
        self,
        ids: Sequence[str],
        state: FeedbackState,
        *,
        reason: str | None = None,
        version: int | None = None,
        retracting: bool = False,
    ) -> None:
        """Move all items to `state`, or none. `reason` replaces the one before; `version` None leaves it as it is. Raises NotFound.

        A failed item gives its idempotency key back: what came to nothing may be sent again.
        """
        values: dict[str, Any] = {"state": state, "reason": reason, "retracting": retracting} | (
            {} if version is None else {"version": version}
        )
        values |= {"idempotency_key": None} if state == "failed" else {}
        wanted = set(ids)

        def write(session: Session) -> None:
            result = session.execute(update(FeedbackRow).where(FeedbackRow.id.in_(wanted)).values(values))
            if cast(CursorResult[Any], result).rowcount != len(wanted):
                raise NotFound(f"some of these feedback items are not stored: {', '.join(sorted(map(repr, wanted)))}", param="id")

        await self._database.run(write)

    async def delete_adapter(self, lora_id: str) -> int:
        """Remove all feedback for an adapter; returns how many."""
        query = delete(FeedbackRow).where(FeedbackRow.lora_id == lora_id)
        return await self._database.run(lambda session: cast(CursorResult[Any], session.execute(query)).rowcount)

    async def _select(self, query: Select[FeedbackRow]) -> FeedbackList:
        return await self._database.run(lambda session: [_feedback(row) for row in session.scalars(query)])


def _row(item: Feedback) -> FeedbackRow:
    return FeedbackRow(**item.model_dump(exclude={"metadata"}), details=item.metadata)


def _feedback(row: FeedbackRow) -> Feedback:
    return Feedback(metadata=row.details, **{name: row.__dict__[name] for name in Feedback.model_fields if name != "metadata"})
