"""Score predictions with a language model as judge: 0 to 10, multiple choice 0 to 1 (the paper's "Llama score").

    python -m samf.evaluation.judge runs/ao2d/eval/predictions.jsonl --endpoint http://localhost:8000/v1 \\
        --model meta-llama/Llama-3.3-70B-Instruct
    python -m samf.evaluation.judge predictions.jsonl --local /models/Llama-3.1-8B-Instruct

`--endpoint` is any OpenAI-compatible server (vLLM, TGI, Ollama, …); `--local` a transformers model. Every reply is kept in
`judge.replies.jsonl` under a hash of the prompt and the model: an interrupted run resumes, and scoring again asks nothing
again. Scores of different PROMPT_VERSIONs, `--ranges` or judges can't be compared.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from samf.data.schema import JsonObject, Task
from samf.evaluation.judging.base import Judge, JudgeError, ReplyError
from samf.evaluation.judging.endpoint import EndpointJudge
from samf.evaluation.judging.judgements import STATUSES, Judgement, judge_rows
from samf.evaluation.judging.local import LocalJudge
from samf.evaluation.judging.prompts import HIGHEST, PROMPT_VERSION, RANGES, is_shortened
from samf.evaluation.metrics.bootstrap import patient_intervals
from samf.evaluation.metrics.sampled_metric import SampledMetric, patient_keys
from samf.evaluation.metrics.significance import paired_randomisation
from samf.evaluation.prediction_rows import first_of_each_task, read_predictions
from samf.evaluation.schema import Difference, JudgedAnswer, JudgeResults, JudgeTaskScores, PredictionRow
from samf.utils.files import write_json

__all__ = [
    "REPLIES",
    "Judge",
    "JudgeError",
    "ReplyError",
    "build_judge",
    "compare_judged",
    "judge_predictions",
    "judge_rows",
    "judge_table",
    "judged_rows",
]

logger = logging.getLogger(__name__)

REPLIES = "judge.replies.jsonl"


class _TasksAndScores(TypedDict):
    tasks: dict[str, JudgeTaskScores]
    scores: list[JudgedAnswer]


def judge_predictions(
    rows: Sequence[PredictionRow],
    judge: Judge,
    *,
    ranges: int = 3,
    replies: str | os.PathLike[str] | None = None,
) -> JudgeResults:
    """Judge rows of a predictions file, and return the scores with their means and intervals.

    The mean of a task is over scored and empty rows (an empty prediction is 0); `lowest_mean` also counts unparsed and
    failed ones as 0; `interval` is the mean's 95 % interval over patients.

    Args:
        rows: rows of a predictions file.
        judge: see `judge_rows`.
        ranges: see `build_messages`.
        replies: see `judge_rows`.

    Raises:
        JudgeError: see `judge_rows`.
    """
    scored = _tasks_and_scores(rows, judge_rows(rows, judge, ranges=ranges, replies=replies))
    return {
        "prompt_version": PROMPT_VERSION,
        "judge": judge.identity,
        "ranges": ranges,
        "tasks": scored["tasks"],
        "scores": scored["scores"],
    }


def _tasks_and_scores(rows: Sequence[PredictionRow], judgements: Sequence[Judgement]) -> _TasksAndScores:
    tasks: dict[str, JudgeTaskScores] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [number for number, row in enumerate(rows) if row["task"] == task]
        tasks[task] = _task_scores(task, [rows[n] for n in chosen], [judgements[n] for n in chosen])
    scores: list[JudgedAnswer] = [
        {
            "id": row.get("id"),
            "task": row["task"],
            "score": judgement.score,
            "status": judgement.status,
            "texts": _texts_digest(row),
        }
        for row, judgement in zip(rows, judgements, strict=True)
    ]
    return {"tasks": tasks, "scores": scores}


def _texts_digest(row: PredictionRow) -> str:
    return hashlib.sha256(json.dumps([row["reference"], row["prediction"]]).encode()).hexdigest()[:12]


def _task_scores(task: Task, rows: Sequence[PredictionRow], judgements: Sequence[Judgement]) -> JudgeTaskScores:
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    keys = zip(patient_keys(rows), judgements, strict=True)
    patients = [key for key, judgement in keys if judgement.score is not None]
    judged = sum(judgement.status != "without_reference" for judgement in judgements)
    metric = {"mean": SampledMetric.mean(scores, (0.0, HIGHEST[task]))}
    statuses = Counter(judgement.status for judgement in judgements)
    return {
        "count": len(rows),
        "patients": len(set(patients)),
        "mean": sum(scores) / len(scores) if scores else None,
        "interval": patient_intervals(metric, patients)["mean"] if scores else None,
        "lowest_mean": sum(scores) / judged if judged else None,
        "highest": HIGHEST[task],
        "scored": statuses["scored"],
        "unparsed": statuses["unparsed"],
        "failed": statuses["failed"],
        "empty": statuses["empty"],
        "without_reference": statuses["without_reference"],
        "shortened": sum(is_shortened(row["prediction"]) or is_shortened(row["reference"]) for row in rows),
    }


# --- Scores of an earlier run -----------------------------------------------------------------------------------


def judged_rows(judged: JudgeResults, rows: Sequence[PredictionRow]) -> JudgeResults | None:
    """Return what a judge.json says of these rows, with means and intervals computed again; None if it says nothing.

    A score belongs to a row of the same task and id whose texts are those that were judged; without a hash of the texts,
    task and id decide. Each task has `of`, the number of its rows with a reference; `foreign` counts the scores of other
    rows.

    Raises:
        ValueError: `judged` is not as `judge_predictions` returns it.
    """
    _check_judged(judged)
    by_row = {
        (s["task"], str(s.get("id")), s.get("texts")): Judgement(s["score"], s["status"]) for s in judged["scores"]
    }
    found: dict[int, Judgement] = {}
    used = set()
    for number, row in enumerate(rows):
        name = row["task"], str(row.get("id"))
        key = next((key for key in ((*name, _texts_digest(row)), (*name, None)) if key in by_row), None)
        if key is not None:
            found[number] = by_row[key]
            used.add(key)
    if not found:
        return None
    again = _tasks_and_scores([rows[number] for number in found], list(found.values()))
    for task, scores in again["tasks"].items():
        scores["of"] = sum(row["task"] == task and bool(row["reference"].strip()) for row in rows)
    return {**judged, **again, "foreign": len(by_row) - len(used)}


def _check_judged(judged: Mapping[str, Any] | JudgeResults) -> None:
    """Raise ValueError for what is not a judge.json."""
    lacking = [name for name in ("prompt_version", "judge", "ranges", "scores") if name not in judged]
    if lacking or not isinstance(judged["judge"], Mapping) or not isinstance(judged["scores"], list):
        raise ValueError(f"not a judge.json: it lacks {', '.join(lacking) or 'a judge and a list of scores'}.")
    for number, score in enumerate(judged["scores"]):
        if not isinstance(score, Mapping) or score.get("task") not in HIGHEST or score.get("status") not in STATUSES:
            raise ValueError(f"score {number} has no known task and status.")
        value, highest = score.get("score"), HIGHEST[score["task"]]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value <= highest):
            raise ValueError(f"score {number} is no number from 0 to {highest:g}.")


def compare_judged(
    first: JudgeResults,
    second: JudgeResults,
    rows: Sequence[PredictionRow],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Difference]]:
    """Compare the judge's scores of two systems by paired randomisation, on the rows that it scored in both.

    Args:
        first: what `judge_predictions` returned for the first system.
        second: what it returned for the second one.
        rows: rows of either predictions file, for the patients.
        permutations: of the test.
        seed: of the test.

    Returns:
        Task → {"judge.judge_score": difference}; empty where judge, prompt or ranges were not the same.
    """
    if any(first[name] != second[name] for name in ("judge", "prompt_version", "ranges")):
        logger.warning("The two systems were judged differently; their judge's scores are not compared.")
        return {}
    patients = {(row["task"], row.get("id")): key for row, key in zip(rows, patient_keys(rows), strict=True)}
    scores = [
        {(s["task"], s["id"]): s["score"] for s in judged["scores"] if s["score"] is not None and s["id"] is not None}
        for judged in (first, second)
    ]
    common = [key for key in scores[0] if key in scores[1] and key in patients]
    compared: dict[str, dict[str, Difference]] = {}
    for task in dict.fromkeys(task for task, _ in common):
        keys = [key for key in common if key[0] == task]
        bounds = (0.0, HIGHEST[task])
        a, b = ({"judge.judge_score": SampledMetric.mean([system[key] for key in keys], bounds)} for system in scores)
        compared[task] = paired_randomisation(a, b, [patients[k] for k in keys], resamples=permutations, seed=seed)
    return compared


# --- Command line -----------------------------------------------------------------------------------------------


def build_judge(
    *, endpoint: str | None = None, model: str | None = None, local: str | None = None, workers: int = 8, **options: Any
) -> Judge:
    """Return an EndpointJudge or a LocalJudge.

    Args:
        endpoint: see `EndpointJudge`.
        model: the model's name at the endpoint.
        local: folder or Hub id of a transformers model, instead of an endpoint.
        workers: see `EndpointJudge`.
        options: other keyword arguments of the judge.

    Raises:
        ValueError: neither or both are named, or the endpoint comes without a model.
    """
    if (endpoint is None) == (local is None):
        raise ValueError("Name one judge: an endpoint with its model, or a local model.")
    if local is not None:
        return LocalJudge(local, **options)
    if endpoint is None or model is None:
        raise ValueError(f"Which model at {endpoint}? The endpoint needs a model's name.")
    return EndpointJudge(endpoint, model, workers=workers, **options)


def judge_table(results: JudgeResults) -> str:
    """Return the judge's means as Markdown lines."""
    lines = [f"- Judge, {task}: {_task_line(scores)}" for task, scores in results["tasks"].items()]
    if results.get("foreign"):
        lines.append(f"- {results['foreign']} scores of the judge are of other answers, and not included.")
    judge = results["judge"].get("model")
    lines.append(f"- Judge: {judge}, prompt version {results['prompt_version']}, {results['ranges']} ranges.")
    return "\n".join(lines) + "\n"


