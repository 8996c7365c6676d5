"""Answer a list of records with a model: in batches, resumably, over several processes, and with every failure listed.

`evaluate` writes predictions.jsonl with a model and scores it; eval.py and the demo call it.

    python eval.py --model runs/ao2d --data /data/CT-RATE --output_dir runs/ao2d/eval
    torchrun --nproc_per_node 8 eval.py --model runs/ao2d --data /data/CT-RATE --output_dir runs/ao2d/eval

Both commands write the same file: a batch holds the same records, and is drawn with the same seed, whichever process
answers it.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import TypedDict, Unpack, cast

from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from samf.data.options import check_on_error
from samf.data.schema import FAILURES_FILE, JsonObject, OnError, Record, Task, VolumeStore
from samf.evaluation.answering.answer_folder import PREDICTIONS, SETTINGS, TIMES, AnswerFolder, answer_statistics
from samf.evaluation.answering.answerer import Answerer, Collator, ModelInputs
from samf.evaluation.answering.batches import make_batches, share_batches
from samf.evaluation.answering.digests import describe_answering, digest_of, references_digest
from samf.evaluation.answering.settings import GenerationSettings, GenerationSummary, fitting_batch_size
from samf.evaluation.answering.shuffled_volumes import shuffle_volumes
from samf.evaluation.json_lines import read_complete_lines
from samf.evaluation.schema import Failure, Results
from samf.evaluation.scoring import score_predictions, write_results
from samf.evaluation.scoring_options import ScoringOptions
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.utils.distributed import Processes

__all__ = [
    "PREDICTIONS",
    "RESULTS",
    "AnsweringOptions",
    "GenerationSettings",
    "GenerationSummary",
    "evaluate",
    "generate_predictions",
    "shuffle_volumes",
]

RESULTS = "results.json"


class AnsweringOptions(TypedDict, total=False):
    """Keyword arguments of `generate_predictions`."""

    collator: Collator | None
    volume_store: VolumeStore | None
    on_error: OnError
    described_by: JsonObject | None


def generate_predictions(
    model: SamfForConditionalGeneration,
    processor: SamfProcessor,
    records: Sequence[Record],
    output_dir: str | os.PathLike[str],
    settings: GenerationSettings | None = None,
    *,
    collator: Collator | None = None,
    volume_store: VolumeStore | None = None,
    on_error: OnError = "raise",
    described_by: JsonObject | None = None,
) -> GenerationSummary:
    """Answer every record whose id `output_dir`/predictions.jsonl doesn't hold yet; the file keeps the records' order.

    Batches depend on the records and the batch size only, not on what is answered already or on the number of processes: a
    run that was interrupted and resumed, or shared among processes, gives the file of an uninterrupted one. Every process
    that torch.distributed knows must call this; each answers its share.

    Args:
        model: used on its own device and dtype, in evaluation mode; its mode is restored.
        processor: its `batch_decode` decodes the answers.
        records: what is answered; each needs an id of its own.
        output_dir: folder of predictions.jsonl, failures.jsonl and times.jsonl.
        settings: how answers are generated; None = the defaults.
        collator: records → left-padded tensors for `model.generate`; None = `SamfCollator(…, generation=True)` over volumes
            that are read ahead and encoded once. Must be None with settings.mcq="likelihood".
        volume_store: prepared volumes for the default collator; None = the last few volumes are kept in memory.
        on_error: "raise" raises what a record's volume raised; "skip" logs it, lists it in failures.jsonl and continues. A
            failed record is never replaced by another, and is retried when the run is resumed.
        described_by: what else the predictions depend on (model, data, …). The file is tied to it, to the generation
            settings, to the records with their references and volumes, and to the settings and weights of model and
            processor.

    Raises:
        ValueError: repeated or missing ids, or an unknown `on_error`.
        ResumeError: the folder's predictions were made with other settings.
    """
    on_error = check_on_error(on_error)
    settings, started, processes = settings or GenerationSettings(), time.perf_counter(), Processes()
    batch_size = settings.batch_size or fitting_batch_size(model, settings)
    settings = replace(settings, batch_size=batch_size)
    folder = AnswerFolder(output_dir, records, processes.rank)
    with processes.main_process_first():
        if processes.is_first:
            folder.prepare({**_tied_to(settings, model, processor, records), **(described_by or {})})
            folder.check_volumes(records)
    answered = folder.answered()
    inputs = ModelInputs(model, processor, settings, collator=collator, volume_store=volume_store)
    answerer = Answerer(model, processor, inputs, settings, folder, on_error)
    with _folder_closed_after(folder, inputs, processes), _in_evaluation_mode(model):
        _answer_share(answerer, make_batches(records, batch_size), answered, processes)
    return _summarise(folder, answered, time.perf_counter() - started, processes.count)


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _folder_closed_after(folder: AnswerFolder, inputs: ModelInputs, processes: Processes) -> Iterator[None]:
    """Close the files after the block and merge the parts of all processes; a single process merges after an error too."""
    try:
        yield
    finally:
        folder.close()
        inputs.close()
        if processes.count == 1:
            folder.merge()
    if processes.count > 1:
        processes.wait()
        with processes.main_process_first():
            if processes.is_first:
                folder.merge()


def _tied_to(
    settings: GenerationSettings, model: nn.Module, processor: SamfProcessor, records: Sequence[Record]
) -> JsonObject:
    """Return what the predictions are tied to in addition to what the caller describes.

    The batch size is left out, so that a run that ran out of memory can be resumed with smaller batches; but drawn tokens
    depend on the batch, so it counts where tokens are drawn.
    """
    chosen = {name: value for name, value in asdict(settings).items() if name != "batch_size" or settings.do_sample}
    return {**chosen, **describe_answering(model, processor), "references": references_digest(records)}


def _answer_share(
    answerer: Answerer, batches: Sequence[list[Record]], answered: set[str], processes: Processes
) -> None:
    """Answer this process's batches that hold a record without an answer."""
    share = share_batches(batches, processes.rank, processes.count)
    missing = {number: sum(record["id"] not in answered for record in batches[number]) for number in share}
    todo = [number for number in share if missing[number]]
    total = sum(len(batches[number]) for number in share)
    seen: set[tuple[Task, str]] = set()
    with tqdm(
        total=total,
        initial=total - sum(missing.values()),
        desc="answers",
        unit="record",
        disable=not processes.is_first,
    ) as progress:
        for number, following in zip_longest(todo, todo[1:]):
            batch = batches[number]
            volumes = {(record["task"], record["volume"]) for record in batch if record["volume"] is not None}
            answerer.inputs.read_ahead([*batch, *(batches[following] if following is not None else [])])
            if answerer.settings.do_sample:
                set_seed(answerer.settings.seed + number)
            answerer(batch, answered, new_volumes=len(volumes - seen))
            seen |= volumes
            progress.update(missing[number])


