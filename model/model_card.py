"""The model card. A Hub repository carries this file, since its classes write cards: it imports nothing else of ours."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .files_samf import atomic_path

README = "README.md"
FUSIONS = {
    "samf": "the volume, its slices and the prompt become one vector, which stands for the volume in the prompt",
    "ao2d": "the volume, its slices, the prompt and the slices as the prompt sees them become one vector, which stands "
    "for the volume in the prompt",
    "slice_tokens": "each slice becomes a vector of its own, with the volume and the part of the prompt that it attends to",
}
TAGS = ("medical", "radiology", "computed-tomography", "report-generation", "samf")
CARD = """\
# {title}

> **For research only. Not a medical device, not for diagnosis.** Every text this model writes may be wrong.

A model of the paper *From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation*
(MICCAI 2025). Fusion `{fusion_type}`: {fusion}.

| | |
|---|---|
{facts}

## Use

```bash
pip install "transformers>=5.18" torch torchvision nibabel SimpleITK pydicom{requirements}
```

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repository = "{repository}"
model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
conversation = [
    {{
        "role": "user",
        "content": [
            {{"type": "volume", "path": "scan.nii.gz"}},  # NIfTI, NRRD, MHA or a folder of DICOM slices
            {{"type": "text", "text": "Write the radiology report of this chest CT."}},
        ],
    }}
]
inputs = processor.apply_chat_template(
    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=512)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

## Intended use

Research on writing reports and answering questions from chest CT. Not for patients, not for triage, and not as a second
reader: nothing about it has been shown to be safe or useful in care.

## Limits

- It invents findings and misses findings, in fluent sentences. Reports that call everything normal are common in its
  kind of training data, and score well on text metrics.
- It reads a fixed number of slices of each volume: what lies between them it may not see.
- It knows no anatomy but the chest, and has no earlier scan, history or laboratory value unless it is given one.
- Other scanners, protocols, populations and languages than those of its training data may give worse texts.

## Data

{data}

## Metrics

{metrics}

## Licence

The code is under Apache-2.0. The weights are also subject to the terms of what they were made from: the base models and
the training data.
"""
_MARK = re.compile(r"<!-- samf-card ([0-9a-f]{16}) -->\s*")


def make_card(
    config: Any,
    *,
    repository: str | None = None,
    base_models: Sequence[str | None] = (),
    adapter: bool = False,
    facts: Mapping[str, Any] | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The card of a model or adapter.

    Args:
        config: the model's `SamfConfig`.
        repository: its Hub id, for the example; None = not known yet.
        base_models: what it was made from. Hub ids are named in the metadata; local folders aren't.
        adapter: an adapter of `base_models`, not a whole model.
        facts: further rows of the table; a folder among the values is told by its name alone.
        data: name of the training data.
        metrics: figures on the validation part of `data`; they also go into the metadata's model-index.
        tags: added to the usual ones.
    """
    bases = list(dict.fromkeys(base for base in map(hub_id, base_models) if base and base != repository))
    rows = {
        "Fusion": config.fusion_type,
        "Slice encoder": f"{config.vision_config.model_type}, width {config.slice_dim}",
        "Language model": f"{config.text_config.model_type}, width {config.text_config.hidden_size}",
        **({"Findings head": ", ".join(config.finding_names)} if config.finding_names else {}),
        **({"Base models": ", ".join(f"`{base}`" for base in bases)} if bases else {}),
        **(facts or {}),
    }
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys((*TAGS, *(("peft",) if adapter else ()), *tags))),
        base_model=bases or None,
        base_model_relation="adapter" if adapter and bases else None,
        model_name=(repository or "samf").split("/")[-1] if metrics else None,
        eval_results=_eval_results(metrics, data) if metrics else None,
    )
    text = CARD.format(
        title=("Adapter of SAMF" if adapter else "SAMF") + ": reports and answers from chest CT volumes",
        fusion_type=config.fusion_type,
        fusion=FUSIONS[config.fusion_type],
        facts="\n".join(f"| {name} | {public_name(str(value))} |" for name, value in rows.items()),
        requirements=" peft" if adapter else "",
        repository=repository or "USER/REPOSITORY",
        data=f"Trained on {public_name(data)}." if data else "What it was trained on has not been recorded here.",
        metrics=_metrics_table(metrics, data) if metrics else "None have been recorded here.",
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n<!-- samf-card {_digest(card)} -->\n\n{text}")


def write_model_card(folder: str | os.PathLike, card: ModelCard) -> bool:
    """Write `folder/README.md`, unless a card stands there that somebody wrote or changed; returns whether it was."""
    path = Path(folder) / README
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8")):
        return False
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return True


def is_generated(card: str) -> bool:
    """Whether `make_card` made this card and nobody has changed it since, metadata included."""
    card = card.replace("\r\n", "\n")
    mark = _MARK.search(card)
    if mark is None:
        return False
    try:
        return mark[1] == _digest(ModelCard(_MARK.sub("", card), ignore_metadata_errors=True))
    except (ValueError, yaml.YAMLError):  # metadata that can't be read: nothing that make_card writes
        return False


def _digest(card: ModelCard) -> str:
    """Of what a card says: writing its metadata anew, as the library does, changes nothing."""
    content = json.dumps([card.data.to_dict(), card.text.strip()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _eval_results(metrics: Mapping[str, float], data: str | None) -> list[EvalResult]:
    name = f"{public_name(data)}, validation" if data else "validation"
    place = {"task_type": "image-text-to-text", "dataset_type": _slug(name), "dataset_name": name}
    return [
        EvalResult(metric_type=_slug(metric), metric_name=metric, metric_value=value, **place)
        for metric, value in metrics.items()
    ]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _metrics_table(metrics: Mapping[str, float], data: str | None) -> str:
    where = f"validation, {public_name(data)}" if data else "validation"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return f"| {where} | |\n|---|---:|\n{rows}"


def public_name(source: str) -> str:
    """A Hub id, or any other text, as it is; of a local folder its name alone, since its path means nothing to others."""
    return Path(source).resolve().name if os.path.exists(source) or os.path.isabs(source) else source


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a Hub id, user/model; None for a local folder, or for nothing."""
    if not name or "/" not in name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
