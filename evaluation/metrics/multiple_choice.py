"""Multiple choice: the option that a free answer names, accuracy, and position bias."""

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from samf.data.prompts import LETTERS
from samf.data.schema import Record
from samf.data.texts import settle_answer
from samf.evaluation.metrics.bootstrap import patient_intervals
from samf.evaluation.metrics.sampled_metric import SampledMetric, patient_keys, ratio
from samf.evaluation.schema import ChoiceScores, PositionBias, PredictionRow

logger = logging.getLogger(__name__)

# --- The option that an answer names ------------------------------------------------------------------------------

# "a" and "i" are also words: without brackets they count as letters only before punctuation or the end.
_LETTER = r"(?:[(\[{<]\s*([a-j])\s*[)\]}>]|([a-j])(?=\s*(?:[).,:;!\]}]|$))|([b-hj])\b(?!['’]))"
_NAMED = r"(?:(?:correct|right|best|final|my|selected|chosen) )*(?:answer|option|choice)(?: (?:answer|option|choice|letter))*"
_IS = r"(?:is|would be|should be|must be)"
_CHOOSE = r"(?:choose|select|pick|go with|chose|picked|selected)"
# A second letter after the first: then nothing is chosen.
_JOINT = r"\s*(?:,|/|&|\+|\bor\b|\band\b)\s*(?:or |and )?"
_NO_SECOND = (
    rf"(?![)\]}}>.]*{_JOINT}(?:[(\[{{<]\s*[a-j]\s*[)\]}}>]|[b-hj](?=[\s).,\]]|$)(?!['’])|a(?=\s*(?:[).,:;\]]|$))))"
)
_LEAD = rf"(?:{_NAMED}(?:\s*[:=–—-]\s*| {_IS}\s*:? |\s+|(?=[(\[{{<]))|\b{_CHOOSE}\s*:?\s+)"
_VERDICT = re.compile(rf"\b{_LEAD}(?:(?:option|choice|letter) )?{_LETTER}{_NO_SECOND}")
_FINAL = re.compile(rf"\bfinal {_NAMED}\s*(?:[:=–—-]|{_IS})\s*:?\s*(?:(?:option|choice) )?{_LETTER}{_NO_SECOND}")
_VERDICT_AFTER = re.compile(r"(?:^|[\s(\[])([a-j])[)\]]? is (?:the |most )*(?:correct|right|best|answer|likely)")
_IT_IS = re.compile(r"\bit(?: is|'s|’s| would be| must be| should be) (?:[(\[{<]\s*([a-j])\s*[)\]}>]|([a-j])\s*[.!]?$)")
_REJECTED = re.compile(
    r"(?:\b(?:option|choice|answer) )?[(\[]?\b[a-j]\b[)\]]? (?:is|would be) (?:\w+ )?(?:not|wrong|incorrect|false|unlikely)\b"
)
_AT_START = re.compile(r"^(?:[(\[{<]\s*([a-j])\s*[)\]}>]|([a-j])\s*(?:[).:;\]]|\s[-–—]\s|$))")
_LONE_LETTER = re.compile(r"[(\[]?([a-j])[)\].:]*[ \t]*\n(?!\s*[(\[]?[a-j][)\].:]*\s*(?:\n|$))")
_AT_END = re.compile(r"[(\[{<]\s*([a-j])\s*[)\]}>]\W*$")
_BRACKETED = re.compile(r"[(\[{<]\s*([a-j])\s*[)\]}>]|(?:^|\s)([a-j])\)")
_SEVERAL = re.compile(r"^[(\[]?[a-j][)\].]?\s*(?:,|/|&|\+|\bor\b|\band\b)\s*(?:or |and )?[(\[]?[a-j](?:[)\].,]|\s|$)")
_LEAD_IN = re.compile(rf"^(?:the )?{_NAMED}(?:\s*[:=]\s*| {_IS}\s*:?\s+)")
# Emphasis, quotes and tags carry no meaning here: **b**, `b`, "b", <answer>b</answer>; but <b> may be an answer.
_MARKUP = re.compile(r"</?[a-z_|]{2,}>|[*`\"“”]|(?<![a-z])[_']|[_'](?![a-z])")

# Longer answers are cut: an answer commits itself at the beginning.
_LONGEST = 4000  # characters


def parse_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """Return the index of the option that `prediction` names; None when it names none or more than one.

    In this order: the exact text of one option (ignoring case and outer punctuation, also after "the answer is");
    a verdict ("The answer is b", "Option (c)", "b is correct", "I choose (b)"); a letter at the start ("b", "B.",
    "(b) text", "b: text", or the whole first line) or in brackets at the end ("text (b)"). A letter beyond the options
    names none, and so do two letters. The option's text has precedence since it may begin with a letter: "C. difficile".
    """
    text = unicodedata.normalize("NFKC", prediction[:_LONGEST]).casefold()
    text = _MARKUP.sub("", text).strip()
    first_line = _LONE_LETTER.match(text)
    text = first_line.group(1) if first_line else " ".join(text.split())
    index = _exact_option(text, choices)
    if index is not None:
        return index
    letters = _letters(text)
    if len(letters) != 1:
        return None
    index = LETTERS.index(letters.pop())
    return index if index < len(choices) else None


