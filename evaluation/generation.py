"""Answers for a list of records: batched, resumable line by line, and with every failure listed.

`evaluate` makes predictions.jsonl with a model and scores it; eval.py and the demo both call it.
"""

import hashlib
import json
import logging
import os
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from samf.ct_volume import read_ct
from samf.data.collator import SamfCollator
from samf.data.ct_rate import patient_of
from samf.data.prompts import record_prompt
from samf.evaluation.scoring import score_predictions, write_atomic, write_results

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Collator = Callable[[Sequence[Record]], Mapping[str, torch.Tensor]]

PREDICTIONS = "predictions.jsonl"
SETTINGS = "predictions.settings.json"
FAILURES = "failures.jsonl"
RESULTS = "results.json"

# What a bad file raises while a batch is put together; anything else is a fault of the program and always stops it.
RECORD_ERRORS = (OSError, ValueError)
# What goes to the model in its own dtype; positions and masks keep theirs.
FLOAT_INPUTS = ("pixel_values", "slice_embeddings")


class ResumeError(ValueError):
    """An output folder whose predictions were made with other settings."""


# --- shuffled volumes -------------------------------------------------------------------------------------------


# What belongs to a volume and moves with it.
VOLUME_FIELDS = ("volume", "rescale")


def shuffle_volumes(records: Sequence[Record] | datasets.Dataset, seed: int = 0) -> Sequence[Record] | datasets.Dataset:
    """The same questions, each with another patient's volume: what a model still answers then, it didn't see.

    A derangement over patients, deterministic by `seed`: patient p's k-th volume becomes the k-th (modulo their number)
    of another patient, the same one for all of p. Records without a volume stay as they are. Gives a Dataset for a
    Dataset, else a list of new dicts. Raises ValueError when fewer than two patients have volumes.
    """
    volumes: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record["volume"] is not None:
            volumes[_patient(record)].setdefault(record["volume"], record)
    if len(volumes) < 2:
        raise ValueError(f"Shuffling volumes needs at least two patients; the records' volumes are of {len(volumes)}.")
    patients = sorted(volumes)
    random.Random(seed).shuffle(patients)
    replacement: dict[str, Record] = {}
    for patient, donor in zip(patients, patients[1:] + patients[:1], strict=True):
        others = list(volumes[donor].values())
        replacement |= {volume: others[k % len(others)] for k, volume in enumerate(volumes[patient])}
    moved = [
        {name: replacement.get(record["volume"], record)[name] for name in VOLUME_FIELDS if name in record}
        for record in records
    ]
    if isinstance(records, datasets.Dataset):
        for name in moved[0]:
            column = [fields[name] for fields in moved]
            feature = records.features[name]
            records = records.remove_columns(name).add_column(name, column, feature=feature)
        return records
    return [{**record, **fields} for record, fields in zip(records, moved, strict=True)]


def _patient(record: Record) -> str:
    """By CT-RATE's file name; a volume that bears none is taken as its scan's."""
    patient = patient_of(record["volume"])
    return record["scan_id"] if patient == record["volume"] else patient


# --- generation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated. Greedy unless `do_sample`."""

    batch_size: int = 8
    max_new_tokens: int = 512
    num_beams: int = 1
    do_sample: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    def generate_arguments(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": self.do_sample}


@dataclass
class GenerationSummary:
    """What a run did: answers written now and found from before, failures, and seconds spent on generating."""

    written: int = 0
    resumed: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)


class VolumeMemo:
    """The last few volumes' slices in memory: the questions about one volume follow each other and read it once."""

    def __init__(self, image_processor: Any, capacity: int = 2):
        self.image_processor = image_processor
        self.capacity = capacity
        self._slices: OrderedDict[tuple, Mapping[str, Any]] = OrderedDict()

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> Mapping[str, Any]:
        """What `image_processor.extract` gives for the volume; `rescale` as for `read_ct`."""
        key = (path, tuple(rescale or ()))
        if key not in self._slices:
            self._slices[key] = self.image_processor.extract(read_ct(path, rescale=rescale))
        self._slices.move_to_end(key)
        while len(self._slices) > self.capacity:
            self._slices.popitem(last=False)
        return self._slices[key]


