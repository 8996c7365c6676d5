"""Reports compared with their reference, statement by statement, and the choice of cases to show.

The rule-based labeller reads the statements about the 18 findings of CT-RATE; other statements aren't marked.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from samf.evaluation.metrics.clinical_metrics import finding_samples
from samf.evaluation.metrics.multiple_choice import parse_choice, reference_choice
from samf.evaluation.metrics.text_metrics import bleu_samples, combine_bleu
from samf.evaluation.schema import PredictionRow
from samf.model.text_labeller import Mention, Status, find_mentions, finding_sides
from samf.model.text_sentences import aligned_text

Verdict = Literal["agrees", "contradicts", "unsupported"]
AGREES: Verdict = "agrees"
CONTRADICTS: Verdict = "contradicts"
UNSUPPORTED: Verdict = "unsupported"


@dataclass(frozen=True)
class Span:
    """A piece of a report; `verdict` is None where it isn't a statement about a finding."""

    text: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Marked:
    """A report in spans that add up to it, and the findings of the reference that it doesn't mention."""

    spans: tuple[Span, ...]
    missed: tuple[str, ...]


def _stated_findings(report: str) -> dict[str, bool]:
    """Return finding → whether the report calls it present (or possible) anywhere; only findings that it mentions."""
    present: dict[str, bool] = {}
    for mention in find_mentions(report):
        present[mention.label] = present.get(mention.label, False) or mention.status is not Status.NEGATED
    return present


def mark_report(report: str, reference: str) -> Marked:
    """Mark the statements of a report by what the reference says about the same finding.

    A statement agrees where both call a finding present, or both absent; it contradicts where one calls it present and
    the other absent, or they differ in its side; it is unsupported where it calls present what the reference doesn't
    mention. A clause with several findings gets the worst of its verdicts.
    """
    stated, sides = _stated_findings(reference), finding_sides(reference)
    verdicts: dict[str, set[Verdict]] = {}
    for mention in find_mentions(report):
        verdict = _verdict(mention.status is not Status.NEGATED, stated.get(mention.label))
        if verdict == AGREES and _other_side(mention, sides):
            verdict = CONTRADICTS
        if verdict:
            verdicts.setdefault(mention.clause, set()).add(verdict)
    worst = {
        clause: next(v for v in (CONTRADICTS, UNSUPPORTED, AGREES) if v in found) for clause, found in verdicts.items()
    }
    missed = tuple(label for label, present in stated.items() if present and label not in _stated_findings(report))
    return Marked(_cut(report, worst), missed)


def _verdict(present: bool, in_reference: bool | None) -> Verdict | None:
    if in_reference is None:
        return UNSUPPORTED if present else None
    return AGREES if present == in_reference else CONTRADICTS


def _other_side(mention: Mention, sides: Collection[tuple[str, str]]) -> bool:
    """Return whether a statement names a side for its finding and the reference's (finding, side) pairs only the other."""
    named = {side for label, side in finding_sides(mention.clause) if label == mention.label}
    expected = {side for label, side in sides if label == mention.label}
    return bool(named and expected) and not named & expected


def _cut(report: str, verdicts: Mapping[str, Verdict]) -> tuple[Span, ...]:
    """Cut a report at the clauses that have a verdict; clauses are located by their words."""
    # The labeller reads plain characters in lower case, and words broken at a line end as one.
    plain, origins = aligned_text(report)
    places: list[tuple[int, int, Verdict]] = []
    for clause, verdict in verdicts.items():
        pattern = r"\s+".join(map(re.escape, clause.split()))
        found = re.finditer(pattern, plain) if pattern else ()
        places += [(origins[match.start()], origins[match.end()], verdict) for match in found]
    spans, end = [], 0
    for start, stop, verdict in sorted(places):
        if start < end:
            continue  # within a longer clause that begins earlier
        spans += [Span(report[end:start]), Span(report[start:stop], verdict)]
        end = stop
    return tuple(span for span in (*spans, Span(report[end:])) if span.text)


def report_scores(rows: Sequence[PredictionRow]) -> np.ndarray:
    """Return how well each report's findings agree with its reference's, (N,) in [0, 1], for ranking cases.

    The score is F1 over the 18 findings, and 1 where neither has any, plus a hundredth of BLEU-4 to break ties, scaled to
    [0, 1].
    """
    predictions = [str(row["prediction"]) for row in rows]
    references = [str(row["reference"]) for row in rows]
    metric = finding_samples(predictions, references)["micro.f1"]
    f1 = np.where(metric.samples.sum(axis=1) == 0, 1.0, np.nan_to_num(metric.of_samples()))
    bleu = combine_bleu(bleu_samples(predictions, references), 4)
    return (f1 + 0.01 * np.nan_to_num(bleu)) / 1.01


# --- Choice of cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtremeReports:
    """The worst and the best reports of a system, each with its score (`report_scores`)."""

    worst: Sequence[tuple[PredictionRow, float]] = ()
    best: Sequence[tuple[PredictionRow, float]] = ()


def extreme_reports(rows: Sequence[PredictionRow], count: int = 3) -> ExtremeReports:
    """Return the `count` worst and best reports by the agreement of their findings; no report is in both."""
    reports = [row for row in rows if row["task"] == "report" and str(row["reference"]).strip()]
    if not reports:
        return ExtremeReports()
    scores = report_scores(reports)
    order = np.argsort(scores, kind="stable").tolist()
    worst, best = order[:count], [place for place in order[::-1][:count] if place not in order[:count]]
    return ExtremeReports(*([(reports[k], float(scores[k])) for k in places] for places in (worst, best)))


