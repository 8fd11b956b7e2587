"""`claas chat`, as a program uses it (piped) and as a person does (in a terminal)."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from claas.training.hindsight import DISLIKED
from tests.cli.conftest import KEY, Live, claas
from tests.doubles.services import ADAPTER, BASE_MODEL

CTRL_C, CTRL_D = b"\x03", b"\x04"


def test_the_conversation_goes_with_every_turn(live: Live) -> None:
    result = live.claas("chat", "--system", "Be kind.", "--temperature", "0", typed="One\n\nTwo\n/new\nThree\n/quit\nFour\n")
    assert result.code == 0
    assert f"{ADAPTER}> [{ADAPTER}@0] Two" in result.out
    turns = [[message.content for message in request.messages] for request in live.world.inference.requests]
    assert turns == [["Be kind.", "One"], ["Be kind.", "One", f"[{ADAPTER}@0] One", "Two"], ["Be kind.", "Three"]]
    assert {request.sampling.temperature for request in live.world.inference.requests} == {0.0}


def test_feedback_is_learnt_and_the_prompt_asked_again(live: Live) -> None:
    result = live.claas("chat", typed="Hello\n/feedback Say my name.\nAnd now?\n")
    assert result.code == 0
    said = [line for line in result.out.splitlines() if line]
    at = said.index("learnt: version 0 → 1, loss 0.5 → 0.25")
    assert said[at - 1] == f"{ADAPTER}> [{ADAPTER}@0] Hello"
    assert said[at + 2 : at + 4] == ["you> Hello", f"{ADAPTER}> [{ADAPTER}@1] Hello"]
    # The reply that was wrong is no longer part of the conversation.
    last = [message.content for message in live.world.inference.requests[-1].messages]
    assert last == ["Hello", f"[{ADAPTER}@1] Hello", "And now?"]


def test_the_wanted_reply_is_learnt_and_the_prompt_asked_again(live: Live) -> None:
    said = live.claas("chat", typed="Hello\n/wanted Good day!\n").out
    assert said.index("learnt: version 0 → 1") < said.index("you> Hello") < said.index(f"[{ADAPTER}@1] Hello")
    assert [(s.response, s.source) for s in live.world.engine.lessons[0].samples] == [
        (f"[{ADAPTER}@0] Hello", "sampled"),
        ("Good day!", "hindsight"),
    ]


def test_a_bad_reply_is_asked_for_again_and_a_good_one_stays(live: Live) -> None:
    result = live.claas("chat", typed="Hello\n/bad\n/good\nAnd now?\n")
    assert result.code == 0
    bad, good = live.world.engine.lessons
    assert (bad.samples[0].response, bad.samples[0].feedback) == (f"[{ADAPTER}@0] Hello", DISLIKED)
    assert [(s.response, s.demonstration) for s in good.samples] == [(f"[{ADAPTER}@1] Hello", f"[{ADAPTER}@1] Hello")] * 2
    asked = [[m.content for m in request.messages] for request in live.world.inference.requests if not request.background]
    assert asked == [["Hello"], ["Hello"], ["Hello", f"[{ADAPTER}@1] Hello", "And now?"]]


def test_feedback_that_changed_nothing_does_not_ask_again(live: Live) -> None:
    live.world.engine.outcome = "skipped"
    result = live.claas("chat", typed="Hello\n/feedback Say my name.\n")
    assert "skipped, version 0 serves on" in result.out
    assert [request.background for request in live.world.inference.requests].count(False) == 1


def test_undo_goes_to_the_parent_and_ends_at_the_first_version(live: Live) -> None:
    result = live.claas("chat", typed="Hello\n/feedback Say my name.\n/undo\nHello\n/undo\n")
    assert "version 0 serves again" in result.out
    assert f"'claas adapters rollback {ADAPTER} 1' undoes this" in result.out
    assert live.world.inference.requests[-1].adapter is not None
    assert live.world.inference.requests[-1].adapter.version == 0
    assert (result.code, result.err) == (1, f"claas: {ADAPTER!r} is at its first version: there is nothing to undo\n")


def test_versions_and_help(live: Live) -> None:
    out = live.claas("chat", typed="/versions\n/help\n").out
    assert "parent" in out
    assert "/feedback TEXT" in out


def test_models_are_listed_and_chosen(live: Live) -> None:
    result = live.claas("chat", typed=f"/model\n/model {BASE_MODEL}\nHello\n/model {ADAPTER}@0\nHello\n/model nobody\n")
    assert f"  {BASE_MODEL}\n→ {ADAPTER}\n" in result.out
    assert "[base] Hello" in result.out
    assert f"[{ADAPTER}@0] Hello" in result.out
    assert (result.code, result.err) == (1, "claas: there is no model 'nobody': /model lists them\n")


def test_markup_in_a_reply_is_shown_as_it_is(live: Live) -> None:
    live.world.inference.reply = lambda request: "[bold]not bold[/bold] :smile: [/x]"
    assert "> [bold]not bold[/bold] :smile: [/x]\n" in live.claas("chat", typed="Hello\n").out


def test_a_reply_that_was_cut_off_is_told(live: Live) -> None:
    assert "cut off at --max-tokens" in live.claas("chat", "--max-tokens", "4", typed="Hello\n").out


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("/feedback be brief\n", "say something first"),
        ("Hello\n/feedback\n", "/feedback TEXT"),
        ("Hello\n/wanted\n", "/wanted TEXT"),
        ("/good\n", "say something first"),
        ("/bad\n", "say something first"),
        ("/nonsense\n", "there is no command '/nonsense'"),
    ],
)
def test_mistakes_end_a_piped_chat_with_exit_code_1(live: Live, typed: str, says: str) -> None:
    result = live.claas("chat", typed=typed)
    assert result.code == 1
    assert says in result.err


def test_an_unknown_model_is_told(live: Live) -> None:
    result = live.claas("chat", "--model", "nobody", typed="Hello\n")
    assert result.code == 1
    assert "nobody" in result.err


class Terminal:
    """A person at `claas chat`."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._shown = b""

    def types(self, keys: bytes) -> None:
        os.write(self._file, keys)

    def sees(self, text: str) -> None:
        """Read on until `text` is shown; what came before it is done with."""
        while text.encode() not in self._shown:
            piece = os.read(self._file, 4096)
            assert piece, self._shown
            self._shown += piece
        self._shown = self._shown.split(text.encode(), 1)[1]


