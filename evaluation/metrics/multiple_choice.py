"""Multiple choice: which option a free answer names, how often it is the right one, and whether its place matters."""

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from samf.data.ct_rate.loader import settle_answer
from samf.data.prompts import LETTERS
from samf.evaluation.metrics.bootstrap import patient_intervals
from samf.evaluation.metrics.sampled_metric import SampledMetric, patient_keys, ratio

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

# --- which option an answer names -------------------------------------------------------------------------------

# "a" and "i" are words too: without brackets they count as letters only before punctuation or the end.
_LETTER = r"(?:[(\[{<]\s*([a-j])\s*[)\]}>]|([a-j])(?=\s*(?:[).,:;!\]}]|$))|([b-hj])\b(?!['’]))"
_NAMED = r"(?:(?:correct|right|best|final|my|selected|chosen) )*(?:answer|option|choice)(?: (?:answer|option|choice|letter))*"
_IS = r"(?:is|would be|should be|must be)"
_CHOOSE = r"(?:choose|select|pick|go with|chose|picked|selected)"
# A second letter behind the first: nothing is chosen then.
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
# Emphasis and quotes carry no meaning here, nor do tags: **b**, `b`, "b", <answer>b</answer>; but <b> may be an answer.
_MARKUP = re.compile(r"</?[a-z_|]{2,}>|[*`\"“”]|(?<![a-z])[_']|[_'](?![a-z])")

# Beyond it an answer is a text that went on: what it commits itself to stands at its beginning.
_LONGEST = 4000  # characters


def parse_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """The index of the option that `prediction` names, or None when it names none or more than one.

    In this order: the exact text of one option (in any case and outer punctuation, after "the answer is" too);
    a verdict ("The answer is b", "Option (c)", "b is correct", "I choose (b)"); a letter at the start ("b", "B.",
    "(b) text", "b: text", alone in the first line) or in brackets at the end ("text (b)"). A letter beyond the options
    is none, and so are two letters. The option's text goes before a letter since it may begin with one: "C. difficile".
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
    """Letters that a lower-case answer commits itself to."""
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
    # "(a) … (b) …" repeats the options, it chooses none.
    return anchored | _found(_BRACKETED, text) if anchored else set()


def _found(pattern: re.Pattern[str], text: str) -> set[str]:
    return {group for match in pattern.finditer(text) for group in match.groups() if group}


# --- scores -----------------------------------------------------------------------------------------------------


def score_multiple_choice(
    predictions: Sequence[str], references: Sequence[str], choices: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Accuracy and macro precision, recall and F1 over the letters that occur as right answers (paper, table 2).

    `references` read "(b) option text" or as any form that `parse_choice` understands. An unparsed answer is wrong. A
    question whose reference names no option can't be scored: it is left out, and counted in `without_reference`.
    Returns count (of the questions that are scored), accuracy, precision, recall, f1, chance (mean of 1 / number of
    options), unparsed and without_reference (counts); figures are None when no question is left.
    Raises ValueError for no questions or unequal numbers.
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
        figures = dict.fromkeys(("accuracy", "precision", "recall", "f1", "chance"))
        return {"count": 0, **figures, "unparsed": 0, "without_reference": left_out}
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
    """The index of the right option; None where the reference names none, as an empty one does."""
    return parse_choice(reference, options)


# --- does the place matter? -------------------------------------------------------------------------------------

_ROTATION = re.compile(r"(?P<question>.*)@(?P<shift>\d+)", re.DOTALL)
# Options that speak of others' places mean something else once they are moved.
_BOUND = re.compile(
    r"\b(?:the above|the below|options? [a-j]\b|(?:both|neither) \(?[a-j]\)?(?:,| and| nor))|\([a-j]\)", re.IGNORECASE
)


def rotated_records(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Every multiple-choice record once for each place that its options can be rotated to.

    The first, "<id>@0", is the record as it is; in "<id>@s" option k stands at place k + s, modulo their number. So each
    option stands once at each letter. Other tasks' records are passed over, and so are those that `not_rotated` counts.
    """
    rotated = []
    for record in records:
        if record["task"] != "multiple_choice" or _why_not_rotated(record):
            continue
        choices = list(record["choices"])
        right = LETTERS.index(settle_answer(record["answer"], choices)[1])
        for shift in range(len(choices)):
            moved = choices[-shift:] + choices[:-shift] if shift else choices
            place = (right + shift) % len(choices)
            text = f"({LETTERS[place]}) {choices[right]}"
            rotated.append({**record, "choices": moved, "answer": text, "id": f"{record['id']}@{shift}"})
    return rotated


