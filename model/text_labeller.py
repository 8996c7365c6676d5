"""Rule-based labeller of English chest-CT reports: CT-RATE's 18 labels, with negation and uncertainty.

A report is split into sentences (`text_sentences`) and clauses (`text_cues`). In each clause the expressions of `TERMS`
(`text_terms`) are looked up; the cues around a mention decide whether it is affirmed, uncertain or negated, and its side
is read in its own phrase (`text_laterality`). It is part of the model's code, so that a published model can compare what it
writes with what its findings head says. Nothing is downloaded. docs/results/metrics.md gives its accuracy by reporting style.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from .text_abbreviations import WrittenOut
from .text_cues import Cues, Status, clause_spans, refers_back, split_clauses
from .text_expressions import Expression
from .text_laterality import ClauseSides, named_sides
from .text_sentences import Sentence, read_findings, split_sentences
from .text_terms import TERMS, Term

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

# Findings of organs in the midline: sides in their clauses belong to other findings.
_MIDLINE = frozenset(["Cardiomegaly", "Pericardial effusion", "Hiatal hernia", "Coronary artery wall calcification"])
_MATERIAL = "Medical material"


@dataclass(frozen=True)
class Mention:
    """A mention of a finding in a report.

    Attributes:
        label: one of CT-RATE's 18.
        status: affirmed, uncertain or negated.
        clause: the words of the clause, in lower case.
        sides: those of "right" and "left" that the clause names for this finding.
    """

    label: str
    status: Status
    clause: str
    sides: frozenset[str] = frozenset()


class _Compiled:
    """A term with its expressions compiled."""

    def __init__(self, term: Term):
        self.head = Expression(term.head)
        self._near, self._unless, self._despite = (
            Expression(part) if part else None for part in (term.near, term.unless, term.despite)
        )
        self.is_measure = term.is_measure
        self._has_head, self._has_other = ("head" in self.head.groupindex, "other" in self.head.groupindex)

    def spans(self, clause: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of each match of the term in a clause."""
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
        """Return whether the phrase at `place` matches `despite` and not `unless`: "nodules in the lung and the thyroid"."""
        start = max(clause.rfind(", ", 0, place), clause.rfind(" and ", 0, place), 0)
        ends = [end for end in (clause.find(", ", place), clause.find(" and ", place)) if end >= 0]
        phrase = clause[start : min(ends, default=len(clause))]
        named = self._despite and self._despite.search(phrase)
        return bool(named) and not (self._unless and self._unless.search(phrase))


_TERMS = [(label, _Compiled(term)) for label, terms in TERMS.items() for term in terms]


def _literal_index() -> tuple[list[tuple[str, list[int]]], list[int]]:
    """Return literal → numbers of the terms whose heads contain it, and the terms whose heads have no such literals."""
    index: dict[str, list[int]] = {}
    others = []
    for number, (_, term) in enumerate(_TERMS):
        if term.head.literals is None:
            others.append(number)
        for literal in term.head.literals or ():
            index.setdefault(literal, []).append(number)
    return list(index.items()), others


_LITERALS, _WITHOUT_LITERALS = _literal_index()


def _possible_terms(clause: str) -> list[int]:
    """Return the numbers of the terms that may match in a clause, ascending."""
    named = [numbers for literal, numbers in _LITERALS if literal in clause]
    return sorted({*_WITHOUT_LITERALS, *chain.from_iterable(named)}) if named else _WITHOUT_LITERALS


# --- Mentions ---------------------------------------------------------------------------------------------------


def find_mentions(report: str) -> list[Mention]:
    """Return every mention of one of the 18 findings in a report, in order of its sentences; one per clause and status."""
    return list(_report_mentions(report))


@lru_cache(maxsize=1 << 8)  # labels and sides ask for the same report
def _report_mentions(report: str) -> tuple[Mention, ...]:
    clauses: list[tuple[Mention, ...]] = []
    for sentence in read_findings(report):
        for clause in _sentence_clauses(sentence):
            if clause.refers_back is None:
                clauses.append(clause.mentions)
            elif clauses:
                clauses[-1:] = _refer_back(clauses[-1], clause, clause.refers_back)
    return tuple(mention for mentions in clauses for mention in mentions)


