"""Benchmarks of scoring: a predictions file of CT-RATE's validation part's size against the library rouge-score by itself.

Both run as commands in turns. METEOR needs WordNet, where nltk finds it; without it, scoring is timed without METEOR.
"""

import json
import os
import subprocess
import sys

from tqdm import tqdm

from samf.benchmarks.data_lines import find_templates
from samf.benchmarks.measuring import Measurement
from samf.benchmarks.process_memory import run_measured
from samf.benchmarks.scoring_rows import COUNT, count_distinct, write_rows
from samf.benchmarks.workloads import Settings
from samf.utils.files import atomic_write

MOST_SECONDS, MOST_MEMORY = 20.0, 800.0  # s; MB
_ROUNDS, _FILE = 5, "predictions.jsonl"
_LEAST_GAIN = 3.0  # scoring in a third of rouge-score's time
_ROUGE = """
import json, sys
from rouge_score.rouge_scorer import RougeScorer
scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    scorer.score(row["reference"], row["prediction"])
"""


def write_predictions(settings: Settings) -> list[Measurement]:
    """Write the predictions to the stage's folder; report how many texts, sentences and words are distinct."""
    reports = [text for text, _ in find_templates().reports]
    rows = write_rows(reports, COUNT if settings.size == "full" else 40)
    atomic_write(settings.folder / _FILE, "".join(f"{json.dumps(row)}\n" for row in rows))
    counts = count_distinct([text for row in rows for text in (row["reference"], row["prediction"])])
    return [Measurement(name, "", [count]) for name, count in counts.items()]


def time_scoring(settings: Settings) -> list[Measurement]:
    """Time `samf.evaluation.scoring` and rouge-score's three scores in turns, each as a command in a process of its own."""
    path = settings.folder / _FILE
    commands = {
        "scoring": [
            sys.executable,
            "-m",
            "samf.evaluation.scoring",
            str(path),
            "--output",
            str(path.with_name("r.json")),
        ],
        "rouge-score": [sys.executable, "-c", _ROUGE, str(path)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[float]] = {name: [] for name in commands}
    for number in tqdm(range(_ROUNDS if settings.size == "full" else 1), desc="scoring", leave=False):
        for name in list(commands) if number % 2 == 0 else reversed(list(commands)):
            spent, peak = _run(commands[name])
            seconds[name].append(spent)
            memory[name].append(peak)
    gains = [slow / fast for slow, fast in zip(seconds["rouge-score"], seconds["scoring"], strict=True)]
    return [
        Measurement("scoring", "s", seconds["scoring"], at_most=settings.limit(MOST_SECONDS)),
        Measurement("scoring, memory of its processes", "MB", memory["scoring"], at_most=settings.limit(MOST_MEMORY)),
        Measurement("rouge-score", "s", seconds["rouge-score"], note="one core, ROUGE-1, -2 and -L only"),
        Measurement("rouge-score / scoring", "x", gains, at_least=settings.limit(_LEAST_GAIN)),
    ]


def _run(command: list[str]) -> tuple[float, float]:
    """Return the seconds of a command and the peak memory of its processes in MB; what they share counts once.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    done = run_measured(command, {**os.environ, "OMP_NUM_THREADS": "1"})
    if done.status:
        raise subprocess.CalledProcessError(done.status, command, stderr=done.messages)
    return done.seconds, done.memory / 1e6
