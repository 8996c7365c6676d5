"""Questions and answers: CT-RATE's conversations taken apart, options told from the question, answers settled."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from samf.data.ct_rate.tables import TAG, squeeze
from samf.data.load_stats import LoadStats
from samf.data.prompts import LETTERS
from samf.data.schema import TASKS

OPTION = re.compile(r"\(([a-z])\)\s*")
NO_OPTION = "multiple choice without options, or an answer that is none of them"  # why a record is left out
KINDS = {"report_generation": "report", **{task: task for task in TASKS}}


def split_options(text: str) -> tuple[str, list[str]]:
    """ "Which one? (a) this (b) that" → ("Which one?", ["this", "that"]). No options, no split."""
    marks = list(OPTION.finditer(text))
    # The last "(a)" that is followed by "(b)", "(c)", … in order; other bracketed letters belong to the text.
    for start in reversed([k for k, mark in enumerate(marks) if mark[1] == "a"]):
        run = [marks[start]]
        for mark in marks[start + 1 :]:
            if len(run) < len(LETTERS) and mark[1] == LETTERS[len(run)]:
                run.append(mark)
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(text)]
            return text[: run[0].start()].strip(), [
                text[m.end() : end].strip() for m, end in zip(run, ends, strict=True)
            ]
    return text, []


def settle_answer(answer: str, choices: Sequence[str]) -> str | None:
    """The answer as "(b) text of option b"; None where it names no option, or a letter and another option's text."""
    mark = re.match(r"\(?([a-zA-Z])\)\s*(.*)|\(?([a-zA-Z])\)?\.?$", answer.strip(), re.DOTALL)
    letter = (mark[1] or mark[3]).lower() if mark else None
    text = normal(mark[2] or "") if mark else normal(answer)
    by_text = [k for k, choice in enumerate(choices) if normal(choice) == text] if text else []
    by_letter = LETTERS.find(letter) if letter else -1
    if 0 <= by_letter < len(choices):
        if by_text and by_letter not in by_text:
            return None
        return f"({letter}) {choices[by_letter]}"
    return f"({LETTERS[by_text[0]]}) {choices[by_text[0]]}" if len(by_text) == 1 else None


def normal(text: str) -> str:
    """Text for comparison: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(". ")


def turn_task(turn: dict[str, Any], record_id: str) -> str | None:
    """The task of a human turn: its tag, else its `type`, else what the record's id begins with."""
    tags = TAG.findall(_text(turn))
    kind = tags[-1] if tags else str(turn.get("type") or "").strip("<>")
    if kind not in KINDS:
        kind = re.sub(r"_?\d+$", "", record_id)
    return KINDS.get(kind)


def vqa_turns(record: dict[str, Any], load_stats: LoadStats) -> Iterator[dict[str, Any]]:
    """The exchanges of one VQA record as task, question, choices and answer; unusable ones are counted and dropped."""
    record_id, conversation = str(record.get("id", "vqa")), record.get("conversations") or []
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        load_stats.drop("conversation that is no list of turns", record_id)
        return
    for k, turn in enumerate(conversation):
        if turn.get("from") != "human":
            continue
        reply = conversation[k + 1] if k + 1 < len(conversation) else {}
        task = turn_task(turn, record_id)
        question = squeeze(_text(turn).replace("<image>", " "))
        answer = squeeze(_text(reply)) if reply.get("from") in ("gpt", "assistant") else ""
        if task is None or not answer or not (question or task == "report"):
            load_stats.drop("no task tag" if task is None else "no question or no answer", record_id)
            continue
        choices = None
        if task == "multiple_choice":
            question, choices = split_options(question)
            answer = settle_answer(answer, choices)
            if answer is None or not choices:
                load_stats.drop(NO_OPTION, record_id)
                continue
        yield {"task": task, "question": question, "choices": choices, "answer": answer}


def _text(turn: dict[str, Any]) -> str:
    value = turn.get("value")
    return value if isinstance(value, str) else ""
