"""Lines that run commands: scoring, and the start of the package and of its command."""

import json
from pathlib import Path
from typing import Any

from samf.benchmarks.build_lines.plan import Inputs, Target, Workload
from samf.benchmarks.scoring_lines import MOST_MEMORY, MOST_SECONDS, write_predictions
from samf.evaluation.metrics.meteor import wordnet_available

# What `pip` installs as the command `samf`.
_LAUNCHER = """import sys

from samf.cli.main import app

sys.exit(app())
"""


def score(inputs: Inputs) -> list[Workload]:
    """Score predictions of CT-RATE's validation part's size."""
    write_predictions(inputs.settings())
    (predictions,) = inputs.folder.glob("*.jsonl")
    target = Target(seconds=MOST_SECONDS, gain=5.5, memory=MOST_MEMORY)
    name = f"scoring, {len(predictions.read_text(encoding='utf-8').splitlines()):,} predictions"
    command = ["-m", "samf.evaluation.scoring", str(predictions), "--output", "{out}/results.json"]
    return [
        Workload(
            name,
            command=command,
            rounds=3,
            threads=1,
            read_results=_scores,
            tolerance=1e-9,
            targets=inputs.targets({name: target}),
            note="with METEOR" if wordnet_available() else "without METEOR: nltk finds no WordNet",
        )
    ]


def _scores(out: Path) -> dict[str, Any]:
    """Return what results.json has besides versions and settings."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return {part: results[part] for part in ("counts", "cohort", "tasks", "statistics")}


def start(inputs: Inputs) -> list[Workload]:
    """Import the package above torch and transformers, and print the command's help."""
    launcher = inputs.folder / "samf"
    launcher.write_text(_LAUNCHER, encoding="utf-8")
    target, names = Target(seconds=0.3), ("samf --help", "samf report --help")
    return [
        Workload("import", program="import_samf", threads=1, targets=inputs.targets({"import samf": target})),
        *(
            Workload(
                name,
                command=[str(launcher), *name.split()[1:]],
                threads=1,
                targets=inputs.targets({name: target}),
                watches_memory=False,
            )
            for name in names
        ),
    ]
