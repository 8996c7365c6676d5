"""Questions on their way through the engine, and what comes back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from samf.serving.errors import ApiError
from samf.serving.uploads import ScanFile

if TYPE_CHECKING:
    from samf.model.report_samf import Report


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; jobs of a batch share it.

    Attributes:
        temperature: 0 = the most likely token.
        top_p: probability that the candidates have together.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return the options of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: what the model wrote.
        finish_reason: "stop", or "length" where it ended at its limit.
        prompt_tokens, completion_tokens: those of the volume and the end of the answer are counted.
        warnings: about the scan.
        cached: the scan had been encoded for an earlier question.
        report: with its sentences and findings, if it was asked for.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    warnings: tuple[str, ...]
    cached: bool
    report: "Report | None" = None


@dataclass(frozen=True)
class Started:
    """The scan was read and encoded; the answer comes next."""


@dataclass(frozen=True)
class Piece:
    """A further piece of a text that is streamed."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is finished."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """There is no answer."""

    error: ApiError


Event: TypeAlias = Started | Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """A question about a scan.

    Attributes:
        question: what is asked.
        scan: what it is asked about.
        notify: takes each event; called in the engine's thread.
        sampling: how tokens are chosen.
        max_tokens: of the answer; None = the model's limit.
        stream: pieces of the text are wanted.
        report: the report is wanted, too.
        evidence: of each sentence; None = not wanted.
        any_region: scans that show no chest are taken, too.
        cancelled: the client is gone.
        ended: `Done` or `Failed` was sent.
    """

    question: str
    scan: ScanFile
    notify: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stream: bool = False
    report: bool = False
    evidence: Literal["fast", "full"] | None = None
    any_region: bool = False
    cancelled: bool = False
    ended: bool = False
    pieces: int = 0

    def send(self, event: Event) -> None:
        """Hand an event on, unless the job has ended."""
        if self.ended:
            return
        self.ended = isinstance(event, (Done, Failed))
        self.pieces += isinstance(event, Piece)
        self.notify(event)
