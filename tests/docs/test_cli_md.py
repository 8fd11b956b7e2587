"""docs/cli.md tells every command, every argument and every option, in the words of `--help`."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from claas.cli.main import app
from tests.docs.markdown import ROOT, rows, sections

PAGE = ROOT / "docs" / "cli.md"
SHARED = "Options of every command that talks to a service"
SHARED_OPTIONS = ("--url", "--api-key")


def leaves(command: Any, name: str) -> dict[str, Any]:
    """Every command that does something, by its whole name."""
    if "commands" not in vars(command):
        return {name: command}
    return {full: leaf for key, sub in command.commands.items() for full, leaf in leaves(sub, f"{name} {key}").items()}


COMMANDS = leaves(get_command(app), "claas")


def told(parameter: Any) -> list[str]:
    """A parameter as one row: what to write, the default, the help."""
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name).upper()
        written = f"`{name}`" if parameter.required else f"`[{name}]`"
    else:
        written = f"`{'`, `'.join([*parameter.opts, *parameter.secondary_opts])}`"
    default = "required" if parameter.required else "" if parameter.default in (None, False, "") else f"`{parameter.default}`"
    return [written, default, parameter.help]


def test_every_command_is_there_and_no_other() -> None:
    assert [title.strip("`") for title in sections(PAGE) if title.startswith("`claas ")] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_told_as_it_is(name: str) -> None:
    own = [parameter for parameter in COMMANDS[name].params if parameter.opts[0] not in SHARED_OPTIONS or name == "claas teach"]
    section = sections(PAGE)[f"`{name}`"]
    assert rows(section) == [told(parameter) for parameter in own]
    first_sentence = COMMANDS[name].help.split("\n")[0]
    assert first_sentence in section


def test_the_shared_options_are_shared() -> None:
    others = ("claas serve", "claas doctor", "claas teach")
    client_commands = [command for name, command in COMMANDS.items() if name not in others and not name.startswith("claas modal ")]
    for command in client_commands:
        shared = [told(parameter) for parameter in command.params if parameter.opts[0] in SHARED_OPTIONS]
        assert rows(sections(PAGE)[SHARED]) == shared
