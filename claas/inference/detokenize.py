"""Token ids → visible text, piece by piece. It knows a decoding function and stop strings; it does not know the model.

What was given out is never taken back: half of a character, and text that may turn into a stop string, wait for the tokens that
settle them. The pieces together are the decoding of all tokens, up to the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """The visible text of one reply."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._longest = max((len(s) for s in self._stop), default=0)
        # Only this tail is decoded again for each token: `_n_context` tokens whose text is out, and those after them.
        self._window: list[int] = []
        self._n_context = 0
        self._given = ""  # of the window's text, what is out
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that is now certain. After it `stopped` says whether a stop string is complete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(UNFINISHED)
        new = certain[len(self._given) :]
        if text == self._given:
            self._window.pop()  # a control token, which shows as nothing
        elif certain == text:
            # The tokens of this piece are the context of the next: some decoders treat the first token of a text specially.
            self._window = self._window[self._n_context :]
            self._n_context = len(self._window)
            self._given = self._decode(self._window)
        else:
            self._given += new
        return self._settle(new)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest = self._decode(self._window)[len(self._given) :]
        settled = self._settle(rest)
        held, self._held = self._held, ""
        return settled if self.stopped else settled + held

    def _settle(self, new: str) -> str:
        """Give out what cannot be part of a stop string any more."""
        self._held += new
        if not self._stop:
            text, self._held = self._held, ""
            return text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = next((n for n in range(min(self._longest - 1, len(self._held)), 0, -1) if self._may_stop(self._held[-n:])), 0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _may_stop(self, tail: str) -> bool:
        return any(s.startswith(tail) for s in self._stop)
