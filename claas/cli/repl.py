"""The chat loop: replies as they come, feedback on the last one, and the way back."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from claas.cli.adapters import table_of
from claas.cli.client import Client, Message, Reply
from claas.cli.report import Step
from claas.core.errors import ClaasError

HEARTBEAT_S = 0.5

HELP = """\
/feedback TEXT   say what was wrong with the last reply: it is learnt, and the same prompt is asked again
/wanted TEXT     give the reply you wanted: it is learnt in the same way
/good, /bad      rate the last reply: a good one is kept to, a bad one is asked for again
/undo            go back to the version before the one that serves
/versions        the adapter's history
/model [NAME]    show the models, or talk to another one
/new             forget this conversation (not what was learnt)
/quit            leave (Ctrl-D does too); Ctrl-C stops a reply"""


class Repl:
    """One conversation with one model. `sampling` goes with every request."""

    def __init__(
        self, client: Client, console: Console, model: str, sampling: Mapping[str, Any], system: str | None = None, interactive: bool = True
    ) -> None:
        self._client = client
        self._console = console
        self._model = model
        self._sampling = sampling
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._last: Reply | None = None
        self._interactive = interactive
        self._commands = {
            "/feedback": self._feedback,
            "/wanted": self._wanted,
            "/good": self._good,
            "/bad": self._bad,
            "/undo": self._undo,
            "/versions": self._versions,
            "/model": self._choose_model,
            "/new": self._new,
            "/help": self._help,
        }

    def run(self) -> None:
        """Read lines until the end or /quit. With a person at the keyboard errors are shown and the talk goes on; else they are raised."""
        self._say(f"You talk to {self._model}. /help lists the commands.", "dim")
        while True:
            try:
                line = input("\nyou> " if self._interactive else "").strip()
                if line == "/quit":
                    return
                if line:
                    with _interruptible():
                        self._answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\n(stopped; /quit leaves)", "dim")
            except ClaasError as error:
                if not self._interactive:
                    raise
                self._say(error.message, "red")

    def _answer(self, line: str) -> None:
        if not line.startswith("/"):
            self._ask(line)
            return
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ClaasError(f"there is no command {name!r}: /help lists them")
        self._commands[name](rest.strip())

    def _ask(self, text: str) -> None:
        """Stream a reply. Interrupted or failed, the conversation stays as it was."""
        messages = [*self._messages, {"role": "user", "content": text}]
        self._say(f"{self._model}> ", "bold", end="")
        self._last = None
        reply = self._client.stream(self._model, messages, lambda piece: self._say(piece, end=""), **self._sampling)
        self._say("")
        if reply.finish_reason == "length":
            self._say("(cut off at --max-tokens: a reply without its end cannot be taught)", "dim")
        self._last = reply
        self._messages = [*messages, {"role": "assistant", "content": reply.text}]

    def _feedback(self, text: str) -> None:
        if not text:
            raise ClaasError("say what was wrong: /feedback TEXT")
        if self._learn(feedback=text):
            self._ask_again()

    def _wanted(self, text: str) -> None:
        if not text:
            raise ClaasError("say what the reply should have been: /wanted TEXT")
        if self._learn(demonstration=text):
            self._ask_again()

    def _good(self, _: str) -> None:
        self._learn(rating=1)

    def _bad(self, _: str) -> None:
        if self._learn(rating=-1):
            self._ask_again()

    def _learn(self, **said: Any) -> bool:
        """Teach what was said of the last reply, and show the figures; whether it was learnt."""
        if self._last is None:
            raise ClaasError("there is no reply to learn from yet: say something first")
        with self._console.status("learning …"):
            step = Step.of(self._client.feedback([self._last.id], **said))
        self._say(step.headline(), "green" if step.applied else "yellow")
        for remark in step.remarks():
            self._say(remark, "yellow")
        self._say(step.figures(), "dim")
        return step.applied

    def _ask_again(self) -> None:
        """The last prompt once more, in place of its first reply."""
        question = self._messages[-2]["content"]
        self._messages = self._messages[:-2]
        self._say(f"\nyou> {question}", "dim")
        self._ask(question)

    def _undo(self, _: str) -> None:
        history = self._client.versions(self._adapter)
        parent = next(item["parent"] for item in history["versions"] if item["version"] == history["latest"])
        if parent is None:
            raise ClaasError(f"{self._adapter!r} is at its first version: there is nothing to undo")
        now = self._client.rollback(self._adapter, parent)
        self._say(f"version {now['version']} serves again; 'claas adapters rollback {self._adapter} {history['latest']}' undoes this")

    def _versions(self, _: str) -> None:
        self._console.print(table_of(self._client.versions(self._adapter)))

    def _choose_model(self, name: str) -> None:
        models = self._client.models()
        if not name:
            self._say("\n".join(f"{'→' if model == self._model else ' '} {model}" for model in models))
        elif name.partition("@")[0] in models:
            self._model = name
            self._say(f"You talk to {name}.", "dim")
        else:
            raise ClaasError(f"there is no model {name!r}: /model lists them")

    def _new(self, _: str) -> None:
        self._messages = list(self._opening)
        self._last = None
        self._say("A new conversation.", "dim")

    def _help(self, _: str) -> None:
        self._say(HELP)

    @property
    def _adapter(self) -> str:
        return self._model.partition("@")[0]

    def _say(self, text: str, style: str = "", end: str = "\n") -> None:
        self._console.print(Text(text, style=style), end=end)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a wait for the service at once, even one that is pressed just before the wait begins.

    Python looks for signals between two instructions, and a blocking read that has begun sees only what comes later. A heartbeat's
    signal breaks the read off; Python then acts on Ctrl-C if there was one, and reads on if not.
    """
    if sys.platform == "win32":  # has no such timer
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, HEARTBEAT_S, HEARTBEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