# Ctrl-C goes to the group in the foreground of the controlling terminal: be it, then be `claas`. What runs in the background of a
# shell, as tests may, has been told to ignore it.
IN_TERMINAL = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from claas.__main__ import main; main()"
)


@contextmanager
def in_terminal(live: Live) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, "chat", "--url", live.url, "--api-key", KEY]
    environment = os.environ | {"TERM": "dumb"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True) as chat:
        os.close(theirs)
        try:
            yield Terminal(ours), chat
        finally:
            chat.kill()
            os.close(ours)


@pytest.mark.integration
def test_ctrl_c_stops_the_reply_and_not_the_program(live: Live) -> None:
    live.world.inference.steps = asyncio.Semaphore(6)
    with in_terminal(live) as (terminal, chat):
        terminal.sees("you> ")
        terminal.types(b"Tell me all\n")
        terminal.sees("[me/as")  # six tokens, and then it hangs
        terminal.types(CTRL_C)
        terminal.sees("(stopped; /quit leaves)")
        terminal.types(b"/feedback too slow\n")
        terminal.sees("there is no reply to learn from yet")  # an error, and the talk goes on
        live.world.inference.steps = None
        terminal.sees("you> ")
        terminal.types(b"Hello\n")
        terminal.sees("Hello")
        terminal.sees(f"[{ADAPTER}@0] Hello")
        terminal.sees("you> ")
        terminal.types(CTRL_D)
        assert chat.wait(30) == 0
    spoken = [[message.content for message in request.messages] for request in live.world.inference.requests]
    assert spoken[-1] == ["Hello"]  # the stopped turn left no trace


def test_needs_a_service() -> None:
    result = claas("chat", "--url", "http://127.0.0.1:1", typed="Hello\n")
    assert result.code == 1
    assert "claas serve" in result.err
