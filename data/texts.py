"""Texts of tables: spaces and tags removed, options split from questions, answers matched with options."""

import re
from collections.abc import Sequence

from samf.data.prompts import LETTERS

#: CT-RATE's tags of a question's task.
TAG = re.compile(r"<(long_answer|short_answer|multiple_choice|report_generation)>")
#: Why a multiple-choice question is left out.
NO_OPTION = "multiple choice without options, or an answer that is none of them"
_OPTION = re.compile(r"\(([a-z])\)\s*")
_LETTERED_ANSWER = re.compile(r"\(?([a-zA-Z])\)\s*(.*)|\(?([a-zA-Z])\)?\.?$", re.DOTALL)


def squeeze(text: str | None) -> str:
    """Return a text with single spaces and without CT-RATE's tags."""
    text = text or ""
    return " ".join((TAG.sub(" ", text) if "<" in text else text).split())


def given(text: str | None) -> str:
    """Return a table's text, or "" for what CT-RATE writes instead of one: "Not given.", nan, nothing."""
    text = squeeze(text)
    return "" if text.lower().rstrip(".") in ("", "not given", "nan") else text


def split_options(text: str) -> tuple[str, list[str]]:
    """Split "Which one? (a) this (b) that" into "Which one?" and ["this", "that"]; without options, return text and []."""
    marks = list(_OPTION.finditer(text))
    # The last "(a)" that is followed by "(b)", "(c)", … in order; other letters in brackets belong to the text.
    for start in reversed([k for k, mark in enumerate(marks) if mark[1] == "a"]):
        run = [marks[start]]
        for mark in marks[start + 1 :]:
            if len(run) < len(LETTERS) and mark[1] == LETTERS[len(run)]:
                run.append(mark)
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(text)]
            options = [text[mark.end() : end].strip() for mark, end in zip(run, ends, strict=True)]
            return text[: run[0].start()].strip(), options
    return text, []


def settle_answer(answer: str, choices: Sequence[str]) -> str | None:
    """Return a multiple-choice answer as "(b) text of option b".

    Args:
        answer: a letter, an option's text, or both: "b", "(b)", "b) that", "that".
        choices: the options' texts.

    Returns:
        None where the answer names no option, or a letter together with another option's text.
    """
    mark = _LETTERED_ANSWER.match(answer.strip())
    letter = (mark[1] or mark[3]).lower() if mark else None
    text = _normalised(mark[2] or "") if mark else _normalised(answer)
    by_text = [k for k, choice in enumerate(choices) if _normalised(choice) == text] if text else []
    by_letter = LETTERS.find(letter) if letter else -1
    if 0 <= by_letter < len(choices):
        if by_text and by_letter not in by_text:
            return None
        return f"({letter}) {choices[by_letter]}"
    return f"({LETTERS[by_text[0]]}) {choices[by_text[0]]}" if len(by_text) == 1 else None


def _normalised(text: str) -> str:
    """Return a text for comparison: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(". ")
