"""What the teacher reads: the conversation as it was served, with what the user said added in hindsight. Messages in, messages out.

The chat template neutralises control tokens in every message, so feedback cannot close its own turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage

HINDSIGHT_VERSION = 1
HINDSIGHT_BLOCK = "\n\n(A later message from the user follows. Use it when answering: {feedback})"
DEMONSTRATION_BLOCK = "\n\n(The user wanted this reply: {demonstration})"
DISLIKED = "I did not like your reply. Please give me a different and better one."  # what a bare rating of -1 says


def hindsight_messages(messages: Sequence[ChatMessage], feedback: str, demonstration: str | None = None) -> tuple[ChatMessage, ...]:
    """`messages` with feedback and demonstration at the end of the last user turn; unchanged when both are empty.

    Raises:
        Unteachable: there is no user turn to append to.
    """
    block = _filled(HINDSIGHT_BLOCK, "{feedback}", feedback) + _filled(DEMONSTRATION_BLOCK, "{demonstration}", demonstration or "")
    if not block:
        return tuple(messages)
    for at in range(len(messages) - 1, -1, -1):
        turn = messages[at]
        if turn.role == "user":
            return (*messages[:at], turn.model_copy(update={"content": (turn.content or "") + block}), *messages[at + 1 :])
    raise Unteachable("the conversation has no user message, so there is nowhere to add the feedback", param="messages")


def _filled(block: str, slot: str, text: str) -> str:
    return block.replace(slot, text.strip()) if text.strip() else ""