def _task_line(scores: JudgeTaskScores) -> str:
    if scores["mean"] is None:
        mean = "no score"
    else:
        interval = f"{scores['interval'][0]:.2f} to {scores['interval'][1]:.2f}; " if scores["interval"] else ""
        mean = f"{scores['mean']:.3f} ({interval}n {scores['patients']}) of {scores['highest']:g}"
    counts = ", ".join(f"{scores[status]} {status.replace('_', ' ')}" for status in STATUSES if scores[status])
    all_answers = scores.get("of", scores["count"])
    part = f"; {scores['count']} of {all_answers} answers judged" if all_answers > scores["count"] else ""
    return f"{mean} ({counts}{part})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("predictions", type=Path, help="predictions.jsonl")
    parser.add_argument("--output", type=Path, help="scores as JSON; default: judge.json next to the predictions")
    parser.add_argument("--endpoint", help="base address of an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--model", help="the model's name at the endpoint")
    parser.add_argument("--local", help="folder or Hub id of a transformers model, instead of an endpoint")
    parser.add_argument("--tasks", nargs="+", default=["report", "multiple_choice"], choices=list(HIGHEST))
    parser.add_argument("--ranges", type=int, default=3, choices=sorted(RANGES), help="3 as in the paper, or 5")
    parser.add_argument("--limit", type=int, help="judge only the first so many rows of each task")
    parser.add_argument("--workers", type=int, default=8, help="concurrent prompts")
    parser.add_argument("--max_tokens", type=int, default=64, help="limit of a reply; more for reasoning models")
    parser.add_argument("--api_key_variable", default="OPENAI_API_KEY", help="environment variable with the key")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Judge a predictions file, write judge.json and print the means."""
    args = _parser().parse_args(argv)
    output = args.output or args.predictions.with_name("judge.json")
    options: JsonObject = {"max_tokens": args.max_tokens}
    if args.local is None:
        options["api_key_variable"] = args.api_key_variable
    try:
        rows = _choose(read_predictions(args.predictions), args.tasks, args.limit)
        judge = build_judge(endpoint=args.endpoint, model=args.model, local=args.local, workers=args.workers, **options)
        results = judge_predictions(rows, judge, ranges=args.ranges, replies=output.with_name(REPLIES))
    except (ValueError, OSError, JudgeError) as error:
        sys.exit(f"judge: {error}")
    write_json(output, results)
    sys.stdout.write(f"{judge_table(results)}\nWritten to {output}\n")


def _choose(rows: Sequence[PredictionRow], tasks: Sequence[str], limit: int | None) -> list[PredictionRow]:
    chosen = [row for row in rows if row["task"] in tasks]
    if not chosen:
        raise ValueError(f"The predictions hold none of the tasks {', '.join(tasks)}.")
    return chosen if limit is None else first_of_each_task(chosen, limit)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