def generate_predictions(
    model: nn.Module,
    processor: Any,
    records: Sequence[Record],
    output_dir: str | os.PathLike,
    settings: GenerationSettings | None = None,
    *,
    collator: Collator | None = None,
    slice_cache: Any = None,
    on_error: str = "stop",
    described_by: Mapping[str, Any] | None = None,
) -> GenerationSummary:
    """Answer every record and append it to `output_dir`/predictions.jsonl; ids that the file holds are skipped.

    Batches depend on the records and the batch size alone, never on what is answered already: a run that was cut off
    and resumed gives the file of an unbroken one.

    Args:
        model: has `generate`; used on its own device and dtype, in evaluation mode, and left in the mode it came in.
        processor: its `batch_decode` writes the answers out.
        collator: records → left-padded tensors for `model.generate`; default: `SamfCollator(…, generation=True)`.
        slice_cache: prepared volumes for the default collator; default: the last few volumes are kept in memory.
        on_error: "stop" raises what a record's volume raised; "skip" logs it, lists it in failures.jsonl and goes on.
            A failed record is never replaced by another, and is tried again when the run is resumed.
        described_by: what else the predictions depend on (model, data, …); the file is tied to it, to the generation
            settings, to the records and to the model's weights.

    Raises ValueError for repeated ids or an unknown `on_error`, ResumeError for a folder with other settings.
    """
    settings = settings or GenerationSettings()
    described_by = {"weights": _weights_digest(model), **(described_by or {})}
    answered = _open_output(Path(output_dir), records, settings, described_by)
    if collator is None:
        if slice_cache is None:
            slice_cache = VolumeMemo(processor.image_processor, capacity=settings.batch_size + 1)
        collator = SamfCollator(processor, generation=True, slice_cache=slice_cache)
    answerer = _Answerer(model, processor, collator, settings, on_error)
    summary = GenerationSummary(resumed=sum(record["id"] in answered for record in records))
    was_training, started = model.training, time.perf_counter()
    model.eval()
    try:
        _append_answers(answerer, records, answered, Path(output_dir) / PREDICTIONS, summary)
    finally:
        model.train(was_training)
        summary.failures = answerer.failures
        summary.seconds = time.perf_counter() - started
        write_atomic(Path(output_dir) / FAILURES, "".join(map(_json_line, answerer.failures)))
    return summary


def _append_answers(
    answerer: "_Answerer", records: Sequence[Record], answered: set[str], path: Path, summary: GenerationSummary
) -> None:
    settings = answerer.settings
    progress = tqdm(total=len(records), initial=summary.resumed, desc="answers", unit="record")
    with progress, path.open("a", encoding="utf-8") as predictions:
        for number, batch in enumerate(make_batches(records, settings.batch_size)):
            missing = {record["id"] for record in batch} - answered
            if not missing:
                continue
            if settings.do_sample:
                set_seed(settings.seed + number)
            rows = [row for row in answerer(batch) if row["id"] in missing]
            predictions.write("".join(map(_json_line, rows)))
            predictions.flush()
            summary.written += len(rows)
            summary.new_tokens += sum(row["tokens"] for row in rows)
            progress.update(len(missing))


def make_batches(records: Sequence[Record], batch_size: int) -> list[list[Record]]:
    """Batches of one task each, with the questions about one volume side by side, short ones first."""

    def order(record: Record) -> tuple:
        return record["task"], record["volume"] or "", len(record_prompt(record)), record["id"]

    batches = []
    for _, group in groupby(sorted(records, key=order), key=lambda record: record["task"]):
        group = list(group)
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


