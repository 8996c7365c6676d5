"""What a judge is: an object that replies to prompts, and the errors it may raise."""

from typing import Protocol

from samf.evaluation.judging.prompts import Messages
from samf.evaluation.schema import JudgeIdentity

__all__ = ["Judge", "JudgeError", "ReplyError"]


class JudgeError(RuntimeError):
    """The judge can't be used; the message says what to do. Earlier replies are kept."""


class ReplyError(RuntimeError):
    """One prompt got no reply; others may."""


class Judge(Protocol):
    """An object that replies to prompts.

    Attributes:
        identity: what its replies depend on in addition to the prompt.
        workers: the number of concurrent prompts.
    """

    identity: JudgeIdentity
    workers: int

    def __call__(self, messages: Messages) -> str:
        """Return the reply to a prompt.

        Raises:
            ReplyError: this prompt got no reply.
            JudgeError: no prompt can get one.
        """
        ...
