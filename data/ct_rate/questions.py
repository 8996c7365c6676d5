"""CT-RATE's conversations, split into questions and answers."""

import re
from collections.abc import Iterator

from samf.data.load_stats import LoadStats
from samf.data.schema import TASKS, Exchange, Task, VqaEntry, VqaTurn
from samf.data.texts import NO_OPTION, TAG, settle_answer, split_options, squeeze

_TASK_OF: dict[str, Task] = {"report_generation": "report", **{task: task for task in TASKS}}


def vqa_exchanges(entry: VqaEntry, load_stats: LoadStats) -> Iterator[Exchange]:
    """Yield the exchanges of one entry of a VQA file; `load_stats` counts the unusable ones."""
    entry_id, conversation = str(entry.get("id", "vqa")), entry.get("conversations") or []
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        load_stats.drop("conversation that is no list of turns", entry_id)
        return
    for k, turn in enumerate(conversation):
        if turn.get("from") != "human":
            continue
        reply = conversation[k + 1] if k + 1 < len(conversation) else {}
        exchange = _exchange(turn, reply, entry_id)
        if isinstance(exchange, str):
            load_stats.drop(exchange, entry_id)
        else:
            yield exchange


def _exchange(turn: VqaTurn, reply: VqaTurn, entry_id: str) -> Exchange | str:
    """Return a turn and its reply as an exchange, or why they are unusable."""
    task = _task(turn, entry_id)
    question = squeeze(_text(turn).replace("<image>", " "))
    answer = squeeze(_text(reply)) if reply.get("from") in ("gpt", "assistant") else ""
    if task is None:
        return "no task tag"
    if not answer or not (question or task == "report"):
        return "no question or no answer"
    if task != "multiple_choice":
        return {"task": task, "question": question, "choices": None, "answer": answer}
    question, choices = split_options(question)
    settled = settle_answer(answer, choices)
    if settled is None or not choices:
        return NO_OPTION
    return {"task": task, "question": question, "choices": choices, "answer": settled}


def _task(turn: VqaTurn, entry_id: str) -> Task | None:
    """Return the task of a human turn: by its tag, else by its `type`, else by the beginning of the entry's id."""
    tags = TAG.findall(_text(turn))
    kind = tags[-1] if tags else str(turn.get("type") or "").strip("<>")
    if kind not in _TASK_OF:
        kind = re.sub(r"_?\d+$", "", entry_id)
    return _TASK_OF.get(kind)


def _text(turn: VqaTurn) -> str:
    value = turn.get("value")
    return value if isinstance(value, str) else ""
