"""What the teacher reads: the conversation as it was served, with what the user said added in hindsight. Messages in, messages out.

The chat template neutralises control tokens in every message, so feedback cannot close its own turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from claas.core.errors import Unteachable
from claas.core.types import ChatMessage

HINDSIGHT_VERSION = 1
HINDSIGHT_BLOCK = "\n\n(A later message from the user follows. Use it when answering: {feedback})"
DEMONSTRATED = "Your reply should have been:\n{demonstration}"  # what the message says of a demonstration
CONTROL_FEEDBACK = "The parcel will arrive on Thursday, between nine and eleven."  # what feedback does that has nothing to do with it
DISLIKED = "Your usual reply to this is not good enough. Give a different, better one."  # and of a bare rating of -1


def hindsight_messages(
    messages: Sequence[ChatMessage], feedback: str, demonstration: str | None = None, book: Sequence[str] = ()
) -> tuple[ChatMessage, ...]:
    """`messages` with the hindsight block at the end of the last user turn; unchanged when feedback and demonstration are empty.

    `book` is earlier feedback, which stands before this one: the newest has the last word.

    Raises:
        Unteachable: there is no user turn to append to.
    """
    wanted = (demonstration or "").strip()
    said = [feedback.strip(), DEMONSTRATED.replace("{demonstration}", wanted) if wanted else ""]
    if not any(said):
        return tuple(messages)
    block = HINDSIGHT_BLOCK.replace("{feedback}", "\n".join(filter(None, [*book, *said])))
    for at in range(len(messages) - 1, -1, -1):
        turn = messages[at]
        if turn.role == "user":
            return (*messages[:at], turn.model_copy(update={"content": (turn.content or "") + block}), *messages[at + 1 :])
    raise Unteachable("the conversation has no user message, so there is nowhere to add the feedback", param="messages")
