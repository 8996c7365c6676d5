"""Answers for a list of records: batched, resumable line by line, over several processes, and with every failure listed.

`evaluate` makes predictions.jsonl with a model and scores it; eval.py and the demo both call it.

    python eval.py --model runs/ao2d --data /data/CT-RATE --output_dir runs/ao2d/eval
    torchrun --nproc_per_node 8 eval.py --model runs/ao2d --data /data/CT-RATE --output_dir runs/ao2d/eval

Both write the same file: a batch is made of the same records, and drawn with the same seed, whichever process answers it.
"""

import hashlib
import json
import logging
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from samf.cache.slice_cache import SliceCache
from samf.data.collator import SamfCollator
from samf.data.patients import patient_of_record
from samf.data.prompts import record_prompt
from samf.data.schema import FAILURES_FILE
from samf.evaluation.answering.answer_folder import (
    PREDICTIONS,
    SETTINGS,
    TIMES,
    AnswerFolder,
    answer_statistics,
    digest_of,
    read_lines,
    references_digest,
    volume_digest,
)
from samf.evaluation.answering.option_likelihood import OptionCollator, answer_log_likelihoods, option_texts
from samf.evaluation.answering.volume_readers import EncodedVolumes, ReadAhead, VolumeMemo
from samf.evaluation.scoring import score_predictions, write_results
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Collator = Callable[[Sequence[Record]], Mapping[str, torch.Tensor]]

RESULTS = "results.json"
MULTIPLE_CHOICE_WAYS = ("generate", "likelihood")

# What a bad file raises while a batch is put together; anything else is a fault of the program and always stops it.
RECORD_ERRORS = (OSError, ValueError)
# What goes to the model in its own dtype; positions and masks keep theirs.
FLOAT_INPUTS = ("pixel_values", "slice_embeddings")


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
            volumes[patient_of_record(record)].setdefault(record["volume"], record)
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


