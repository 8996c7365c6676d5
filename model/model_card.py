"""Make the model card of a repository or an adapter, and recognise a card that was made here and is unchanged."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

from .configuration_samf import SamfConfig
from .files_samf import atomic_path

README = "README.md"
Fact = str | int | float | os.PathLike | None
_FUSIONS = {
    "samf": "the volume, its slices and the prompt become one vector, which fills every image token of the prompt",
    "ao2d": "the volume, its slices, the prompt and the slices that the prompt attends to become one vector, which fills "
    "every image token of the prompt",
    "slice_tokens": "each slice becomes one image token, with the volume and the part of the prompt that it attends to",
}
_TAGS = ("medical", "radiology", "computed-tomography", "report-generation", "samf")
_CARD = """\
# {title}

> **For research only. Not a medical device, not for diagnosis.** Every text this model writes may be wrong.{caution}

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

Research on report generation and question answering from chest CT. Not for patient care, triage or second reading: neither
safety nor clinical benefit has been shown.

## Limits

- It invents and misses findings, in fluent sentences. Reports without abnormal findings are common in such training
  data, and score well on text metrics.
- It reads a fixed number of slices of each volume, and may miss what is only visible between them.
- It covers only the chest, and knows earlier scans, history and laboratory values only if the prompt contains them.
- With other scanners, protocols, populations or languages than those of its training data, texts may be worse.

## Data

{data}

## Metrics

{metrics}

## Licence

The code is under Apache-2.0. The weights are also subject to the terms of the base models and of the training
data.
"""
_NO_REPOSITORY = "USER/REPOSITORY"  # in the example of a card whose repository isn't known yet
MARK = re.compile(r"<!-- samf-card ([0-9a-f]{16}) -->\s*")


class CardSettings(TypedDict, total=False):
    """What a model's card says beyond the model itself; arguments of `make_card`."""

    base_models: Sequence[str | None]
    adapter: bool
    facts: Mapping[str, Fact]
    data: str | None
    metrics: Mapping[str, float] | None


def make_card(
    config: SamfConfig,
    *,
    repository: str | None = None,
    base_models: Sequence[str | None] = (),
    adapter: bool = False,
    facts: Mapping[str, Fact] | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """Return the card of a model or adapter.

    Args:
        config: the model's configuration.
        repository: its Hub id, for the example; None = not known yet.
        base_models: what it was made from. The metadata names Hub ids and leaves out local folders.
        adapter: whether it is an adapter of `base_models`, not a whole model.
        facts: further rows of the table; of a folder among the values only the name is written.
        data: name of the training data.
        metrics: values on the validation part of `data`; they also enter the metadata's model-index.
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
        tags=list(dict.fromkeys((*_TAGS, *(("peft",) if adapter else ()), *tags))),
        base_model=bases or None,
        base_model_relation="adapter" if adapter and bases else None,
        model_name=(repository or "samf").split("/")[-1] if metrics else None,
        eval_results=_eval_results(metrics, data) if metrics else None,
    )
    text = _CARD.format(
        title=("Adapter of SAMF" if adapter else "SAMF") + ": reports and answers from chest CT volumes",
        caution=f"\n> {config.caution}" if config.caution else "",
        fusion_type=config.fusion_type,
        fusion=_FUSIONS[config.fusion_type],
        facts="\n".join(f"| {name} | {public_name(str(value))} |" for name, value in rows.items()),
        requirements=" peft" if adapter else "",
        repository=repository or _NO_REPOSITORY,
        data=f"Trained on {public_name(data)}." if data else "The training data are not recorded here.",
        metrics=_metrics_table(metrics, data) if metrics else "No metrics are recorded here.",
    )
    return marked_card(metadata.to_yaml(), text)


def with_repository(card: str, repository: str) -> str:
    """Return a generated card with its repository's name in the example; a card that a person wrote as it is.

    Args:
        card: the text of README.md.
        repository: the Hub id.
    """
    if not is_generated(card):
        return card
    bare = ModelCard(MARK.sub("", card.replace("\r\n", "\n")), ignore_metadata_errors=True)
    text = bare.text.strip("\n") + "\n"
    return str(marked_card(bare.data.to_yaml(), text.replace(_NO_REPOSITORY, repository)))


def marked_card(metadata: str, text: str) -> ModelCard:
    """Return the card of a metadata block and a text, with the mark by which `is_generated` knows it."""
    digest = _digest(ModelCard(f"---\n{metadata}\n---\n\n{text}"))
    return ModelCard(f"---\n{metadata}\n---\n\n<!-- samf-card {digest} -->\n\n{text}")


def write_model_card(folder: str | os.PathLike, card: ModelCard) -> bool:
    """Write `folder/README.md` and return True, unless a person wrote or changed the card that is there."""
    path = Path(folder) / README
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8")):
        return False
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return True


def is_generated(card: str) -> bool:
    """Return whether `make_card` made this card and it is unchanged since, including its metadata."""
    card = card.replace("\r\n", "\n")
    mark = MARK.search(card)
    if mark is None:
        return False
    try:
        return mark[1] == _digest(ModelCard(MARK.sub("", card), ignore_metadata_errors=True))
    except (ValueError, yaml.YAMLError):  # metadata that can't be parsed, which make_card never writes
        return False


def _digest(card: ModelCard) -> str:
    """Return a digest of a card's content; rewriting its metadata, as the library does, doesn't change it."""
    content = json.dumps([card.data.to_dict(), card.text.strip()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _eval_results(metrics: Mapping[str, float], data: str | None) -> list[EvalResult]:
    name = f"{public_name(data)}, validation" if data else "validation"
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=_slug(name),
            dataset_name=name,
            metric_type=_slug(metric),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _metrics_table(metrics: Mapping[str, float], data: str | None) -> str:
    where = f"validation, {public_name(data)}" if data else "validation"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return f"| {where} | |\n|---|---:|\n{rows}"


def public_name(source: str) -> str:
    """Return a Hub id or any other text as it is; of a local folder only the name, since its path is private."""
    return Path(source).resolve().name if os.path.exists(source) or os.path.isabs(source) else source


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be a Hub id, user/model; None for a local folder or None."""
    if not name or "/" not in name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
