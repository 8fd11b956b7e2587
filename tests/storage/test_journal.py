"""The journal: a step, its version and its log file, all of it or nothing."""

from __future__ import annotations

import asyncio
import json
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select

from claas.core.errors import Conflict, StorageFull
from claas.core.types import AdapterVersion, StepRecord
from claas.learning.journal import Journal
from claas.storage.database import Database
from claas.storage.models import AdapterVersionRow

NOON = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    return tmp_path / "feedback"


@pytest.fixture
def journal(database: Database, log_dir: Path) -> Journal:
    return Journal(database, log_dir)


def _step(id: str = "step-1", **changes: object) -> StepRecord:
    fields: dict[str, object] = {
        "id": id,
        "request_id": "req-1",
        "lora_id": "me/a",
        "parent": 0,
        "version": 1,
        "outcome": "applied",
        "created_at": NOON,
    }
    return StepRecord.model_validate(fields | changes)


def _version(**changes: object) -> AdapterVersion:
    fields: dict[str, object] = {
        "lora_id": "me/a",
        "version": 1,
        "parent": 0,
        "base_model": "b",
        "feedback_ids": ("fb-1",),
        "size_bytes": 7,
    }
    return AdapterVersion.model_validate(fields | changes)


async def _versions(database: Database) -> list[tuple[str, int, int | None, list[str], int]]:
    rows = await database.run(lambda session: session.scalars(select(AdapterVersionRow)).all())
    return [(row.lora_id, row.version, row.parent, row.feedback_ids, row.size_bytes) for row in rows]


def _files(log_dir: Path) -> list[str]:
    return sorted(path.relative_to(log_dir).as_posix() for path in log_dir.rglob("*") if path.is_file())


async def test_a_step_comes_back_and_its_details_lie_where_it_says(journal: Journal, database: Database, log_dir: Path) -> None:
    step = _step(reason="it was time", metrics={"loss": 0.25, "top": [1, "a"]}, timing_ms={"distill": 12})
    path = await journal.record(step, {"samples": ["é", None]}, version_record=_version())
    assert path == "2026-05-04/req-1.json" == journal.log_path(step)
    assert json.loads((log_dir / path).read_text()) == {"samples": ["é", None]}
    assert await journal.steps() == [step]
    assert await journal.by_request("req-1") == step
    assert await _versions(database) == [("me/a", 1, 0, ["fb-1"], 7)]


async def test_a_step_without_details_has_no_file(journal: Journal, log_dir: Path) -> None:
    assert await journal.record(_step()) == ""
    assert _files(log_dir) == []
    assert await journal.by_request("req-1") == _step()


@pytest.mark.parametrize("outcome", ["skipped", "undone", "failed"])
async def test_a_step_that_was_not_applied_makes_no_version(journal: Journal, database: Database, outcome: str) -> None:
    await journal.record(_step(outcome=outcome, version=None), version_record=_version())
    assert await _versions(database) == []


async def test_a_version_recorded_again_replaces_its_record(journal: Journal, database: Database) -> None:
    await journal.record(_step(), version_record=_version())
    await journal.record(_step("step-2"), version_record=_version(size_bytes=9))
    assert await _versions(database) == [("me/a", 1, 0, ["fb-1"], 9)]


@pytest.mark.parametrize("version", [None, _version(lora_id="me/b")])
async def test_a_taken_step_id_changes_nothing(journal: Journal, database: Database, log_dir: Path, version: AdapterVersion | None) -> None:
    await journal.record(_step(), {"first": True}, version_record=_version())
    with pytest.raises(Conflict):
        await journal.record(_step(lora_id="me/b", request_id="req-2"), {"second": True}, version_record=version)
    assert [step.lora_id for step in await journal.steps()] == ["me/a"]
    assert len(await _versions(database)) == 1
    assert _files(log_dir) == ["2026-05-04/req-1.json"]


async def test_a_log_that_cannot_be_written_leaves_no_step(database: Database, tmp_path: Path) -> None:
    (tmp_path / "feedback").write_text("a file where the folder should be")
    journal = Journal(database, tmp_path / "feedback")
    with pytest.raises(OSError, match="feedback"):
        await journal.record(_step(), {"a": 1}, version_record=_version())
    assert await journal.steps() == []
    assert await _versions(database) == []