@dataclass(frozen=True)
class Case:
    """One record that two systems answered, and why it is shown."""

    id: str
    reference: str
    first: str
    second: str
    question: str = ""
    why: str = ""


def common_rows(
    first: Sequence[PredictionRow], second: Sequence[PredictionRow], task: str
) -> list[tuple[PredictionRow, PredictionRow]]:
    """Return pairs of rows with the same id and reference, in the first file's order.

    Args:
        first: predictions of one system.
        second: predictions of another.
        task: rows of other tasks are left out.

    Returns:
        Pairs (first, second); of a repeated id the first row, and none with an empty reference.
    """

    def by_id(rows: Sequence[PredictionRow]) -> dict[str | int | None, PredictionRow]:
        chosen = [row for row in rows if row["task"] == task and row.get("id") is not None]
        return {row["id"]: row for row in reversed(chosen)}

    others = by_id(second)
    pairs = [(row, others[id]) for id, row in reversed(by_id(first).items()) if id in others]
    return [(a, b) for a, b in pairs if a["reference"] == b["reference"] and str(a["reference"]).strip()]


def choose_reports(first: Sequence[PredictionRow], second: Sequence[PredictionRow], count: int = 5) -> list[Case]:
    """Return the reports on which two systems differ most, in either direction, and one of the median difference.

    Args:
        first: predictions of one system.
        second: predictions of another.
        count: largest number of cases.
    """
    pairs = common_rows(first, second, "report")
    if not pairs:
        return []
    difference = report_scores([b for _, b in pairs]) - report_scores([a for a, _ in pairs])
    order = np.argsort(difference, kind="stable").tolist()
    middle = order[len(order) // 2]
    half = max(1, (count - 1) // 2)
    chosen = [(place, "the first is better by most") for place in order[:half] if difference[place] < 0]
    chosen += [(place, "the second is better by most") for place in order[::-1][:half] if difference[place] > 0]
    if all(place != middle for place, _ in chosen):
        chosen.append((middle, "the median difference"))
    return [_case(pairs[place][0], pairs[place][1], why) for place, why in chosen[:count]]


def _case(first: PredictionRow, second: PredictionRow, why: str) -> Case:
    texts = (str(first["reference"]), str(first["prediction"]), str(second["prediction"]))
    return Case(str(first["id"]), *texts, str(first.get("question") or ""), why)


@dataclass(frozen=True)
class ChoiceComparison:
    """How many of the `questions` both, one, or neither of two systems answer correctly, and cases that differ."""

    questions: int
    both: int
    only_first: int
    only_second: int
    neither: int
    cases: Sequence[Case]


_OUTCOMES = {
    (True, True): "both",
    (True, False): "only_first",
    (False, True): "only_second",
    (False, False): "neither",
}


def compare_choices(
    first: Sequence[PredictionRow], second: Sequence[PredictionRow], count: int = 5
) -> ChoiceComparison:
    """Compare two systems' answers to multiple-choice questions.

    Args:
        first: predictions of one system.
        second: predictions of another.
        count: largest number of cases, half of each kind.
    """
    kinds: dict[str, list[Case]] = {name: [] for name in _OUTCOMES.values()}
    for a, b in common_rows(first, second, "multiple_choice"):
        right = reference_choice(str(a["reference"]), a["choices"] or ())
        if right is not None:
            first_hit, second_hit = (
                parse_choice(str(row["prediction"]), row["choices"] or ()) == right for row in (a, b)
            )
            kind = _OUTCOMES[first_hit, second_hit]
            kinds[kind].append(_case(a, b, f"right: {kind.replace('_', ' ')}"))
    half = max(1, count // 2)
    cases = kinds["only_first"][:half] + kinds["only_second"][:half]
    counts = {name: len(found) for name, found in kinds.items()}
    return ChoiceComparison(questions=sum(counts.values()), cases=cases, **counts)


# --- Markdown ---------------------------------------------------------------------------------------------------------

_SIGNS = {AGREES: "✓", CONTRADICTS: "✗", UNSUPPORTED: "?"}


def marked_text(marked: Marked) -> str:
    """Return a marked report as one line of Markdown: **✓ agrees**, **✗ contradicts**, **? not in the reference**."""

    def piece(span: Span) -> str:
        text = " ".join(span.text.split())
        if span.verdict is None:
            return text
        return f"**{_SIGNS[span.verdict]} {text}**"

    line = " ".join(piece(span) for span in marked.spans)
    return f"{line} _Not mentioned: {', '.join(marked.missed)}._" if marked.missed else line


def side_by_side(cases: Sequence[Case], names: Sequence[str]) -> str:
    """Return each case as a Markdown table of the reference and the two systems."""
    blocks = []
    for case in cases:
        rows = [f"| reference | {_cell(case.reference)} |"]
        for name, text in zip(names, (case.first, case.second), strict=True):
            rows.append(f"| {name} | {_cell(marked_text(mark_report(text, case.reference)))} |")
        blocks.append("\n".join([f"| {_cell(case.id)} | {case.why} |", "| --- | --- |", *rows]))
    return "\n\n".join(blocks)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"