# --- generation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are made. Greedy unless `do_sample`.

    Attributes:
        batch_size: records answered at once.
        max_new_tokens: of one answer; an answer that reaches it without an end token counts as truncated.
        num_beams: 1 = no beam search.
        do_sample, temperature, top_p: draw tokens; the last two as in the library, None = the model's own.
        seed: of the drawing. Each batch has its own, so that a resumed run draws what an unbroken one does.
        mcq: "generate": multiple choice is answered in words, and the answer is parsed. "likelihood": the answer is the
            option whose text "(b) …" the model finds most likely.
    """

    batch_size: int = 8
    max_new_tokens: int = 512
    num_beams: int = 1
    do_sample: bool = False
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    mcq: str = "generate"

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mcq not in MULTIPLE_CHOICE_WAYS:
            raise ValueError(f"mcq is {self.mcq!r}; expected {' or '.join(MULTIPLE_CHOICE_WAYS)}.")
        if not self.do_sample and (self.temperature is not None or self.top_p is not None):
            raise ValueError("temperature and top_p have no meaning without do_sample.")

    def generate_arguments(self) -> dict[str, Any]:
        drawing = {"temperature": self.temperature, "top_p": self.top_p}
        chosen = {name: value for name, value in drawing.items() if value is not None}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.do_sample,
            **chosen,
        }


@dataclass
class GenerationSummary:
    """What a run did, over all its processes.

    Attributes:
        written, resumed: answers written now, and found from before. seconds: of this session, by the clock.
        new_tokens: in the answers written now. processes: how many answered.
        failures: what failures.jsonl holds. tasks: see `answer_statistics`.
    """

    written: int = 0
    resumed: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    processes: int = 1
    failures: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_results(self) -> dict[str, Any]:
        """For results.json: the failures as their number and their kinds."""
        kinds = Counter(failure["error"].split(":")[0] for failure in self.failures)
        return {**asdict(self), "failures": len(self.failures), "failure_kinds": dict(kinds)}


def generate_predictions(
    model: nn.Module,
    processor: Any,
    records: Sequence[Record],
    output_dir: str | os.PathLike,
    settings: GenerationSettings | None = None,
    *,
    collator: Collator | None = None,
    volume_store: Any = None,
    on_error: str = "stop",
    described_by: Mapping[str, Any] | None = None,
) -> GenerationSummary:
    """Answer every record: `output_dir`/predictions.jsonl, in the order of the records; ids that it holds are skipped.

    Batches depend on the records and the batch size alone, never on what is answered already or on the number of
    processes: a run that was cut off and resumed, or shared among several, gives the file of an unbroken one. Every
    process that torch.distributed knows must call this; each answers its share.

    Args:
        model: has `generate`; used on its own device and dtype, in evaluation mode, and left in the mode it came in.
        processor: its `batch_decode` writes the answers out.
        collator: records → left-padded tensors for `model.generate`; default: `SamfCollator(…, generation=True)` over
            volumes that are read ahead and encoded once. With settings.mcq="likelihood" it must be left out.
        volume_store: prepared volumes for the default collator; default: the last few volumes are kept in memory.
        on_error: "stop" raises what a record's volume raised; "skip" logs it, lists it in failures.jsonl and goes on.
            A failed record is never replaced by another, and is tried again when the run is resumed.
        described_by: what else the predictions depend on (model, data, …); the file is tied to it, to the generation
            settings, to the records with their references and volumes, to the model's weights and generation settings, and
            to the processor's settings with tokenizer and chat template.

    Raises ValueError for repeated or missing ids or an unknown `on_error`, ResumeError for a folder with other settings.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'stop' or 'skip'.")
    settings, started = settings or GenerationSettings(), time.perf_counter()
    processes = Processes()
    folder = AnswerFolder(output_dir, records, processes.rank)
    with processes.main_process_first():
        if processes.is_first:
            folder.prepare({**_tied(settings, model, processor, records), **(described_by or {})})
            folder.check_volumes(records)
    answered = folder.answered()
    volumes = None if collator else _Volumes(model, processor.image_processor, volume_store, settings.batch_size)
    collators = _collators(processor, collator, volumes, settings)
    answerer = _Answerer(model, processor, collators, settings, folder, on_error)
    was_training = model.training
    model.eval()
    try:
        _answer_share(answerer, volumes, make_batches(records, settings.batch_size), answered, processes)
    finally:
        model.train(was_training)
        folder.close()
        if volumes:
            volumes.close()
        if processes.count == 1:
            folder.merge()
    if processes.count > 1:
        processes.wait()
        with processes.main_process_first():
            if processes.is_first:
                folder.merge()
    return _summarise(folder, answered, time.perf_counter() - started, processes.count)


def _tied(settings: GenerationSettings, model: nn.Module, processor: Any, records: Sequence[Record]) -> dict[str, Any]:
    """What the predictions are tied to beside what the caller describes.

    The batch size is no part of it, since a run that ran out of memory may be resumed with smaller batches; but draws depend
    on what is in a batch.
    """
    chosen = {name: value for name, value in asdict(settings).items() if name != "batch_size" or settings.do_sample}
    return {**chosen, **describe_answering(model, processor), "references": references_digest(records)}


def _summarise(folder: AnswerFolder, answered: set[str], seconds: float, processes: int) -> GenerationSummary:
    rows = read_lines(folder.folder / PREDICTIONS)
    new = [row for row in rows if row["id"] not in answered]
    return GenerationSummary(
        written=len(new),
        resumed=len(rows) - len(new),
        seconds=seconds,
        new_tokens=sum(row["tokens"] for row in new),
        processes=processes,
        failures=read_lines(folder.folder / FAILURES_FILE),
        tasks=answer_statistics(rows, read_lines(folder.folder / TIMES)),
    )


class _Volumes:
    """The default source of volumes: read ahead in threads, encoded once each."""

    def __init__(self, model: nn.Module, image_processor: Any, volume_store: Any, batch_size: int):
        kept = 2 * batch_size + 1  # this batch's, the next one's, and one that reaches over
        store = VolumeMemo(image_processor, kept) if volume_store is None else volume_store
        # A store of another kind may use the model, which threads must not.
        self.ahead = ReadAhead(store) if isinstance(store, VolumeMemo | SliceCache) else None
        self.encoded = EncodedVolumes(model, image_processor, self.ahead or store, kept)

    def start(self, records: Sequence[Record]) -> None:
        if self.ahead:
            self.ahead.start(records)

    def close(self) -> None:
        if self.ahead:
            self.ahead.close()