async def test_a_full_disk_under_the_log_leaves_no_step_and_no_file(journal: Journal, log_dir: Path) -> None:
    import resource

    (log_dir / "2026-05-04").mkdir(parents=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))  # the log is larger than that, the database is not
    try:
        with pytest.raises(StorageFull):
            await journal.record(_step(), {"a": "x" * 5_000_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert await journal.steps() == []
    assert _files(log_dir) == []


async def test_the_newest_steps_come_first_and_no_more_than_asked(journal: Journal) -> None:
    for number in range(4):
        await journal.record(_step(f"step-{number}", lora_id="me/a" if number % 2 else "me/b"))
    assert [step.id for step in await journal.steps(limit=3)] == ["step-3", "step-2", "step-1"]
    assert [step.id for step in await journal.steps("me/a")] == ["step-3", "step-1"]


async def test_of_a_request_tried_twice_the_newest_step_counts(journal: Journal) -> None:
    await journal.record(_step("step-1", outcome="failed", version=None))
    await journal.record(_step("step-2"))
    found = await journal.by_request("req-1")
    assert found is not None
    assert found.id == "step-2"
    assert await journal.by_request("req-9") is None


async def test_the_day_of_a_log_is_that_of_utc(journal: Journal) -> None:
    late = datetime(2026, 5, 4, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    assert await journal.record(_step(created_at=late), {}) == "2026-05-05/req-1.json"


@pytest.mark.parametrize("request_id", ["../../etc/passwd", "/etc/passwd", "..", "a/b\\c\x00\n", "é" * 200])
async def test_no_request_id_leads_out_of_the_log_folder(journal: Journal, log_dir: Path, request_id: str) -> None:
    path = await journal.record(_step(request_id=request_id), {"a": 1})
    assert (log_dir / path).resolve().is_relative_to(log_dir / "2026-05-04")
    assert _files(log_dir) == [path]


async def test_figures_that_are_not_finite_are_kept_as_null(journal: Journal, log_dir: Path) -> None:
    path = await journal.record(_step(metrics={"loss": math.nan}), {"loss": [math.inf]})
    assert (await journal.steps())[0].metrics == {"loss": None}
    assert json.loads((log_dir / path).read_text()) == {"loss": [None]}


async def test_only_the_newest_logs_are_kept(database: Database, log_dir: Path) -> None:
    journal = Journal(database, log_dir, max_log_files=3)
    for number in range(7):
        await journal.record(_step(f"step-{number}", request_id=f"req-{9 - number}", created_at=NOON + timedelta(days=number // 2)), {})
    # The seventh comes after the sixth pruned: between two prunings there may be more.
    assert _files(log_dir) == ["2026-05-05/req-6.json", "2026-05-06/req-4.json", "2026-05-06/req-5.json", "2026-05-07/req-3.json"]
    assert not (log_dir / "2026-05-04").exists()
    assert len(await journal.steps()) == 7


async def test_many_steps_at_once_are_all_kept(database: Database, log_dir: Path) -> None:
    journal = Journal(database, log_dir, max_log_files=5)
    await asyncio.gather(*(journal.record(_step(f"step-{n}", request_id=f"req-{n}"), {"n": n}) for n in range(40)))
    assert len(await journal.steps()) == 40
    assert len(_files(log_dir)) == 5


async def test_deleting_an_adapter_takes_its_steps_versions_and_logs_alone(journal: Journal, database: Database, log_dir: Path) -> None:
    await journal.record(_step("step-1"), {"a": 1}, version_record=_version())
    await journal.record(_step("step-2", request_id="req-2"))
    await journal.record(_step("step-3", request_id="req-3", lora_id="me/b"), {"b": 1}, version_record=_version(lora_id="me/b"))
    assert await journal.delete_adapter("me/a") == 2
    assert [step.id for step in await journal.steps()] == ["step-3"]
    assert [version[0] for version in await _versions(database)] == ["me/b"]
    assert _files(log_dir) == ["2026-05-04/req-3.json"]
    assert await journal.delete_adapter("me/a") == 0