def not_rotated(records: Iterable[Record]) -> dict[str, int]:
    """How many multiple-choice records `rotated_records` leaves out, by reason."""
    reasons = (_why_not_rotated(record) for record in records if record["task"] == "multiple_choice")
    return dict(Counter(reason for reason in reasons if reason))


def _why_not_rotated(record: Record) -> str | None:
    choices = list(record.get("choices") or [])
    if len(choices) < 2:
        return "fewer than two options"
    if any(map(_BOUND.search, choices)):
        return "options that speak of others' places"
    return "the answer is none of the options" if settle_answer(record["answer"], choices) is None else None


def position_bias(rows: Iterable[Mapping[str, Any]], *, intervals: bool = True) -> dict[str, Any]:
    """How far answers depend on the place of the options, from the predictions for `rotated_records`.

    A model that goes by content names the same option in every rotation, each letter equally often, and is right
    equally often wherever the right option stands.

    Returns: questions (with all rotations) and their patients, incomplete (questions that lack some, not counted),
    accuracy over all rotations, accuracy_lowest and accuracy_highest of the rotations, consistency (share of questions with
    one and the same option named in all rotations), named_by_letter (share of the parsed answers), accuracy_by_letter (of
    the right option's place), unparsed, and intervals (of accuracy and consistency, over patients; None without
    `intervals`). Figures are None without questions.
    """
    questions: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        match = _ROTATION.fullmatch(str(row.get("id")))
        if match and row["task"] == "multiple_choice":
            questions[match["question"]][int(match["shift"])] = row
    complete = [
        [by_shift[shift] for shift in sorted(by_shift)]
        for by_shift in questions.values()
        if set(by_shift) == set(range(len(by_shift[min(by_shift)]["choices"])))
    ]
    counts = {"questions": len(complete), "incomplete": len(questions) - len(complete)}
    if not complete:
        names = ("accuracy", "accuracy_lowest", "accuracy_highest", "consistency")
        nothing = {"named_by_letter": {}, "accuracy_by_letter": {}, "unparsed": 0, "intervals": {}}
        return {**counts, "patients": 0, **dict.fromkeys(names), **nothing}
    judged = [[_judged(row) for row in question] for question in complete]
    patients = patient_keys([question[0] for question in complete])
    return {**counts, "patients": len(set(patients)), **_bias_figures(judged, patients, intervals)}


_Judged = tuple[int | None, int | None, str | None]


def _bias_figures(questions: Sequence[Sequence[_Judged]], patients: Sequence[str], intervals: bool) -> dict[str, Any]:
    answers = [answer for question in questions for answer in question]
    by_shift = defaultdict(list)
    for question in questions:
        for shift, (named, right, _) in enumerate(question):
            by_shift[shift].append(named == right)
    per_rotation = [sum(hits) / len(hits) for hits in by_shift.values()]
    hits = [[sum(named == right for named, right, _ in question), len(question)] for question in questions]
    metrics = {
        "accuracy": SampledMetric(np.array(hits, dtype=np.float64), ratio),
        "consistency": SampledMetric.mean([float(_is_consistent(question)) for question in questions]),
    }
    return {
        "accuracy": metrics["accuracy"].value(),
        "accuracy_lowest": min(per_rotation),
        "accuracy_highest": max(per_rotation),
        "consistency": metrics["consistency"].value(),
        "named_by_letter": _shares(named for named, _, _ in answers),
        "accuracy_by_letter": _accuracy_by_letter(answers),
        "unparsed": sum(named is None for named, _, _ in answers),
        "intervals": patient_intervals(metrics, patients) if intervals else dict.fromkeys(metrics),
    }


def _judged(row: Mapping[str, Any]) -> _Judged:
    """The place that is named, the right one, and the text of the option that is named."""
    choices = row["choices"]
    named = parse_choice(str(row["prediction"]), choices)
    return named, parse_choice(str(row["reference"]), choices), None if named is None else choices[named]


def _is_consistent(question: Sequence[_Judged]) -> bool:
    texts = {text for _, _, text in question}
    return len(texts) == 1 and None not in texts


def _shares(named: Iterable[int | None]) -> dict[str, float]:
    counts = Counter(place for place in named if place is not None)
    return {LETTERS[place]: counts[place] / counts.total() for place in sorted(counts)}


def _accuracy_by_letter(answers: Sequence[_Judged]) -> dict[str, float]:
    hits = defaultdict(list)
    for named, right, _ in answers:
        if right is not None:
            hits[right].append(named == right)
    return {LETTERS[place]: sum(hits[place]) / len(hits[place]) for place in sorted(hits)}