class _Answerer:
    """One batch of records → rows of predictions.jsonl; collects the records that could not be read."""

    def __init__(
        self, model: nn.Module, processor: Any, collator: Collator, settings: GenerationSettings, on_error: str
    ):
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is {on_error!r}; expected 'stop' or 'skip'.")
        self.model = model
        self.processor = processor
        self.collator = collator
        self.settings = settings
        self.on_error = on_error
        self.failures: list[dict[str, Any]] = []
        stops = model.generation_config.eos_token_id
        self.stops = set(stops) if isinstance(stops, list | tuple) else {stops}

    def __call__(self, batch: list[Record]) -> list[dict[str, Any]]:
        try:
            inputs = self.collator(batch)
        except RECORD_ERRORS as error:
            readable = [record for record in batch if self._is_readable(record)]
            if len(readable) == len(batch):
                raise  # No record fails alone: it is the batch that can't be made.
            logger.debug("Batch taken apart after: %s", error)
            batch, inputs = readable, self.collator(readable) if readable else {}
        return self._generate(batch, inputs) if batch else []

    def _is_readable(self, record: Record) -> bool:
        try:
            self.collator([record])
        except RECORD_ERRORS as error:
            if self.on_error == "stop":
                error.add_note(
                    f"Record {record['id']}, volume {record['volume']}. --on_error skip lists it and goes on."
                )
                raise
            logger.warning("Record %s is skipped: %s", record["id"], error)
            failure = {name: record[name] for name in ("id", "scan_id", "task", "volume")}
            self.failures.append({**failure, "error": f"{type(error).__name__}: {error}"})
            return False
        return True

    def _generate(self, batch: list[Record], inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        inputs = {name: self._to_model(name, value) for name, value in inputs.items()}
        with torch.no_grad():
            sequences = self.model.generate(**inputs, **self.settings.generate_arguments())  # (B, prompt + new)
        new = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [self._row(record, ids, text) for record, ids, text in zip(batch, new, texts, strict=True)]

    def _to_model(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if name in FLOAT_INPUTS else None)

    def _row(self, record: Record, ids: list[int], text: str) -> dict[str, Any]:
        end = next((position for position, token in enumerate(ids) if token in self.stops), None)
        return {
            **{name: record.get(name) for name in ("id", "scan_id", "task", "question", "choices")},
            "reference": record["answer"],
            "prediction": text.strip(),
            "tokens": len(ids) if end is None else end,
            "truncated": end is None and len(ids) >= self.settings.max_new_tokens,
        }


# --- the output folder ------------------------------------------------------------------------------------------


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _open_output(
    folder: Path, records: Sequence[Record], settings: GenerationSettings, described_by: Mapping[str, Any]
) -> set[str]:
    """Make the output folder, tie it to its settings, and give the ids that are answered there."""
    _check_ids(records)
    folder.mkdir(parents=True, exist_ok=True)
    # The batch size is no part of it: a run that ran out of memory may be resumed with smaller batches.
    tied = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    tied["records"] = _digest(records)
    _tie_to_settings(folder, {**tied, **described_by})
    return _answered_ids(folder / PREDICTIONS)


def _digest(records: Sequence[Record]) -> str:
    """How many records, and a hash of their ids and prompts."""
    prompts = sorted((record["id"], record_prompt(record)) for record in records)
    return f"{len(prompts)}, sha256 {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}"


def _weights_digest(model: nn.Module, values: int = 8) -> str:
    """A hash of the first values of every tensor: a model trained on is another, even in the same folder."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:values].double().cpu().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def _check_ids(records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record["id"] in seen:
            raise ValueError(f"The id {record['id']!r} occurs twice; predictions are told apart by their records' ids.")
        seen.add(record["id"])
    if not seen:
        raise ValueError("There are no records to answer; check the data source, the split and the tasks.")


def _tie_to_settings(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write what the predictions depend on beside them, or compare it with what is written there."""
    path = output_dir / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        if (output_dir / PREDICTIONS).is_file():
            raise ResumeError(f"{output_dir / PREDICTIONS} exists without {path.name}; choose another output folder.")
        write_atomic(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise ResumeError(
            f"{output_dir / PREDICTIONS} was made with other settings: {'; '.join(differing)}. "
            "Choose another output folder, or delete this one to start anew."
        )


def _answered_ids(path: Path) -> set[str]:
    """Ids in a predictions file; a last line that a kill cut off is removed from it."""
    if not path.is_file():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        logger.warning("%s: the last line is incomplete and is answered anew.", path)
        os.truncate(path, len(whole))
    return {json.loads(line)["id"] for line in whole.splitlines()}


# --- generate and score -----------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    processor: Any,
    records: Sequence[Record],
    output_dir: str | os.PathLike,
    settings: GenerationSettings | None = None,
    *,
    finding_names: Sequence[str] | None = None,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """Answer the records and score the answers.

    `output_dir` gets predictions.jsonl, failures.jsonl, results.json and results.md. `generation` goes to
    `generate_predictions`, the named arguments to `score_predictions`. Returns the latter's results with `generation`
    added: answers written and resumed, failures, seconds and new tokens. Raises what these two raise, and ValueError
    when every record failed.
    """
    summary = generate_predictions(model, processor, records, output_dir, settings, **generation)
    if not summary.written + summary.resumed:
        raise ValueError(f"None of {len(records)} records could be read; {Path(output_dir) / FAILURES} lists why.")
    results = score_predictions(
        Path(output_dir) / PREDICTIONS,
        finding_names=finding_names,
        bertscore_model=bertscore_model,
        bertscore_layers=bertscore_layers,
        device=str(model.device),
    )
    results["generation"] = {**asdict(summary), "failures": len(summary.failures)}
    write_results(results, Path(output_dir) / RESULTS)
    return results
