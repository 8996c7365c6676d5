"""Benchmarks of evaluation: the answers of a data set by `generate_predictions`, against one volume at a time.

The reference implementation takes one volume at a time and encodes its slices one by one, for each question again; 256
equal rows stand for the volume; a call of `generate` answers one prompt. The model is `--model`, by default the demo
model, and the slices come from a filled slice cache, on both sides.
"""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.report_lines import QUESTIONS
from samf.benchmarks.workloads import Settings, fill
from samf.cache.slice_cache import SliceCache
from samf.data.collator import SamfCollator
from samf.data.prompts import REPORT_QUESTION
from samf.data.schema import Record
from samf.evaluation.answering.generation import PREDICTIONS, GenerationSettings, generate_predictions
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.phantoms.dataset import write_nifti
from samf.phantoms.volume import make_phantom
from samf.utils.packaged import DEMO_MODEL

SCANS = {"full": 64, "medium": 16, "tiny": 3}
TOKENS = {"full": 200, "medium": 200, "tiny": 4}
BEAMS = 3
_ROUNDS = 5
_REFERENCE_ROWS = 256


def write_answer_scans(settings: Settings) -> list[Path]:
    """Write the phantoms; return their files."""
    for number in range(SCANS[settings.size]):
        phantom = make_phantom(np.random.default_rng(number), voxel_mm=8.0)
        write_nifti(phantom, answer_scan(settings, number), "LPS")
    return [answer_scan(settings, number) for number in range(SCANS[settings.size])]


def prepare_answers(settings: Settings) -> list[Measurement]:
    """Write phantoms and fill their slice cache."""
    store = _store(settings)
    for scan in write_answer_scans(settings):
        store.get(str(scan))
    slices = store.image_processor.num_slices
    return [Measurement("scans", "scans", [SCANS[settings.size]], note=f"{slices} slices each, of {_model(settings)}")]


def _model(settings: Settings) -> str:
    return settings.model or str(DEMO_MODEL)


def answer_scan(settings: Settings, number: int) -> Path:
    """Return the file of a phantom."""
    return settings.folder / f"scan_{number}.nii.gz"


def _store(settings: Settings) -> SliceCache:
    return SliceCache(settings.folder / "slices", SamfProcessor.from_pretrained(_model(settings)).image_processor)


def answer_records(settings: Settings, questions: Sequence[str]) -> list[Record]:
    """Return one record per scan and question."""
    return [
        {
            "id": f"{number}_{index}",
            "scan_id": str(number),
            "patient_id": str(number),
            "task": "report" if question == REPORT_QUESTION else "short_answer",
            "volume": str(answer_scan(settings, number)),
            "question": question,
            "answer": "",
            "choices": None,
            "finding_labels": [],
        }
        for number in range(SCANS[settings.size])
        for index, question in enumerate(questions)
    ]


class _Reference:
    """Answers as the reference implementation gives them: one volume, one prompt, one slice at a time.

    Args:
        model: its encoder and language model are used; a new Ao2D fusion gives 256 equal rows.
        processor: the model's.
        store: of the slices.
        num_beams: 1 = greedy.
    """

    def __init__(self, model: Any, processor: SamfProcessor, store: SliceCache, num_beams: int):
        self.num_beams = num_beams
        config = copy.deepcopy(model.config)
        config.update({"fusion_type": "ao2d", "num_image_tokens": _REFERENCE_ROWS})
        self.model: Any = SamfForConditionalGeneration(config)
        fill(self.model)
        for name in ("slice_encoder", "aggregator", "slice_position", "language_model"):
            setattr(self.model.model, name, getattr(model.model, name))
        self.model.lm_head = model.lm_head
        self.model.generation_config = model.generation_config
        self.model.to(model.device, model.dtype).eval()
        processor = SamfProcessor(processor.image_processor, processor.tokenizer, num_image_tokens=_REFERENCE_ROWS)
        self.collate = SamfCollator(processor, generation=True, volume_store=store)

    @torch.no_grad()
    def answer(self, record: Record, tokens: int) -> torch.Tensor:
        """Return as many tokens as ours has for this record, so that both do the same work."""
        batch: dict[str, Any] = self.collate([record])
        pixels = batch.pop("pixel_values").to(self.model.device, self.model.dtype)
        encode = self.model.model.encode_slices
        slices = [encode(pixels[:, index, None]).last_hidden_state for index in range(pixels.shape[1])]
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": self.num_beams}
        found: torch.Tensor = self.model.generate(
            **batch, slice_embeddings=torch.cat(slices, dim=1), do_sample=False, **length
        )
        return found


