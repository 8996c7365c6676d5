"""Answer records about cached slices with a saved model, as eval.py does."""

import json
from pathlib import Path
from typing import Any

import torch

from samf.cache.slice_cache import SliceCache
from samf.evaluation.answering.generation import PREDICTIONS, GenerationSettings, generate_predictions
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor


def run(task: dict[str, Any], recorder: Any) -> dict[str, list[str]]:
    """Fill this build's slice cache (`write`), or answer all records of each form; return the texts.

    Args:
        task: `model`, `scans` (paths), `forms` (name → `records`, `beams`), `tokens`, `folder` (where this build keeps its
            cache), `out` (an empty folder), `write`.
        recorder: takes the figures.
    """
    processor = SamfProcessor.from_pretrained(task["model"])
    store = SliceCache(Path(task["folder"]) / "slices", processor.image_processor)
    if task["write"]:
        for scan in task["scans"]:
            store.get(scan)
        return {}
    # In half precision, the size of a batch would change tokens whose likelihoods are nearly equal.
    model: Any = SamfForConditionalGeneration.from_pretrained(task["model"], dtype=torch.float32).eval()

    def answer(name: str, records: list[Any], tokens: int, beams: int) -> list[str]:
        folder = Path(task["out"]) / name
        settings = GenerationSettings(max_new_tokens=tokens, num_beams=beams)  # batches as each build chooses them
        generate_predictions(model, processor, records, folder, settings, volume_store=store)
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prediction"] for line in lines]

    answer("warm-up", next(iter(task["forms"].values()))["records"][:1], 2, 1)
    texts = {}
    for name, form in task["forms"].items():
        with recorder.measure(name):
            texts[name] = answer(name, form["records"], task["tokens"], form["beams"])
    return texts