def _collators(
    processor: Any, collator: Collator | None, volumes: _Volumes | None, settings: GenerationSettings
) -> dict[str, Any]:
    """For answers in words ("generate"), and for the likelihood of options where that is asked."""
    if volumes is None:
        if settings.mcq == "likelihood":
            raise ValueError("mcq='likelihood' needs training batches of its own; leave out `collator`.")
        return {"generate": collator}
    collators = {"generate": SamfCollator(processor, generation=True, volume_store=volumes.encoded)}
    if settings.mcq == "likelihood":
        collators["likelihood"] = OptionCollator(
            SamfCollator(processor, volume_store=volumes.encoded), settings.batch_size
        )
    return collators


def make_batches(records: Sequence[Record], batch_size: int) -> list[list[Record]]:
    """Batches of one task each, with the questions about one volume side by side, short ones first."""

    def order(record: Record) -> tuple:
        return record["task"], record["volume"] or "", len(record_prompt(record)), record["id"]

    batches = []
    for _, group in groupby(sorted(records, key=order), key=lambda record: record["task"]):
        group = list(group)
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


def share_batches(batches: Sequence[list[Record]], rank: int, count: int) -> list[int]:
    """Which batches a process answers: of each task one run of neighbours, so that it reads a volume once.

    Every batch is one process's; the runs differ by at most one batch.
    """
    mine = []
    for _, group in groupby(range(len(batches)), key=lambda number: batches[number][0]["task"]):
        numbers = list(group)
        mine += [number for place, number in enumerate(numbers) if place * count // len(numbers) == rank]
    return mine


def _answer_share(
    answerer: "_Answerer",
    volumes: _Volumes | None,
    batches: Sequence[list[Record]],
    answered: set[str],
    processes: Processes,
) -> None:
    share = share_batches(batches, processes.rank, processes.count)
    todo = [number for number in share if any(record["id"] not in answered for record in batches[number])]
    total = sum(len(batches[number]) for number in share)
    done = total - sum(record["id"] not in answered for number in todo for record in batches[number])
    before: set[tuple[str, str | None]] = set()
    with tqdm(total=total, initial=done, desc="answers", unit="record", disable=not processes.is_first) as progress:
        for number, following in zip_longest(todo, todo[1:]):
            batch = batches[number]
            named = {(record["task"], record["volume"]) for record in batch if record["volume"] is not None}
            if volumes:
                volumes.start([*batch, *(batches[following] if following is not None else [])])
            if answerer.settings.do_sample:
                set_seed(answerer.settings.seed + number)
            answerer(batch, answered, new_volumes=len(named - before))
            before = named
            progress.update(sum(record["id"] not in answered for record in batch))


class _Answerer:
    """One batch of records → lines of the predictions, the failures and the times."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        collators: Mapping[str, Any],
        settings: GenerationSettings,
        folder: AnswerFolder,
        on_error: str,
    ):
        self.model = model
        self.processor = processor
        self.collators = collators
        self.settings = settings
        self.folder = folder
        self.on_error = on_error
        self._digests: dict[tuple, str | None] = {}  # of the volumes that were answered from
        stops = model.generation_config.eos_token_id
        self.stops = set(stops) if isinstance(stops, list | tuple) else {stops}

    def __call__(self, batch: list[Record], answered: set[str], new_volumes: int) -> None:
        """Answer a batch whole, and write down what isn't answered; `new_volumes` were not in the batch before."""
        task, started = batch[0]["task"], time.perf_counter()
        way = "likelihood" if task == "multiple_choice" and "likelihood" in self.collators else "generate"
        batch, inputs = self._collate(batch, self.collators[way])
        if not batch:
            return
        read = time.perf_counter()
        rows = self._choose(batch, inputs) if way == "likelihood" else self._generate(batch, inputs)
        self.folder.append(PREDICTIONS, [row for row in rows if row["id"] not in answered])
        time_line = {
            "task": task,
            "answers": len(rows),
            "volumes": new_volumes,
            "tokens": sum(row["tokens"] for row in rows),
            "read_seconds": read - started,
            "generate_seconds": time.perf_counter() - read,
        }
        self.folder.append(TIMES, [time_line])

    def _collate(self, batch: list[Record], collator: Callable) -> tuple[list[Record], Any]:
        """The records that can be read, and the model's inputs for them."""
        try:
            return batch, collator(batch)
        except RECORD_ERRORS as error:
            readable = [record for record in batch if self._is_readable(record, collator)]
            if len(readable) == len(batch):
                raise  # No record fails alone: it is the batch that can't be made.
            logger.debug("Batch taken apart after: %s", error)
            return readable, collator(readable) if readable else {}

    def _is_readable(self, record: Record, collator: Callable) -> bool:
        try:
            collator([record])
        except RECORD_ERRORS as error:
            if self.on_error == "stop":
                error.add_note(
                    f"Record {record['id']}, volume {record['volume']}. --on_error skip lists it and goes on."
                )
                raise
            logger.warning("Record %s is skipped: %s", record["id"], error)
            failure = {name: record.get(name) for name in ("id", "scan_id", "task", "volume")}
            self.folder.append(FAILURES_FILE, [{**failure, "error": f"{type(error).__name__}: {error}"}])
            return False
        return True

    def _generate(self, batch: list[Record], inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        inputs = self._to_model(inputs)
        try:
            with torch.no_grad():
                sequences = self.model.generate(**inputs, **self.settings.generate_arguments())  # (B, prompt + new)
        except torch.OutOfMemoryError as error:
            error.add_note(f"With --batch_size below {self.settings.batch_size} the run goes on where it stopped.")
            raise
        new = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [self._written_row(record, ids, text) for record, ids, text in zip(batch, new, texts, strict=True)]

    def _choose(self, batch: list[Record], chunks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """By the likelihood of each option; of equal ones the first."""
        scored = [pair for chunk in chunks for pair in answer_log_likelihoods(self.model, self._to_model(chunk))]
        rows, start = [], 0
        for record in batch:
            texts = option_texts(record)
            sums, counts = zip(*scored[start : start + len(texts)], strict=True)
            start += len(texts)
            best = sums.index(max(sums))
            more = {"tokens": counts[best], "truncated": False}
            likelihoods = {"option_log_likelihoods": [round(x, 4) for x in sums], "option_tokens": list(counts)}
            rows.append({**self._row(record, texts[best]), **more, **likelihoods})
        return rows

    def _row(self, record: Record, prediction: str) -> dict[str, Any]:
        key = record["volume"], tuple(record.get("rescale") or ())
        if key not in self._digests:
            self._digests[key] = volume_digest(record)
        return _row(record, prediction, self._digests[key])

    def _to_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        def moved(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(self.model.device, self.model.dtype if name in FLOAT_INPUTS else None)

        return {name: moved(name, value) for name, value in inputs.items()}

    def _written_row(self, record: Record, ids: list[int], text: str) -> dict[str, Any]:
        end = next((position for position, token in enumerate(ids) if token in self.stops), None)
        return {
            **self._row(record, text.strip()),
            "tokens": len(ids) if end is None else end,
            "truncated": end is None and len(ids) >= self.settings.max_new_tokens,
        }


def _row(record: Record, prediction: str, digest: str | None) -> dict[str, Any]:
    """A line of predictions.jsonl; of the volume's path the last part alone, since the rest means nothing to others."""
    fields = {name: record.get(name) for name in ("id", "scan_id", "task", "question", "choices")}
    fields |= {"patient_id": record["patient_id"]} if record.get("patient_id") is not None else {}
    volume = None if record["volume"] is None else Path(record["volume"]).name
    return {
        **fields,
        "reference": record["answer"],
        "prediction": prediction,
        "volume": volume,
        "volume_digest": digest,
    }


def describe_answering(model: nn.Module, processor: Any) -> dict[str, Any]:
    """What shapes an answer beside the settings of `generate_predictions` and the records: model and processor."""
    return {
        "weights": _weights_digest(model),
        "config": _settings_of(getattr(model, "config", None)),
        "generation_config": _settings_of(getattr(model, "generation_config", None)),
        "processor": _processor_settings(processor),
    }


# What differs between two loads of the same settings: where they were loaded from, and by which version.
_NO_SETTINGS = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "auto_map", "processor_class")


def _settings_of(part: Any) -> dict[str, Any]:
    """What a configuration or image processor would save, without where it came from."""
    settings = part.to_dict() if hasattr(part, "to_dict") else getattr(part, "__dict__", {})
    return _plain_settings(settings)


def _plain_settings(value: Any) -> Any:
    """A value fit for JSON; of what isn't, its type."""
    if isinstance(value, Mapping):
        return {str(name): _plain_settings(v) for name, v in value.items() if name not in _NO_SETTINGS}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain_settings(item) for item in items]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value) if isinstance(value, torch.dtype | os.PathLike) else type(value).__name__


def _processor_settings(processor: Any) -> dict[str, Any]:
    """Of a processor: its own settings and its image processor's, its chat template, and a hash of its tokenizer."""
    tokenizer = getattr(processor, "tokenizer", None)
    parts = ("image_processor", "tokenizer", "chat_template")
    own = _settings_of(processor) if hasattr(processor, "to_dict") else {}
    return {
        "own": {name: value for name, value in own.items() if name not in parts},
        "image_processor": _settings_of(getattr(processor, "image_processor", None)),
        "chat_template": getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None),
        "tokenizer": None if tokenizer is None else _tokenizer_digest(tokenizer),
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])
    whole = json.loads(backend.to_str())  # of these two the last call decides
    return digest_of({name: value for name, value in whole.items() if name not in ("padding", "truncation")})


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _weights_digest(model: nn.Module, values: int = 8) -> str:
    """A hash of every tensor's first values and of the sum of its bits: a model trained on is another in the same folder.

    Integers add up to the same on any device and with any number of threads.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        flat = tensor.detach().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum_of_bits(flat)}".encode())
        digest.update(flat[:values].double().cpu().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def _sum_of_bits(flat: torch.Tensor) -> int:
    """Of a plain tensor; 0 for quantized ones of other libraries, whose bits are theirs to lay out."""
    plain = type(flat) is torch.Tensor and flat.element_size() in _INTEGERS
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)) if plain else 0


# --- generate and score -----------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    processor: Any,
    records: Sequence[Record],
    output_dir: str | os.PathLike,
    settings: GenerationSettings | None = None,
    *,
    finding_names: Sequence[str] | None = None,
    scoring: Mapping[str, Any] | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """Answer the records and score the answers.

    `output_dir` gets predictions.jsonl, failures.jsonl, times.jsonl, results.json and results.md. `generation` goes to
    `generate_predictions`, `finding_names` and what `scoring` holds to `score_predictions`. Returns the latter's results
    with `generation` (see `GenerationSummary`) and `model` (what the predictions are tied to) added. Of several processes
    the first one scores; the others get an empty dict. Raises what these two raise, and ValueError when every record failed.
    """
    summary = generate_predictions(model, processor, records, output_dir, settings, **generation)
    if not Processes().is_first:
        return {}
    if not summary.written + summary.resumed:
        raise ValueError(f"None of {len(records)} records could be read; {Path(output_dir) / FAILURES_FILE} lists why.")
    results = score_predictions(
        Path(output_dir) / PREDICTIONS,
        finding_names=finding_names,
        **{"device": str(model.device), **(scoring or {})},
    )
    results["generation"] = summary.as_results()
    results["model"] = _model_statement(json.loads((Path(output_dir) / SETTINGS).read_text(encoding="utf-8")))
    write_results(results, Path(output_dir) / RESULTS)
    return results


def _model_statement(tied: Mapping[str, Any]) -> dict[str, Any]:
    """What predictions are tied to, for results.json: what is long as its hash."""
    return {name: digest_of(value) if isinstance(value, Mapping) else value for name, value in tied.items()}