def _compare(
    settings: Settings, questions: Sequence[str], label: str, runs: dict[str, GenerationSettings], limit: float | None
) -> list[Measurement]:
    """Time runs of `generate_predictions` over all scans against the reference; the folder of each is removed.

    Args:
        settings: of the stage.
        questions: asked about each scan.
        label: of the task.
        runs: name → how answers are generated.
        limit: of the last run's ratio.
    """
    model: Any = SamfForConditionalGeneration.from_pretrained(_model(settings), dtype=settings.dtype)
    model.to(settings.device)
    processor, store = SamfProcessor.from_pretrained(_model(settings)), _store(settings)
    records, number = answer_records(settings, questions), count()

    def ours(how: GenerationSettings) -> list[int]:
        folder = settings.folder / f"answers_{next(number)}"
        generate_predictions(model, processor, records, folder, how, volume_store=store)
        rows = [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
        shutil.rmtree(folder)
        return [row["tokens"] for row in rows]

    tokens = [max(1, one) for one in ours(next(iter(runs.values())))]
    reference = _Reference(model, processor, store, next(iter(runs.values())).num_beams)
    tasks: dict[str, Callable[[], Any]] = {
        "one volume at a time": lambda: [reference.answer(*pair) for pair in zip(records, tokens, strict=True)],
        **{name: lambda how=how: ours(how) for name, how in runs.items()},
    }
    times = settings.stopwatch.in_turns(tasks, label, _ROUNDS)
    note = f"{len(records)} answers of {sum(tokens) / len(tokens):.0f} tokens"
    slow = times.pop("one volume at a time")
    last = list(runs)[-1]
    return [
        Measurement(f"{label}, reference", "s", slow, note=note),
        *(Measurement(f"{label}, {name}", "s", values) for name, values in times.items()),
        *(
            Measurement(f"reference / {name}", "x", ratios(slow, values), limit if name == last else None)
            for name, values in times.items()
        ),
    ]


def time_reports(settings: Settings) -> list[Measurement]:
    """Time the reports of all scans."""
    tokens = TOKENS[settings.size]
    return _compare(settings, [REPORT_QUESTION], "reports", _runs(1, 8, None, tokens=tokens), settings.limit(6))


def time_questions(settings: Settings) -> list[Measurement]:
    """Time five questions about each scan, which is encoded once."""
    tokens = TOKENS[settings.size]
    return _compare(settings, QUESTIONS, "questions", _runs(8, None, tokens=tokens), settings.limit(6))


def time_beams(settings: Settings) -> list[Measurement]:
    """Time reports by a search with three beams, for which a scan is encoded once."""
    runs = _runs(8, None, tokens=TOKENS[settings.size], num_beams=BEAMS)
    return _compare(settings, [REPORT_QUESTION], f"reports, {BEAMS} beams", runs, None)


def _runs(*sizes: int | None, tokens: int, num_beams: int = 1) -> dict[str, GenerationSettings]:
    """Return how answers are generated by the name of each run; a size of None is the default."""
    return {
        "default batches" if size is None else f"batches of {size}": GenerationSettings(
            batch_size=size, max_new_tokens=tokens, num_beams=num_beams
        )
        for size in sizes
    }


STAGES = {"prepare": prepare_answers, "reports": time_reports, "questions": time_questions, "beams": time_beams}
