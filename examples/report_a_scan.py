"""Write a report for a CT scan, and see what the model saw.

    python examples/report_a_scan.py runs/demo/model scan.nii.gz --output report

Writes report/report.txt, report/slices.png with the fusion's weight under each slice, and report/weights.json. For research
only, not for diagnosis.
"""

# %% Arguments: a saved model (`make demo` writes runs/demo/model) and a file, a DICOM folder or an address.
import argparse
import json
from pathlib import Path

import torch

from samf import SamfForConditionalGeneration, SamfProcessor, read_ct
from samf.reporting.slice_view import save_slice_image

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or Hub id of a SAMF model")
parser.add_argument("scan", help="NIfTI, NRRD, MetaImage, DICOM folder, zip or address")
parser.add_argument("--prompt", default="Write the radiology report of this chest CT.")
parser.add_argument("--output", type=Path, default=Path("report"))
args = parser.parse_args()

# %% Load the model. On a GPU add `device_map="cuda", dtype=torch.bfloat16`.
model = SamfForConditionalGeneration.from_pretrained(args.model).eval()
processor = SamfProcessor.from_pretrained(args.model)

# %% Read the scan: Hounsfield units in RAS+ order, whatever the format; then cut it into slices of three planes.
volume = read_ct(args.scan)
print(f"{args.scan}: {volume.shape} voxels of {volume.spacing} mm, stored as {volume.stored_orientation}")
slices = processor.image_processor.extract(volume)

# %% Ask.
content = [{"type": "volume", "volume": slices}, {"type": "text", "text": args.prompt}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    attentions = model(**inputs, output_slice_attentions=True).slice_attentions
report = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
print(report)

# %% Save. `slice_tokens` has no weight per slice: there each slice is a token of its own.
args.output.mkdir(parents=True, exist_ok=True)
weights = None if attentions.alpha is None else attentions.alpha[0, 0].float().tolist()
(args.output / "report.txt").write_text(report + "\n", encoding="utf-8")
(args.output / "weights.json").write_text(json.dumps(weights), encoding="utf-8")
save_slice_image(slices, args.output / "slices.png", weights=weights, image_processor=processor.image_processor)
