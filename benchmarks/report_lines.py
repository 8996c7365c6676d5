"""Benchmarks of reports: where the seconds of a single one go, and what batches and shared scans save."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.workloads import Settings, fill, random_model
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.pipeline_samf import SamfReportPipeline
from samf.model.processing_samf import SamfProcessor
from samf.phantoms import text
from samf.phantoms.dataset import write_nifti
from samf.phantoms.tokenizer import train_small_tokenizer
from samf.phantoms.volume import make_phantom

SCANS = 8
QUESTIONS = (
    "Which of the following findings is present? (a) emphysema (b) consolidation (c) cardiomegaly (d) lung nodule",
    "On which side is the pleural effusion? (a) right (b) left (c) bilateral (d) there is none",
    "Is there a pericardial effusion in this chest CT?",
    "In which lobe is the consolidation observed?",
    "Is the heart enlarged?",
)
_VOXEL_MM = {"full": 1.5, "medium": 3.0, "tiny": 10.0}
_TOKENS = {"full": 16, "medium": 48, "tiny": 4}  # of each answer
_STARTS = {"full": 3, "medium": 5, "tiny": 1}  # processes
_MODEL = "model"


def prepare_reports(settings: Settings) -> list[Measurement]:
    """Write the scans, and a random model unless one is given."""
    for number in range(SCANS):
        phantom = make_phantom(np.random.default_rng(number), voxel_mm=_VOXEL_MM[settings.size])
        write_nifti(phantom, _scan(settings, number), "LPS")
    if settings.model is None:
        _write_random_model(settings)
    voxels = " x ".join(map(str, phantom.hu.shape))
    weights = sum(file.stat().st_size for file in Path(_folder(settings)).glob("*.safetensors"))
    return [Measurement("weights on disk", "MB", [weights / 1e6], note=f"phantoms of about {voxels} voxels")]


def _scan(settings: Settings, number: int) -> Path:
    return settings.folder / f"scan_{number}.nii.gz"


def _folder(settings: Settings) -> str:
    return settings.model or str(settings.folder / _MODEL)


def _write_random_model(settings: Settings) -> None:
    """Save a model of random weights with a tokenizer of the phantoms' words."""
    sentences = [one for entry in (text.PRESENT, text.ABSENT, text.NORMAL) for some in entry.values() for one in some]
    tokenizer = train_small_tokenizer([*sentences, *QUESTIONS], vocab_size=500)
    plain = settings.config()
    image_processor = SamfImageProcessor(size=plain.vision_config.image_size)
    processor = SamfProcessor(image_processor, tokenizer, num_image_tokens=plain.num_image_tokens)
    language = plain.text_config.to_dict()
    language["vocab_size"] = max(language["vocab_size"], len(tokenizer))
    config = settings.config(text_config=language, image_token_id=processor.image_token_id)
    model: Any = random_model(SamfForConditionalGeneration, config, settings.device, settings.dtype)
    fill(model, std=0.05)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(settings.folder / _MODEL)
    processor.save_pretrained(settings.folder / _MODEL)


def time_start(settings: Settings) -> list[Measurement]:
    """Time a report from the start of its process to its end, step by step, in fresh processes."""
    tokens = _TOKENS[settings.size]
    runs = [_start_process(settings, tokens) for _ in range(_STARTS[settings.size])]
    steps, previous = [], dict.fromkeys(range(len(runs)), 0.0)
    for step in runs[0]:
        took = [run[step] - previous[number] for number, run in enumerate(runs)]
        previous = {number: run[step] for number, run in enumerate(runs)}
        name = "the rest of the answer" if step == "end" else step
        steps.append(Measurement(name, "s", took, note=f"{tokens} tokens" if step == "end" else ""))
    imports = [run["import samf"] - run["interpreter"] for run in runs]
    return [
        *steps,
        Measurement("importing, in all", "s", imports),
        Measurement("from the start to the first word", "s", [run["first word"] for run in runs]),
        Measurement("from the start to the end", "s", [run["end"] for run in runs]),
    ]


def _start_process(settings: Settings, tokens: int) -> dict[str, float]:
    """Return when each step of a report in a new process had ended, in seconds.

    Raises:
        RuntimeError: the process failed.
    """
    script = str(Path(__file__).with_name("report_process.py"))
    arguments = [str(time.time()), _folder(settings), str(_scan(settings, 0)), str(tokens)]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _load(settings: Settings) -> tuple[SamfReportPipeline, dict[str, Any]]:
    """Return the pipeline, and options by which all answers have the same length."""
    model: Any = SamfForConditionalGeneration.from_pretrained(_folder(settings), dtype=settings.dtype)
    processor = SamfProcessor.from_pretrained(_folder(settings))
    tokens = _TOKENS[settings.size]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    reporter = SamfReportPipeline(model=model.to(settings.device), processor=processor, device=settings.device)
    return reporter, options


def _compare(settings: Settings, tasks: dict[str, Callable[[], Any]], slow: str) -> list[Measurement]:
    """Time tasks in turns, and return their seconds and the ratio of `slow` to each of the others."""
    times = settings.stopwatch.in_turns(tasks, slow)
    note = f"{_TOKENS[settings.size]} tokens each"
    figures = [Measurement(name, "s", values, note=note) for name, values in times.items()]
    return figures + [
        Measurement(f"{slow} / {name}", "x", ratios(times[slow], values))
        for name, values in times.items()
        if name != slow
    ]


@torch.inference_mode()
def time_scans(settings: Settings) -> list[Measurement]:
    """Time the reports of eight scans in one batch against eight calls."""
    reporter, options = _load(settings)
    scans = [str(_scan(settings, number)) for number in range(SCANS)]
    one_batch, singles = f"{SCANS} scans in one batch", f"{SCANS} calls"
    tasks = {
        one_batch: lambda: reporter(scans, batch_size=SCANS, **options),
        singles: lambda: [reporter(scan, **options) for scan in scans],
    }
    return _compare(settings, tasks, singles)


@torch.inference_mode()
def time_questions(settings: Settings) -> list[Measurement]:
    """Time five questions of one scan, encoded once, against five calls."""
    reporter, options = _load(settings)
    scan, count = str(_scan(settings, 0)), len(QUESTIONS)
    calls = f"{count} calls"
    tasks = {
        f"{count} questions in one call and batch": lambda: reporter(
            scan, question=QUESTIONS, batch_size=count, **options
        ),
        f"{count} questions in one call": lambda: reporter(scan, question=QUESTIONS, batch_size=1, **options),
        calls: lambda: [reporter(scan, question=question, **options) for question in QUESTIONS],
    }
    return _compare(settings, tasks, calls)
