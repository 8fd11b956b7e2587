"""docs/settings.md tells every setting, its variable, its default and what it means."""

from __future__ import annotations

import tomllib
from typing import Literal, get_args, get_origin

import pytest

from claas.core.settings import CLIENT_VARIABLES, CONFIG_VARIABLE, Settings
from tests.docs.markdown import ROOT, fenced, rows, sections

PAGE = ROOT / "docs" / "settings.md"
CLIENT_SECTION = "Of the command line only"
BY_PLATFORM = {"data_dir": "the user's data folder", "cache_dir": "the user's cache folder"}


def documented() -> dict[str, list[str]]:
    listed = [row for title, text in sections(PAGE).items() if title != CLIENT_SECTION for row in rows(text)]
    names = [row[0].strip("`") for row in listed]
    assert len(names) == len(set(names))
    return dict(zip(names, listed, strict=True))


def default(name: str) -> str:
    field = Settings.model_fields[name]
    if name in BY_PLATFORM:
        return BY_PLATFORM[name]
    shown = "unset" if field.default is None else "`[]`" if field.default == () else f"`{field.default}`"
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    others = [f"`{choice}`" for choice in choices if choice != field.default]
    return f"{shown} (or {', '.join(others)})" if others else shown


def test_every_setting_is_there_and_no_other() -> None:
    assert list(documented()) == list(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_is_told_as_it_is(name: str) -> None:
    field = Settings.model_fields[name]
    variable = field.validation_alias or f"CLAAS_{name.upper()}"
    assert documented()[name] == [f"`{name}`", f"`{variable}`", default(name), field.description]


def test_the_clients_variables_are_there() -> None:
    assert {row[0].strip("`") for row in rows(sections(PAGE)[CLIENT_SECTION])} == {CONFIG_VARIABLE, *CLIENT_VARIABLES}


def test_the_example_file_is_valid() -> None:
    (example,) = fenced(PAGE, "toml")
    settings = Settings(**tomllib.loads(example))
    assert settings.port == 9000
