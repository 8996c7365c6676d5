"""What training and evaluation recorded in a run's folder, for its card: nothing else is said there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from samf.evaluation.report.model_index import IndexEntry, model_index
from samf.evaluation.report.systems import System
from samf.evaluation.schema import Results
from samf.model.model_card import hub_id, public_name
from samf.sharing.saved_models import SavedModel
from samf.training.repository import RUN_RECORD

_STATE, _RESULTS, _CALIBRATION, _DIAGRAM = "trainer_state.json", "results.json", "calibration.json", "calibration.png"
_MARGIN_SECONDS = 1.0  # of file systems' clocks
# Keys of the run's record → rows of the card, in their order.
_ROWS = {
    "recipes": "Recipe",
    "learning_rate": "Learning rate",
    "lr_scheduler_type": "Schedule",
    "num_train_epochs": "Epochs asked for",
    "seed": "Seed",
    "bf16": "bfloat16",
    "lora_rank": "LoRA rank",
    "train_records": "Training records",
    "valid_records": "Validation records",
}


@dataclass(frozen=True)
class Evaluation:
    """A results.json of this model."""

    name: str
    results: Results

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was answered: model, data, split and whether the volumes were shuffled."""
        return cast(Mapping[str, Any], self.results.get("model") or {})

    @property
    def data(self) -> str:
        """Name of the data set, without its folder."""
        return public_name(str(self.settings.get("data", "unnamed")))

    @property
    def is_control(self) -> bool:
        """Whether every question had another patient's volume."""
        return bool(self.settings.get("shuffle_volumes"))

    def index(self) -> list[IndexEntry]:
        """Return the scores as the metadata of a card holds them."""
        source = str(self.settings.get("data", ""))
        dataset = {"dataset": hub_id(source) or self.data, "dataset_name": self.data}
        return model_index(
            System(self.name, [], self.results), split=str(self.settings.get("split", "valid")), **dataset
        )


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder records.

    Attributes:
        training: rows of the card's table.
        log: entries of trainer_state.json's log.
        data: name of the training data; None = not recorded.
        evaluations: those of these weights.
        calibration: content of calibration.json; None = the findings weren't calibrated.
        diagram: its reliability diagram.
        notes: what was found but not used, and why.
    """

    training: Mapping[str, str] = field(default_factory=dict)
    log: Sequence[Mapping[str, float]] = ()
    data: str | None = None
    evaluations: Sequence[Evaluation] = ()
    calibration: Mapping[str, Any] | None = None
    diagram: Path | None = None
    notes: Sequence[str] = ()


def read_facts(saved: SavedModel) -> RunFacts:
    """Return what the folder of a model records about its training, evaluations and calibration."""
    folder, notes = saved.folder, list[str]()
    state, record = _read(folder / _STATE, notes), _read(folder / RUN_RECORD, notes)
    calibration = _read(folder / _CALIBRATION, notes)
    evaluations = list(_evaluations(saved, notes))
    diagram = folder / _DIAGRAM
    log = [row for row in state.get("log_history", []) if isinstance(row, dict)]
    return RunFacts(
        training=_training_rows(state, record, log),
        log=log,
        data=record.get("data"),
        evaluations=evaluations,
        calibration=calibration or None,
        diagram=diagram if calibration and diagram.is_file() else None,
        notes=notes,
    )


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} can't be read ({error}) and isn't used")
        return {}
    return content if isinstance(content, dict) else {}


def _training_rows(
    state: Mapping[str, Any], record: Mapping[str, Any], log: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    rows: dict[str, str] = {}
    if state.get("global_step"):
        rows["Steps"] = f"{state['global_step']}"
        if state.get("epoch"):
            rows["Steps"] += f" ({state['epoch']:.3g} epochs)"
    shape = state.get("stateful_callbacks", {}).get("RunShape", {})
    shape = shape.get("args", {}) if isinstance(shape, dict) else {}
    if shape.get("records_per_step"):
        rows["Records per step"] = f"{shape['records_per_step']} on {shape.get('processes', 1)} processes"
    rows |= {name: _text(record[key]) for key, name in _ROWS.items() if record.get(key) not in (None, [], "")}
    losses = [row["loss"] for row in log if "loss" in row]
    if losses:
        rows["Last training loss"] = f"{losses[-1]:.4g}"
    versions = record.get("versions") or {}
    if versions:
        rows["Software"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return rows


def _text(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _evaluations(saved: SavedModel, notes: list[str]) -> Iterator[Evaluation]:
    """Yield the evaluations in a run's folder that are of the weights there now."""
    written = max(path.stat().st_mtime for path in saved.weights)
    for path in sorted({*saved.folder.glob(f"*/{_RESULTS}"), *saved.folder.glob(f"*/*/{_RESULTS}")}):
        name = path.parent.relative_to(saved.folder).as_posix()
        results = _read(path, notes)
        if not results.get("tasks") or name.endswith("rotated"):
            continue
        model = str((results.get("model") or {}).get("model", ""))
        if Path(model).name != saved.folder.resolve().name:
            notes.append(f"{name}/{_RESULTS} is of another model and isn't used")
        elif path.stat().st_mtime + _MARGIN_SECONDS < written:
            notes.append(f"{name}/{_RESULTS} is older than the weights and isn't used; evaluate again")
        else:
            yield Evaluation(name, cast(Results, results))
