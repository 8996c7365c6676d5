"""Rule-based labeller of English chest-CT reports: CT-RATE's 18 labels, with negation and uncertainty.

A report is read in sentences (`report_text`) and clauses (`finding_cues`); in each clause the expressions of `TERMS`
(`finding_terms`) are looked up, and a mention is affirmed, uncertain or negated by the cues around it; its side is read in
its own phrase (`laterality`). Nothing is downloaded. docs/results/metrics.md says how well it reads which manner of reports.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation.metrics.finding_cues import Cues, Status, WrittenOut, clause_spans, refers_back, split_clauses
from samf.evaluation.metrics.finding_terms import TERMS, Term
from samf.evaluation.metrics.laterality import ClauseSides, named_sides
from samf.evaluation.metrics.report_text import Sentence, read_findings, split_sentences

__all__ = [
    "TERMS",
    "Mention",
    "Status",
    "Term",
    "effusion_sides",
    "find_mentions",
    "finding_sides",
    "label_report",
    "label_reports",
    "split_clauses",
    "split_sentences",
]

# Findings of organs in the midline: the sides that their clauses name are other findings'.
MIDLINE = frozenset(["Cardiomegaly", "Pericardial effusion", "Hiatal hernia", "Coronary artery wall calcification"])
MATERIAL = "Medical material"


@dataclass(frozen=True)
class Mention:
    """One place where a report speaks of a finding.

    Attributes:
        label: one of CT-RATE's 18.
        status: what is said.
        clause: the words that say it, in lower case.
        sides: those of "right" and "left" that the clause names for this finding.
    """

    label: str
    status: Status
    clause: str
    sides: frozenset[str] = frozenset()


class _Compiled:
    """A term with its expressions compiled."""

    def __init__(self, term: Term):
        self.head = re.compile(term.head)
        self._near, self._unless, self._despite = (
            re.compile(part) if part else None for part in (term.near, term.unless, term.despite)
        )
        self.is_measure = term.is_measure
        self._has_head, self._has_other = ("head" in self.head.groupindex, "other" in self.head.groupindex)

    def spans(self, clause: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of each place in a clause where the term names its finding."""
        if self._near and not self._near.search(clause):
            return
        excluded = bool(self._unless and self._unless.search(clause))
        if excluded and not self._despite:
            return
        for match in self.head.finditer(clause):
            if self._has_other and match["other"]:
                continue
            if not excluded or self._is_named_here(clause, match.start()):
                yield match.span("head") if self._has_head and match["head"] else match.span()

    def _is_named_here(self, clause: str, place: int) -> bool:
        """Whether the phrase around `place` has `despite` and not `unless`: "nodules in the lung and the thyroid"."""
        start = max(clause.rfind(", ", 0, place), clause.rfind(" and ", 0, place), 0)
        ends = [end for end in (clause.find(", ", place), clause.find(" and ", place)) if end >= 0]
        phrase = clause[start : min(ends, default=len(clause))]
        return bool(self._despite.search(phrase)) and not self._unless.search(phrase)


_TERMS = {label: [_Compiled(term) for term in terms] for label, terms in TERMS.items()}

# --- mentions ---------------------------------------------------------------------------------------------------


def find_mentions(report: str) -> list[Mention]:
    """Every mention of one of the 18 findings in a report, in the order of its sentences; once a clause and status."""
    return list(_report_mentions(report))


@lru_cache(maxsize=1 << 14)  # a report is asked for its labels, its sides, and again beside each baseline
def _report_mentions(report: str) -> tuple[Mention, ...]:
    clauses: list[tuple[Mention, ...]] = []
    for sentence in read_findings(report):
        for clause in _sentence_clauses(sentence):
            if clause.refers_back is None:
                clauses.append(clause.mentions)
            elif clauses:
                clauses[-1:] = _refer_back(clauses[-1], clause)
    return tuple(mention for mentions in clauses for mention in mentions)


@dataclass(frozen=True)
class _Clause:
    """The mentions of a clause; of one that only refers back ("it has resolved"), what it says of the one before."""

    mentions: tuple[Mention, ...]
    words: str = ""
    refers_back: Status | None = None
    sides: frozenset[str] = frozenset()


