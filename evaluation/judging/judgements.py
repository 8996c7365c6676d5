"""Ask a judge about the rows of a predictions file: concurrently, each prompt once, and resumably."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, get_args

from tqdm.auto import tqdm

from samf.evaluation.json_lines import json_line, read_complete_lines
from samf.evaluation.judging.base import Judge, JudgeError, ReplyError
from samf.evaluation.judging.prompts import HIGHEST, PROMPT_VERSION, Messages, build_messages
from samf.evaluation.judging.replies import parse_score
from samf.evaluation.schema import JudgeStatus, PredictionRow

__all__ = ["STATUSES", "Judgement", "judge_rows"]

logger = logging.getLogger(__name__)

STATUSES: tuple[JudgeStatus, ...] = get_args(JudgeStatus)

# After so many consecutive prompts without a reply the server counts as gone: the other prompts would fail too.
_MOST_FAILURES = 10


@dataclass(frozen=True)
class Judgement:
    """What became of one row.

    Attributes:
        score: None where there is none.
        status: scored, unparsed (no score in the reply), failed (no reply), empty (nothing was predicted: 0 without asking),
            without_reference (can't be judged).
        reply: the judge's text.
    """

    score: float | None
    status: JudgeStatus
    reply: str | None = None


def judge_rows(
    rows: Sequence[PredictionRow],
    judge: Judge,
    *,
    ranges: int = 3,
    replies: str | os.PathLike[str] | None = None,
) -> list[Judgement]:
    """Return a judgement for each row of a predictions file, in the same order; equal prompts are asked once.

    Args:
        rows: rows of a predictions file.
        judge: replies to the prompts.
        ranges: see `build_messages`.
        replies: JSONL file of replies; it is read first, and every new reply is appended at once. None = replies are not
            kept.

    Raises:
        JudgeError: the judge can't be used or stopped replying; its replies until then are in `replies`.
    """
    prompts: dict[int, tuple[str, Messages]] = {}
    judgements: dict[int, Judgement] = {}
    for number, row in enumerate(rows):
        if not str(row.get("reference") or "").strip():
            judgements[number] = Judgement(None, "without_reference")
        elif not str(row.get("prediction") or "").strip():
            judgements[number] = Judgement(0.0, "empty")
        else:
            messages = build_messages(row, ranges)
            prompts[number] = _key(judge, messages), messages
    known = _ask(judge, dict(prompts.values()), Path(replies) if replies is not None else None)
    for number, (key, _) in prompts.items():
        judgements[number] = _judgement(known.get(key), HIGHEST[rows[number]["task"]])
    return [judgements[number] for number in range(len(rows))]


def _judgement(reply: str | None, highest: float) -> Judgement:
    if reply is None:
        return Judgement(None, "failed")
    score = parse_score(reply, highest)
    return Judgement(score, "unparsed" if score is None else "scored", reply)


def _key(judge: Judge, messages: Messages) -> str:
    content = json.dumps([PROMPT_VERSION, dict(judge.identity), messages], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _ask(judge: Judge, prompts: Mapping[str, Messages], path: Path | None) -> dict[str, str]:
    """Return the replies by key: those in the file, and new ones to the other prompts."""
    known = {row["key"]: row["reply"] for row in read_complete_lines(path) if "key" in row} if path else {}
    missing = {key: messages for key, messages in prompts.items() if key not in known}
    if not missing:
        return known
    with ExitStack() as stack:
        file = stack.enter_context(_open_replies(path)) if path else None
        pool = ThreadPoolExecutor(judge.workers, thread_name_prefix="judge")
        stack.callback(pool.shutdown, cancel_futures=True)
        futures: dict[Future[str], str] = {pool.submit(judge, messages): key for key, messages in missing.items()}
        failures = 0  # consecutive ones
        for future in tqdm(as_completed(futures), total=len(futures), desc="judge", unit="reply"):
            key = futures[future]
            try:
                known[key] = future.result()
            except ReplyError as error:
                logger.warning("%s", error)
                failures += 1
                if failures == _MOST_FAILURES:
                    raise JudgeError(
                        f"{failures} prompts in a row got no reply; the last: {error} Earlier replies are kept: run again."
                    ) from error
                continue
            failures = 0
            if file:
                file.write(json_line({"key": key, "version": PROMPT_VERSION, "reply": known[key]}))
                file.flush()
    return known


def _open_replies(path: Path) -> IO[str]:
    """Open the file of replies for appending; a last line that a kill truncated is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.is_file() else b""
    file = path.open("a", encoding="utf-8")
    if content and not content.endswith(b"\n"):
        file.write("\n")
    return file
