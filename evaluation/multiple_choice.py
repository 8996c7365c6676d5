"""Multiple choice: which option a free answer names, and how often it is the right one."""

import re
from collections.abc import Sequence
from typing import Any

from sklearn.metrics import precision_recall_fscore_support

from samf.data.prompts import LETTERS

# "a" and "i" are words too: without brackets they count as letters only before punctuation or the end.
_LETTER = r"(?:[(\[{]\s*([a-j])\s*[)\]}]|([a-j])(?=\s*(?:[).,:;!\]]|$))|([b-hj])\b(?!['’]))"
_NAMED = r"(?:(?:correct|right|best|final|my) )*(?:answer|option|choice)(?: (?:answer|option|choice|letter))*"
_IS = r"(?:is|would be|should be|must be)"
_VERDICT = re.compile(rf"\b{_NAMED}(?:\s*[:=]\s*| {_IS}\s*:? |\s+|(?=[(\[{{]))(?:(?:option|choice|letter) )?{_LETTER}")
_VERDICT_AFTER = re.compile(r"(?:^|[\s(\[])([a-j])[)\]]? is (?:the |most )*(?:correct|right|best|answer|likely)")
_AT_START = re.compile(r"^(?:[(\[{]\s*([a-j])\s*[)\]}]|([a-j])\s*(?:[).:\]]|\s[-–—]\s|$))")
_LONE_LETTER = re.compile(r"[(\[]?([a-j])[)\].:]*[ \t]*\n")
_AT_END = re.compile(r"[(\[{]\s*([a-j])\s*[)\]}]\W*$")
_BRACKETED = re.compile(r"[(\[{]\s*([a-j])\s*[)\]}]|(?:^|\s)([a-j])\)")
_SEVERAL = re.compile(r"^[(\[]?[a-j][)\].]?\s*(?:,|/|&|\+|\bor\b|\band\b)\s*(?:or |and )?[(\[]?[a-j](?:[)\].,]|\s|$)")
_LEAD_IN = re.compile(rf"^(?:the )?{_NAMED}(?:\s*[:=]\s*| {_IS}\s*:?\s+)")


def parse_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """The index of the option that `prediction` names, or None when it names none or more than one.

    In this order: the exact text of one option (in any case and outer punctuation, after "the answer is" too);
    a verdict ("The answer is b", "Option (c)", "b is correct"); a letter at the start ("b", "B.", "(b) text",
    "b: text", alone in the first line) or in brackets at the end ("text (b)"). A letter beyond the options is none.
    """
    # Emphasis and quotes carry no meaning here: **b**, `b`, "b".
    text = re.sub(r"[*_`\"“”]", "", prediction).casefold().strip()
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
    options = [_bare(choice) for choice in choices]
    for candidate in (_bare(text), _bare(_LEAD_IN.sub("", text))):
        is_letter = len(candidate) == 1 and candidate in LETTERS[: len(choices)]
        if candidate and not is_letter and options.count(candidate) == 1:
            return options.index(candidate)
    return None


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?'()[]-")


def _letters(text: str) -> set[str]:
    """Letters that a lower-case answer commits itself to."""
    verdicts = _found(_VERDICT, text) | _found(_VERDICT_AFTER, text)
    if verdicts:
        return verdicts
    if _SEVERAL.match(text):
        return set()
    anchored = _found(_AT_START, text) or _found(_AT_END, text)
    # "(a) … (b) …" repeats the options, it chooses none.
    return anchored | _found(_BRACKETED, text) if anchored else set()


def _found(pattern: re.Pattern[str], text: str) -> set[str]:
    return {group for match in pattern.finditer(text) for group in match.groups() if group}


def score_multiple_choice(
    predictions: Sequence[str], references: Sequence[str], choices: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Accuracy and macro precision, recall and F1 over the letters that occur as right answers.

    `references` read "(b) option text" or as any form that `parse_choice` understands. An unparsed answer is wrong.
    Returns count, accuracy, precision, recall, f1, chance (mean of 1 / number of options), unparsed (a count).
    Raises ValueError for no questions, unequal numbers, or a reference that names no option.
    """
    if not predictions or not len(predictions) == len(references) == len(choices):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references, {len(choices)} lists of choices: "
            "multiple choice needs as many of each, and at least one."
        )
    truth = [_reference_index(reference, options) for reference, options in zip(references, choices, strict=True)]
    named = [parse_choice(prediction, options) for prediction, options in zip(predictions, choices, strict=True)]
    answers = [-1 if index is None else index for index in named]
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, answers, labels=sorted(set(truth)), average="macro", zero_division=0
    )
    return {
        "count": len(truth),
        "accuracy": sum(a == t for a, t in zip(answers, truth, strict=True)) / len(truth),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "chance": sum(1 / len(options) for options in choices) / len(choices),
        "unparsed": answers.count(-1),
    }


def _reference_index(reference: str, options: Sequence[str]) -> int:
    index = parse_choice(reference, options)
    if index is None:
        raise ValueError(
            f"The reference {reference!r} names none of the options {list(options)}; expected '(b) option text', "
            "a letter, or one option's text."
        )
    return index