def _exact_option(text: str, choices: Sequence[str]) -> int | None:
    options = [_bare(unicodedata.normalize("NFKC", choice)) for choice in choices]
    for candidate in (_bare(text), _bare(_LEAD_IN.sub("", text))):
        is_letter = len(candidate) == 1 and candidate in LETTERS[: len(choices)]
        if candidate and not is_letter and options.count(candidate) == 1:
            return options.index(candidate)
    return None


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?'()[]-")


def _letters(text: str) -> set[str]:
    """Return the letters that a lower-case answer commits itself to."""
    final = _found(_FINAL, text)
    if final:
        return final
    text = _REJECTED.sub("", text)
    verdicts = _found(_VERDICT, text) | _found(_VERDICT_AFTER, text) | _found(_IT_IS, text)
    if verdicts:
        return verdicts
    if _SEVERAL.match(text):
        return set()
    anchored = _found(_AT_START, text) or _found(_AT_END, text)
    # "(a) … (b) …" repeats the options and chooses none.
    return anchored | _found(_BRACKETED, text) if anchored else set()


def _found(pattern: re.Pattern[str], text: str) -> set[str]:
    return {group for match in pattern.finditer(text) for group in match.groups() if group}


# --- Scores -------------------------------------------------------------------------------------------------------


def score_multiple_choice(
    predictions: Sequence[str], references: Sequence[str], choices: Sequence[Sequence[str]]
) -> ChoiceScores:
    """Compute accuracy and macro precision, recall and F1 over the letters that occur as right answers (paper, table 2).

    An unparsed answer is wrong. A question whose reference names no option is left out and counted in `without_reference`.

    Args:
        predictions: answers, (N,).
        references: right answers, "(b) option text" or any form that `parse_choice` understands.
        choices: options of each question.

    Raises:
        ValueError: no questions, or unequal numbers.
    """
    if not predictions or not len(predictions) == len(references) == len(choices):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references, {len(choices)} lists of choices: "
            "multiple choice needs as many of each, and at least one."
        )
    truth, answers, chances = [], [], []
    for prediction, reference, options in zip(predictions, references, choices, strict=True):
        right = reference_choice(reference, options)
        if right is None:
            logger.warning(
                "The reference %.80r names none of the options %s; the question is left out.", reference, options
            )
            continue
        named = parse_choice(prediction, options)
        truth.append(right)
        answers.append(-1 if named is None else named)
        chances.append(1 / len(options))
    left_out = len(predictions) - len(truth)
    if not truth:
        return {
            "count": 0,
            "accuracy": None,
            "precision": None,
            "recall": None,
            "f1": None,
            "chance": None,
            "unparsed": 0,
            "without_reference": left_out,
        }
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, answers, labels=sorted(set(truth)), average="macro", zero_division=0
    )
    return {
        "count": len(truth),
        "accuracy": sum(a == t for a, t in zip(answers, truth, strict=True)) / len(truth),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "chance": sum(chances) / len(chances),
        "unparsed": answers.count(-1),
        "without_reference": left_out,
    }


def reference_choice(reference: str, options: Sequence[str]) -> int | None:
    """Return the index of the right option; None where the reference, for example an empty one, names none."""
    return parse_choice(reference, options)


# --- Position bias ------------------------------------------------------------------------------------------------

_ROTATION = re.compile(r"(?P<question>.*)@(?P<shift>\d+)", re.DOTALL)
# Options that refer to the position of others change their meaning when they are moved.
_BOUND = re.compile(
    r"\b(?:the above|the below|options? [a-j]\b|(?:both|neither) \(?[a-j]\)?(?:,| and| nor))|\([a-j]\)", re.IGNORECASE
)


def rotated_records(records: Iterable[Record]) -> list[Record]:
    """Return every multiple-choice record once per rotation of its options.

    "<id>@0" is the record itself; in "<id>@s" option k is at position k + s, modulo their number, so that each option is
    once at each letter. Records of other tasks are left out, and so are those that `not_rotated` counts.
    """
    rotated: list[Record] = []
    for record in records:
        if record["task"] != "multiple_choice" or _why_not_rotated(record):
            continue
        choices = list(record["choices"] or ())
        settled = settle_answer(record["answer"], choices) or ""  # "(b) text": never empty, see `_why_not_rotated`
        right = LETTERS.index(settled[1])
        for shift in range(len(choices)):
            moved = choices[-shift:] + choices[:-shift] if shift else choices
            place = (right + shift) % len(choices)
            text = f"({LETTERS[place]}) {choices[right]}"
            rotated.append({**record, "choices": moved, "answer": text, "id": f"{record['id']}@{shift}"})
    return rotated


