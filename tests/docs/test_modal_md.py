"""docs/modal.md has today's prices, and the messages that people will look for in it."""

from __future__ import annotations

import re

import pytest
from modal import exception

from claas.adapters import modal_errors
from claas.core.errors import ConfigurationError
from claas.core.modal_prices import LIST_PRICES
from claas.inference.modal_guard import ROUTES
from claas.training.engine.modal_calls import lesson_error
from claas.training.engine.modal_wire import OTHER_VERSION
from tests.docs.markdown import ROOT, rows, sections

PAGE = ROOT / "docs" / "modal.md"
OF_MODAL = [value for name, value in vars(modal_errors).items() if name.isupper() and isinstance(value, str)]
OF_LESSONS = [
    lesson_error(error, 1800.0).message
    for error in (
        exception.FunctionTimeoutError(),
        exception.OutputExpiredError(),
        exception.InternalFailure(),
        exception.RemoteError("exit code: 137"),
        exception.RemoteError("crashed"),
        exception.ConflictError("credit"),
        ConfigurationError("no model"),
        ValueError(),
    )
]


def test_the_prices_are_those_that_lessons_are_charged() -> None:
    told = {row[0].split()[0]: (row[1], row[2]) for row in rows(sections(PAGE)["What it costs"]) if re.fullmatch(r"0\.\d{6}", row[1])}
    assert told == {gpu: (f"{price:.6f}", f"{3600 * price:.2f}") for gpu, price in LIST_PRICES.items()}


def test_the_worked_example_adds_up() -> None:
    (*parts, total) = [row for row in rows(sections(PAGE)["What it costs"]) if row[1].isdigit()]
    seconds = [int(row[1]) for row in parts]
    assert [row[2] for row in parts] == [f"{LIST_PRICES['L40S'] * n:.2f}" for n in seconds]
    assert total[1:] == [str(sum(seconds)), f"{LIST_PRICES['L40S'] * sum(seconds):.2f}"]


@pytest.mark.parametrize("message", [*OF_MODAL, *OF_LESSONS, OTHER_VERSION])
def test_a_message_is_there_with_what_to_do(message: str) -> None:
    """What differs from time to time is three dots there."""
    told = [re.escape(row[0]).replace(re.escape("..."), ".+") for row in rows(sections(PAGE)["When something fails"])]
    assert any(re.fullmatch(pattern, message) for pattern in told)


def test_the_guards_paths_are_counted() -> None:
    assert len(ROUTES) == 8 and "eight paths" in PAGE.read_text()
