"""What the sentences of a report say about findings, and where the probabilities of the findings say otherwise."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Said: TypeAlias = Literal["present", "uncertain", "absent"]
# How far a probability must be from 1/2 to contradict the text.
MARGIN = 0.0
_OPTION = re.compile(r"\(?[a-h]\)")


@dataclass(frozen=True)
class Disagreement:
    """A finding of which a report and the findings' probabilities say different things.

    Attributes:
        finding: its name.
        said: what the text says: "present", "absent", or "nothing" about a finding that is probably there.
        probability: of the finding.
        sentence: index of the sentence; None for "nothing".
    """

    finding: str
    said: Literal["present", "absent", "nothing"]
    probability: float
    sentence: int | None = None

    def __str__(self) -> str:
        what = "the report doesn't mention it" if self.said == "nothing" else f"the report says {self.said}"
        return f"{self.finding}: {what}, but its probability is {self.probability:.2f}"


def said_of_findings(text: str, spans: Sequence[tuple[int, int]]) -> list[dict[str, Said]]:
    """Return for each sentence the findings that it mentions, and what it says of them.

    The labeller (`text_labeller`) knows CT-RATE's 18 findings. A sentence that calls a finding present in one place and absent
    in another ("no nodule on the right, a nodule on the left") calls it present. The option of a multiple-choice question,
    "(b) emphysema", says nothing: what it means depends on the question.

    Args:
        text: the report.
        spans: start and end of its sentences.
    """
    from .text_labeller import Status, find_mentions  # compiles hundreds of expressions
    from .text_sentences import aligned_text

    found: list[dict[str, Said]] = [{} for _ in spans]
    if _OPTION.match(text.strip()):
        return found
    ranks: dict[Said, int] = {"absent": 0, "uncertain": 1, "present": 2}
    names: dict[Status, Said] = {
        Status.NEGATED: "absent",
        Status.UNCERTAIN: "uncertain",
        Status.AFFIRMED: "present",
    }
    plain, origins = aligned_text(text)
    place, start, here = 0, -1, set[tuple[str, str, Status]]()
    for mention in find_mentions(text):
        key = mention.clause, mention.label, mention.status
        if key in here or not any(clause == mention.clause for clause, *_ in here):  # a clause mentions nothing twice
            match = re.compile(r"\s+".join(map(re.escape, mention.clause.split()))).search(plain, place)
            place, start, here = (match.end(), origins[match.start()], set()) if match else (place, -1, set())
        here.add(key)
        sentence = next((index for index, (_, end) in enumerate(spans) if start < end), None)
        if start < 0 or sentence is None:
            continue
        said, own = names[mention.status], found[sentence]
        if mention.label not in own or ranks[said] > ranks[own[mention.label]]:
            own[mention.label] = said
    return found


def find_disagreements(
    said: Sequence[Mapping[str, Said]],
    probabilities: Mapping[str, float],
    margin: float = MARGIN,
    is_report: bool = True,
) -> tuple[Disagreement, ...]:
    """Return where a text and the probabilities of the findings disagree, in the order of the sentences.

    A sentence that calls a finding present disagrees with a probability below 1/2 - margin; one that calls it absent with a
    probability of 1/2 + margin or more, unless another sentence calls the finding present or uncertain. A report that
    doesn't mention a finding disagrees with a probability of 1/2 + margin or more. "Uncertain" agrees with everything.

    Args:
        said: what each sentence says, as `said_of_findings` returns it.
        probabilities: of the findings; those that the labeller can't read in texts are left out.
        margin: distance from 1/2.
        is_report: whether a finding that isn't mentioned counts: not in the answer to a question about something else.
    """
    from .text_terms import TERMS

    known = {name: value for name, value in probabilities.items() if name in TERMS}
    possible = {name for own in said for name, what in own.items() if what != "absent"}
    found = []
    for index, own in enumerate(said):
        for name, what in own.items():
            value = known.get(name)
            if value is None:
                continue
            if what == "present" and value < 0.5 - margin:
                found.append(Disagreement(name, "present", value, index))
            elif what == "absent" and value >= 0.5 + margin and name not in possible:
                found.append(Disagreement(name, "absent", value, index))
    if is_report:
        mentioned = {name for own in said for name in own}
        missed = {name: value for name, value in known.items() if name not in mentioned and value >= 0.5 + margin}
        found += [Disagreement(name, "nothing", value) for name, value in missed.items()]
    return tuple(found)