def _refer_back(before: tuple[Mention, ...], clause: _Clause) -> list[tuple[Mention, ...]]:
    """The mentions of the clause before, and those that a clause about "it" adds: what is denied now is denied."""
    said = tuple(
        Mention(
            mention.label, clause.refers_back, clause.words, frozenset() if mention.label in MIDLINE else clause.sides
        )
        for mention in before
        if clause.sides or (mention.status is Status.NEGATED) != (clause.refers_back is Status.NEGATED)
    )
    if clause.refers_back is Status.NEGATED:
        before = tuple(mention for mention in before if mention.status is Status.NEGATED)
    return [before, said] if said else [before]


@lru_cache(maxsize=1 << 15)  # and reports repeat each other's sentences
def _sentence_clauses(sentence: Sentence) -> tuple[_Clause, ...]:
    written = WrittenOut(sentence.text, sentence.organ)
    colon = written.text.find(":")
    heading_sides = frozenset(side for _, side in named_sides(written.text, 0, colon)) if colon > 0 else frozenset()
    clauses = []
    for start, end in clause_spans(written.text):
        clause = written.text[start:end]
        words = written.original(start, end)
        found = _clause_mentions(clause, max(0, written.first - start))
        mentions = tuple(
            Mention(label, status, words, frozenset() if label in MIDLINE else sides or heading_sides)
            for (label, status), sides in found.items()
        )
        status = None if found else refers_back(clause)
        sides = frozenset(side for _, side in named_sides(clause)) if status else frozenset()
        clauses.append(_Clause(mentions, words, status, sides))
    return tuple(clauses)


def _clause_mentions(clause: str, first: int) -> dict[tuple[str, Status], frozenset[str]]:
    """(label, status) → sides, of the findings that a clause names from `first` on (before it stands a heading)."""
    spans = [
        (label, term, start, end)
        for label, terms in _TERMS.items()
        for term in terms
        for start, end in term.spans(clause)
        if start >= first
    ]
    if not spans:
        return {}
    cues, sides = Cues(clause), ClauseSides(clause, [start for _, _, start, _ in spans])
    found: dict[tuple[str, Status], frozenset[str]] = {}
    for label, term, start, end in spans:
        if label != MATERIAL and cues.is_history(start, end):
            continue
        key = label, cues.status(start, end, is_measure=term.is_measure)
        found[key] = found.get(key, frozenset()) | sides.of(start)
    return found


# --- labels and sides ---------------------------------------------------------------------------------------------


def label_report(report: str, *, uncertain_is_positive: bool = True) -> dict[str, int]:
    """CT-RATE's 18 labels of one report: 1 when any clause affirms the finding (or, by default, calls it possible)."""
    present = {mention.label for mention in _present(report, uncertain_is_positive)}
    return {label: int(label in present) for label in CT_RATE_LABELS}


def label_reports(reports: Sequence[str], *, uncertain_is_positive: bool = True) -> np.ndarray:
    """Labels of N reports as an int64 array (N, 18), columns in the order of `CT_RATE_LABELS`."""
    rows = [list(label_report(report, uncertain_is_positive=uncertain_is_positive).values()) for report in reports]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(CT_RATE_LABELS))


def finding_sides(report: str, *, uncertain_is_positive: bool = True) -> frozenset[tuple[str, str]]:
    """(finding, "left" or "right") for every side that a report names for a finding that it affirms."""
    present = _present(report, uncertain_is_positive)
    return frozenset((mention.label, side) for mention in present for side in mention.sides)


def effusion_sides(report: str, *, uncertain_is_positive: bool = True) -> frozenset[str]:
    """Sides ("left", "right") of the pleural effusion that a report affirms; empty without effusion or side."""
    sides = finding_sides(report, uncertain_is_positive=uncertain_is_positive)
    return frozenset(side for label, side in sides if label == "Pleural effusion")


def _present(report: str, uncertain_is_positive: bool) -> list[Mention]:
    wanted = {Status.AFFIRMED, Status.UNCERTAIN} if uncertain_is_positive else {Status.AFFIRMED}
    return [mention for mention in _report_mentions(report) if mention.status in wanted]