def not_rotated(records: Iterable[Record]) -> dict[str, int]:
    """Count the multiple-choice records that `rotated_records` leaves out, by reason."""
    reasons = (_why_not_rotated(record) for record in records if record["task"] == "multiple_choice")
    return dict(Counter(reason for reason in reasons if reason))


def _why_not_rotated(record: Record) -> str | None:
    choices = list(record.get("choices") or [])
    if len(choices) < 2:
        return "fewer than two options"
    if any(map(_BOUND.search, choices)):
        return "options that speak of others' places"
    return "the answer is none of the options" if settle_answer(record["answer"], choices) is None else None


def position_bias(rows: Iterable[PredictionRow], *, intervals: bool = True) -> PositionBias:
    """Measure how far answers depend on the position of the options, from the predictions for `rotated_records`.

    A model that answers by content names the same option in every rotation, names each letter equally often, and is right
    equally often at every position of the right option.

    Args:
        rows: predictions; those whose id has no rotation are ignored.
        intervals: whether to compute intervals; otherwise they are None.
    """
    questions: dict[str, dict[int, PredictionRow]] = defaultdict(dict)
    for row in rows:
        match = _ROTATION.fullmatch(str(row.get("id")))
        if match and row["task"] == "multiple_choice":
            questions[match["question"]][int(match["shift"])] = row
    complete = [
        [by_shift[shift] for shift in sorted(by_shift)]
        for by_shift in questions.values()
        if set(by_shift) == set(range(len(by_shift[min(by_shift)]["choices"] or ())))
    ]
    incomplete = len(questions) - len(complete)
    if not complete:
        return _empty_bias(incomplete)
    answers = [[_parse(row) for row in question] for question in complete]
    patients = patient_keys([question[0] for question in complete])
    return _bias(answers, patients, incomplete, intervals)


class _Answer(NamedTuple):
    """Positions of the option that an answer names and of the right one, and the text of the named one."""

    named: int | None
    right: int | None
    text: str | None

    @property
    def is_right(self) -> bool:
        """Return whether the named option is the right one."""
        return self.named == self.right


def _empty_bias(incomplete: int) -> PositionBias:
    return {
        "questions": 0,
        "incomplete": incomplete,
        "patients": 0,
        "accuracy": None,
        "accuracy_lowest": None,
        "accuracy_highest": None,
        "consistency": None,
        "named_by_letter": {},
        "accuracy_by_letter": {},
        "unparsed": 0,
        "intervals": {},
    }


def _bias(
    questions: Sequence[Sequence[_Answer]], patients: Sequence[str], incomplete: int, intervals: bool
) -> PositionBias:
    answers = [answer for question in questions for answer in question]
    by_shift = defaultdict(list)
    for question in questions:
        for shift, answer in enumerate(question):
            by_shift[shift].append(answer.is_right)
    per_rotation = [sum(hits) / len(hits) for hits in by_shift.values()]
    hits = [[sum(answer.is_right for answer in question), len(question)] for question in questions]
    metrics = {
        "accuracy": SampledMetric(np.array(hits, dtype=np.float64), ratio),
        "consistency": SampledMetric.mean([float(_is_consistent(question)) for question in questions]),
    }
    return {
        "questions": len(questions),
        "incomplete": incomplete,
        "patients": len(set(patients)),
        "accuracy": metrics["accuracy"].value(),
        "accuracy_lowest": min(per_rotation),
        "accuracy_highest": max(per_rotation),
        "consistency": metrics["consistency"].value(),
        "named_by_letter": _shares(answer.named for answer in answers),
        "accuracy_by_letter": _accuracy_by_letter(answers),
        "unparsed": sum(answer.named is None for answer in answers),
        "intervals": patient_intervals(metrics, patients) if intervals else dict.fromkeys(metrics),
    }


def _parse(row: PredictionRow) -> _Answer:
    choices = row["choices"] or []
    named = parse_choice(str(row["prediction"]), choices)
    right = parse_choice(str(row["reference"]), choices)
    return _Answer(named, right, None if named is None else choices[named])


def _is_consistent(question: Sequence[_Answer]) -> bool:
    texts = {answer.text for answer in question}
    return len(texts) == 1 and None not in texts


def _shares(named: Iterable[int | None]) -> dict[str, float]:
    counts = Counter(place for place in named if place is not None)
    return {LETTERS[place]: counts[place] / counts.total() for place in sorted(counts)}


def _accuracy_by_letter(answers: Sequence[_Answer]) -> dict[str, float]:
    hits = defaultdict(list)
    for answer in answers:
        if answer.right is not None:
            hits[answer.right].append(answer.is_right)
    return {LETTERS[place]: sum(hits[place]) / len(hits[place]) for place in sorted(hits)}