@dataclass(frozen=True)
class _Clause:
    """The mentions of a clause; or, if it only refers back ("it has resolved"), what it says about the preceding one."""

    mentions: tuple[Mention, ...]
    words: str = ""
    refers_back: Status | None = None
    sides: frozenset[str] = frozenset()


def _refer_back(before: tuple[Mention, ...], clause: _Clause, status: Status) -> list[tuple[Mention, ...]]:
    """Return the mentions of the preceding clause and those that a clause about "it" adds; a later negation wins."""
    said = tuple(
        Mention(mention.label, status, clause.words, frozenset() if mention.label in _MIDLINE else clause.sides)
        for mention in before
        if clause.sides or (mention.status is Status.NEGATED) != (status is Status.NEGATED)
    )
    if status is Status.NEGATED:
        before = tuple(mention for mention in before if mention.status is Status.NEGATED)
    return [before, said] if said else [before]


@lru_cache(maxsize=1 << 16)  # reports share sentences
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
            Mention(label, status, words, frozenset() if label in _MIDLINE else sides or heading_sides)
            for (label, status), sides in found.items()
        )
        status = None if found else refers_back(clause)
        sides = frozenset(side for _, side in named_sides(clause)) if status else frozenset()
        clauses.append(_Clause(mentions, words, status, sides))
    return tuple(clauses)


def _clause_mentions(clause: str, first: int) -> dict[tuple[str, Status], frozenset[str]]:
    """Return (label, status) → sides of the findings that a clause names from index `first`, the end of a heading, on."""
    spans = [
        (label, term, start, end)
        for label, term in map(_TERMS.__getitem__, _possible_terms(clause))
        for start, end in term.spans(clause)
        if start >= first
    ]
    if not spans:
        return {}
    cues, sides = Cues(clause), ClauseSides(clause, [start for _, _, start, _ in spans])
    found: dict[tuple[str, Status], frozenset[str]] = {}
    for label, term, start, end in spans:
        if label != _MATERIAL and cues.is_history(start, end):
            continue
        key = label, cues.status(start, end, is_measure=term.is_measure)
        found[key] = found.get(key, frozenset()) | sides.of(start)
    return found


# --- Labels and laterality ----------------------------------------------------------------------------------------


def label_report(report: str, *, uncertain_is_positive: bool = True) -> dict[str, int]:
    """Return CT-RATE's 18 labels of a report: 1 when any clause affirms the finding (or, by default, calls it possible)."""
    present = {mention.label for mention in _present(report, uncertain_is_positive)}
    return {label: int(label in present) for label in TERMS}


def label_reports(reports: Sequence[str], *, uncertain_is_positive: bool = True) -> np.ndarray:
    """Return the labels of N reports as an int64 array (N, 18), columns in the order of `TERMS`."""
    rows = [list(label_report(report, uncertain_is_positive=uncertain_is_positive).values()) for report in reports]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(TERMS))


def finding_sides(report: str, *, uncertain_is_positive: bool = True) -> frozenset[tuple[str, str]]:
    """Return (finding, "left" or "right") for every side that a report names for a finding that it affirms."""
    present = _present(report, uncertain_is_positive)
    return frozenset((mention.label, side) for mention in present for side in mention.sides)


def effusion_sides(report: str, *, uncertain_is_positive: bool = True) -> frozenset[str]:
    """Return the sides ("left", "right") of the pleural effusion that a report affirms; empty without effusion or side."""
    sides = finding_sides(report, uncertain_is_positive=uncertain_is_positive)
    return frozenset(side for label, side in sides if label == "Pleural effusion")


def _present(report: str, uncertain_is_positive: bool) -> list[Mention]:
    wanted = {Status.AFFIRMED, Status.UNCERTAIN} if uncertain_is_positive else {Status.AFFIRMED}
    return [mention for mention in _report_mentions(report) if mention.status in wanted]
