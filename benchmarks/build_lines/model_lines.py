"""Lines that run models: answers of the demo model, and training steps of random weights at full width."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from samf.benchmarks import answer_lines, dino_lines, step_lines
from samf.benchmarks.build_lines.plan import Inputs, Target, Workload
from samf.benchmarks.report_lines import QUESTIONS
from samf.benchmarks.workloads import LineSkipped
from samf.data.prompts import REPORT_QUESTION
from samf.pretraining import dino
from samf.utils.packaged import DEMO_MODEL

_GAIN = 1.5
_BEAM_SHARE = 2  # one in so many scans gets a report by beams
_LOSS_TOLERANCE = 0.02  # of losses in bfloat16, which has three digits
_STEPS = {"from pixels": step_lines.PIXELS, "from cached embeddings": step_lines.CACHED}


def answer(inputs: Inputs) -> list[Workload]:
    """Write reports of phantoms, answer five questions about each, and write reports by beam search."""
    settings = inputs.settings()
    scans = answer_lines.write_answer_scans(settings)
    reports = answer_lines.answer_records(settings, [REPORT_QUESTION])
    questions = answer_lines.answer_records(settings, QUESTIONS)
    some, beams = reports[: max(1, len(reports) // _BEAM_SHARE)], answer_lines.BEAMS
    forms: dict[str, Any] = {
        f"{len(reports)} reports": {"records": reports, "beams": 1},
        f"{len(QUESTIONS)} questions about each": {"records": questions, "beams": 1},
        f"{len(some)} reports, {beams} beams": {"records": some, "beams": beams},
    }
    task = {
        "model": str(DEMO_MODEL),
        "scans": list(map(str, scans)),
        "forms": forms,
        "tokens": answer_lines.TOKENS[settings.size],
        "write": False,
    }
    return [
        Workload(
            "answers",
            program="answer",
            task=task,
            prepare={**task, "write": True},
            rounds=3,
            threads=1,
            targets=inputs.targets(dict.fromkeys(forms, Target(gain=_GAIN))),
            note=f"{len(scans)} phantoms, cached slices, batches as each build chooses them",
        )
    ]


def train(inputs: Inputs) -> list[Workload]:
    """Take a step of stage 3 from pixels and from cached embeddings, in bfloat16."""
    settings = inputs.settings(dtype=torch.bfloat16)
    config = step_lines.step_config(settings, aggregator_dropout=0.0)
    batches = {name: _save_batch(inputs, form) for name, form in _STEPS.items()}
    shape = f"{config.text_config.num_hidden_layers} layers of width {config.text_config.hidden_size}"
    task = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "dtype": "bfloat16",
        "batches": {name: str(file) for name, file in batches.items()},
    }
    return [
        Workload(
            "training step",
            program="train_step",
            task=task,
            rounds=1,
            tolerance=_LOSS_TOLERANCE,
            note=f"bfloat16, LoRA, frozen encoder, {shape}; losses within {_LOSS_TOLERANCE}; memory that the step adds",
        ),
    ]


def _save_batch(inputs: Inputs, form: str) -> Path:
    batch = step_lines.step_batch(inputs.settings(dtype=torch.bfloat16), form)
    path = inputs.folder / f"{form.replace(', ', '_').replace(' ', '_')}.pt"
    torch.save(batch, path)
    return path


def pretrain(inputs: Inputs) -> list[Workload]:
    """Take a DINO step.

    Raises:
        LineSkipped: lightly isn't installed.
    """
    if dino.DINOLoss is None:
        raise LineSkipped("needs lightly: pip install lightly")
    vit, options, rows = dino_lines.dino_options(inputs.settings())
    task: Mapping[str, Any] = {"vit": vit, "dino": options, "rows": rows}
    note = f"ViT of width {vit['hidden_size']}, {rows} slices; losses within 1e-4"
    return [Workload("DINO", program="dino_step", task=task, rounds=1, tolerance=1e-4, note=note)]
