"""Sentences with gold labels, and the labeller's precision and recall on them: findings, laterality and lengths.

A file has one sentence per line, `manner | part | findings | lengths in mm | sentence`, and comments that begin with "#";
tests/evaluation/labeller_sentences.txt describes the columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation.markdown import format_value, markdown_table
from samf.evaluation.metrics.report_sizes import read_sizes
from samf.model.text_labeller import finding_sides, label_report

COLUMNS = ("manner", "part", "findings", "lengths", "sentence")
_OPEN_MARKS, _NOT_SCORED = "?~", "*"
SIDES = ("right", "left")


@dataclass(frozen=True)
class LabelledSentence:
    """A sentence and its gold labels.

    Attributes:
        manner: reporting style ("us", "uk", "in", "tr").
        part: "dev", or "held-out" for sentences of which only overall results are looked at.
        present: labels that are present.
        not_scored: labels that the sentence leaves open, or that readers disagree on.
        sides: pairs of a label and "right" or "left".
        sides_not_scored: labels whose sides aren't scored.
        lengths: lengths in mm, sorted; None where they aren't scored.
        text: the sentence.
    """

    manner: str
    part: str
    present: frozenset[str]
    not_scored: frozenset[str]
    sides: frozenset[tuple[str, str]]
    sides_not_scored: frozenset[str]
    lengths: tuple[float, ...] | None
    text: str


def read_labelled_sentences(path: Path) -> list[LabelledSentence]:
    """Read a file of labelled sentences.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line lacks a column, or has an unknown label or side; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected sentences with labels, {' | '.join(COLUMNS)} per line."
        )
    sentences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            try:
                sentences.append(_parse(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return sentences


def _parse(line: str) -> LabelledSentence:
    columns = [column.strip() for column in line.split("|", len(COLUMNS) - 1)]
    if len(columns) != len(COLUMNS):
        raise ValueError(f"{len(columns)} columns; expected {' | '.join(COLUMNS)}.")
    manner, part, findings, lengths, text = columns
    present: set[str] = set()
    not_scored: set[str] = set()
    sides: set[tuple[str, str]] = set()
    any_side: set[str] = set()
    for item in filter(None, findings.split("; ")):
        label, _, side = item.partition(": ")
        name = label.rstrip(_OPEN_MARKS)
        named = {word for word in side.split("+") if word}
        if name not in CT_RATE_LABELS or not named <= {*SIDES, _NOT_SCORED}:
            raise ValueError(
                f"{item!r} isn't a finding with a side; expected a label of CT-RATE, right, left, right+left or *."
            )
        (not_scored if label != name else present).add(name)
        if label != name or _NOT_SCORED in named:
            any_side.add(name)
        else:
            sides |= {(name, word) for word in named}
    sizes = None if lengths == _NOT_SCORED else tuple(sorted(float(length) for length in lengths.split()))
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    return LabelledSentence(
        manner, part, frozenset(present), frozenset(not_scored), frozenset(sides), frozenset(any_side), sizes, text
    )


@dataclass(frozen=True)
class Errors:
    """Right, wrong and missed findings of a sentence, and sides of the right findings; whether lengths agree."""

    findings: tuple[frozenset[str], frozenset[str], frozenset[str]]
    sides: tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]], frozenset[tuple[str, str]]]
    lengths_agree: bool


def read_as(sentence: LabelledSentence) -> Errors:
    """Compare the labeller's reading of a sentence with its gold labels."""
    found = {label for label, value in label_report(sentence.text).items() if value}
    hits = found & sentence.present
    sides = {pair for pair in finding_sides(sentence.text) if pair[0] in hits - sentence.sides_not_scored}
    findings = (frozenset(hits), frozenset(found - hits - sentence.not_scored), sentence.present - hits)
    lengths = tuple(sorted(read_sizes(sentence.text).elements()))
    pairs = (frozenset(sides & sentence.sides), frozenset(sides - sentence.sides), sentence.sides - sides)
    return Errors(findings, pairs, sentence.lengths in (None, lengths))


def counted(errors: Iterable[Errors], of: Callable[[Errors], tuple[frozenset, ...]]) -> tuple[int, int, int]:
    """Count right, wrong and missed items over all sentences, of `Errors.findings` or `Errors.sides`."""
    columns = list(map(of, errors))
    right, wrong, missed = (sum(len(items[k]) for items in columns) for k in range(3))
    return right, wrong, missed


def precision_recall(counts: tuple[int, int, int]) -> tuple[float | None, float | None]:
    """Return precision and recall from right, wrong and missed; None where nothing was found or present."""
    right, wrong, missed = counts
    precision, recall = (right / total if (total := right + other) else None for other in (wrong, missed))
    return precision, recall


def sentence_table(sentences: Sequence[LabelledSentence]) -> str:
    """Return precision and recall by part and manner, and the number of sentences whose lengths differ, as Markdown."""
    rows = []
    for name, group in _groups(sentences):
        errors = [read_as(sentence) for sentence in group]
        findings = precision_recall(counted(errors, lambda error: error.findings))
        sides = precision_recall(counted(errors, lambda error: error.sides))
        positives = sum(len(sentence.present) for sentence in group)
        differing = sum(not error.lengths_agree for error in errors)
        rows.append([name, len(group), positives, *map(format_value, (*findings, *sides)), differing])
    header = ["sentences", "number", "findings", "precision", "recall", "sides: precision", "recall", "lengths differ"]
    return markdown_table(header, rows)


def _groups(sentences: Sequence[LabelledSentence]) -> Iterator[tuple[str, list[LabelledSentence]]]:
    for part in dict.fromkeys(sentence.part for sentence in sentences):
        members = [sentence for sentence in sentences if sentence.part == part]
        yield f"**{part}**", members
        for manner in dict.fromkeys(sentence.manner for sentence in members):
            yield f"{part}, {manner}", [sentence for sentence in members if sentence.manner == manner]
