"""What goes into a column comes back, bit for bit, on both databases."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session

from claas.core.types import utc_now
from claas.storage.columns import to_json
from claas.storage.database import Database
from claas.storage.models import RolloutRow
from tests.storage.databases import KINDS, migrated

ANY_TEXT = st.text(st.characters(), max_size=40)
TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple)
FLOATS = st.lists(st.floats(width=64), max_size=20).map(tuple)
TIMES = st.datetimes(
    datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.integers(-720, 720).map(lambda m: timezone(timedelta(minutes=m)))
)
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    folder: Path = tmp_path_factory.mktemp("columns")
    with migrated(str(request.param), folder, request.config) as database:
        yield database


def _row(**values: object) -> RolloutRow:
    fields: dict[str, object] = {
        "id": "r",
        "base_model": "b",
        "messages": [],
        "template_kwargs": {},
        "prompt_token_ids": (),
        "response_token_ids": (),
        "response_logprobs": (),
        "sampling": {},
        "finish_reason": "stop",
        "prompt": "",
        "text": "",
        "lookup": "",
        "created_at": utc_now(),
    }
    return RolloutRow(**fields | values)


def _there_and_back(database: Database, **values: object) -> RolloutRow:
    """The row as another transaction reads it; it is then rolled back."""
    with database.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection) as session:
            session.add(_row(**values))
            session.flush()
            session.expunge_all()
            row = session.scalars(select(RolloutRow)).one()
            session.expunge(row)
        transaction.rollback()
        return row


@EXAMPLES
@given(text=ANY_TEXT, prompt=ANY_TEXT)
@example(text="\\u0041 \\\\ \\ud800", prompt="\ud800\x00\\")
def test_any_text(shared: Database, text: str, prompt: str) -> None:
    row = _there_and_back(shared, text=text, prompt=prompt, messages=[{"content": text}])
    assert (row.text, row.prompt, row.messages) == (text, prompt, [{"content": text}])


@EXAMPLES
@given(name=st.text(st.characters(), min_size=1, max_size=30), other=st.text(st.characters(), min_size=1, max_size=30))
def test_equal_in_the_database_means_equal(shared: Database, name: str, other: str) -> None:
    with shared.engine.connect() as connection, connection.begin() as transaction:
        with Session(connection) as session:
            session.add(_row(id=name))
            session.flush()
            assert session.scalar(select(RolloutRow.number).where(RolloutRow.id == name)) is not None
            assert (session.scalar(select(RolloutRow.number).where(RolloutRow.id == other)) is not None) == (name == other)
        transaction.rollback()


@EXAMPLES
@given(ids=TOKEN_IDS, logprobs=FLOATS)
def test_tokens_and_logprobs_bit_for_bit(shared: Database, ids: tuple[int, ...], logprobs: tuple[float, ...]) -> None:
    row = _there_and_back(shared, prompt_token_ids=ids, response_token_ids=ids[::-1], response_logprobs=logprobs)
    assert (row.prompt_token_ids, row.response_token_ids) == (ids, ids[::-1])
    assert struct.pack(f"{len(logprobs)}d", *row.response_logprobs) == struct.pack(f"{len(logprobs)}d", *logprobs)


@EXAMPLES
@given(time=TIMES)
def test_times_are_the_same_instant_in_utc(shared: Database, time: datetime) -> None:
    created_at = _there_and_back(shared, created_at=time).created_at
    assert created_at == time
    assert created_at.tzinfo is UTC or created_at.utcoffset() == timedelta(0)


def test_a_time_without_its_zone_is_refused(shared: Database) -> None:
    with pytest.raises(StatementError, match="time zone"):
        _there_and_back(shared, created_at=datetime(2026, 1, 1))


def test_json_has_no_word_for_nan(shared: Database) -> None:
    row = _there_and_back(shared, template_kwargs={"loss": math.nan, "worst": [math.inf, 1.5], "é": "\x00"})
    assert row.template_kwargs == {"loss": None, "worst": [None, 1.5], "é": "\x00"}


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | ANY_TEXT, lambda x: st.lists(x) | st.dictionaries(ANY_TEXT, x))
)
def test_json_is_always_strict_and_ascii(value: object) -> None:
    written = to_json(value)  # type: ignore[arg-type]
    assert written.isascii()
    json.loads(written, parse_constant=pytest.fail)
