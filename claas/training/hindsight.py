"""What the teacher reads: the conversation as it was served, with the feedback added in hindsight. Messages in, messages out.

The chat template neutralises control tokens in every message, so feedback cannot close its own turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage

HINDSIGHT_VERSION = 1
HINDSIGHT_BLOCK = "\n\n(A later message from the user follows. Use it when answering: {feedback})"


def hindsight_messages(messages: Sequence[ChatMessage], feedback: str) -> tuple[ChatMessage, ...]:
    """`messages` with the hindsight block at the end of the last user turn; unchanged when `feedback` is empty.

    Raises:
        Unteachable: there is no user turn to append to.
    """
    if not feedback.strip():
        return tuple(messages)
    for at in range(len(messages) - 1, -1, -1):
        turn = messages[at]
        if turn.role == "user":
            block = HINDSIGHT_BLOCK.replace("{feedback}", feedback.strip())
            return (*messages[:at], turn.model_copy(update={"content": (turn.content or "") + block}), *messages[at + 1 :])
    raise Unteachable("the conversation has no user message, so there is nowhere to add the feedback", param="messages")