def _summarise(folder: AnswerFolder, answered: set[str], seconds: float, processes: int) -> GenerationSummary:
    rows = read_complete_lines(folder.folder / PREDICTIONS)
    new = [row for row in rows if row["id"] not in answered]
    return GenerationSummary(
        written=len(new),
        resumed=len(rows) - len(new),
        seconds=seconds,
        new_tokens=sum(row["tokens"] for row in new),
        processes=processes,
        failures=cast(list[Failure], read_complete_lines(folder.folder / FAILURES_FILE)),
        tasks=answer_statistics(rows, read_complete_lines(folder.folder / TIMES)),
    )


# --- Generate and score -----------------------------------------------------------------------------------------


def evaluate(
    model: SamfForConditionalGeneration,
    processor: SamfProcessor,
    records: Sequence[Record],
    output_dir: str | os.PathLike[str],
    settings: GenerationSettings | None = None,
    *,
    scoring: ScoringOptions | None = None,
    **answering: Unpack[AnsweringOptions],
) -> Results | None:
    """Answer the records, score the answers, and write results.json and results.md next to them.

    Args:
        model: see `generate_predictions`.
        processor: see `generate_predictions`.
        records: what is answered.
        output_dir: folder of all output files.
        settings: how answers are generated; None = the defaults.
        scoring: the options of scoring; the device defaults to the model's.
        answering: keyword arguments of `generate_predictions`.

    Returns:
        The results of `score_predictions` with `generation` (see `GenerationSummary`) and `model` (what the predictions are
        tied to). Of several processes the first one scores; the others return None.

    Raises:
        ValueError: every record failed; and what `generate_predictions` and `score_predictions` raise.
    """
    summary = generate_predictions(model, processor, records, output_dir, settings, **answering)
    if not Processes().is_first:
        return None
    folder = Path(output_dir)
    if not summary.written + summary.resumed:
        raise ValueError(f"None of {len(records)} records could be read; {folder / FAILURES_FILE} lists why.")
    scoring = scoring or ScoringOptions()
    results = score_predictions(folder / PREDICTIONS, replace(scoring, device=scoring.device or str(model.device)))
    results["generation"] = summary.to_json()
    results["model"] = _model_statement(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    write_results(results, folder / RESULTS)
    return results


def _model_statement(tied: JsonObject) -> JsonObject:
    """Return what predictions are tied to, with nested settings as their hash."""
    return {name: digest_of(value) if isinstance(value, Mapping) else value for name, value in tied.items()}
