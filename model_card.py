"""The model card of a saved model folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samf.configuration_samf import SamfConfig
from samf.data.prompts import REPORT_QUESTION

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [medical, radiology, computed-tomography, report-generation, samf]
---

# SAMF: reports and answers from chest CT volumes

> **For research only. Not a medical device, not for diagnosis.** Every text this model writes may be wrong.

A model of the paper *From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation*
(MICCAI 2025), fusion `{fusion_type}`.

| | |
|---|---|
{facts}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(REPOSITORY, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(REPOSITORY, trust_remote_code=True)
conversation = [{{"role": "user", "content": [
    {{"type": "volume", "path": "scan.nii.gz"}},
    {{"type": "text", "text": "{question}"}},
]}}]
inputs = processor.apply_chat_template(
    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=512)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""


def write_model_card(folder: Path, config: SamfConfig, facts: Mapping[str, Any]) -> None:
    """Write `folder/README.md`; `facts` become the rows of its table."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    temporary = folder / ".README.md.tmp"
    card = CARD.format(fusion_type=config.fusion_type, facts=rows, question=REPORT_QUESTION)
    temporary.write_text(card, encoding="utf-8")
    os.replace(temporary, folder / "README.md")
