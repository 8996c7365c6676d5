"""Draw docs/pipeline.png: the arrays that a trained model computes for one phantom.

python -m samf.scripts.draw_pipeline --model runs/demo/model --ct runs/demo/phantoms/…/valid_2_a_1.nii.gz
"""

import argparse
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from samf import SamfForConditionalGeneration, SamfProcessor, read_ct
from samf.data.prompts import REPORT_QUESTION, record_conversation

_PLANES = ("axial", "coronal", "sagittal")
_SHOWN = 4  # slices per plane
_WINDOW = 1  # mediastinum


@dataclass(frozen=True)
class PipelineArrays:
    """What the image shows.

    Attributes:
        slices: what `SamfImageProcessor.extract` returned.
        z_2d: slice embeddings, (S, slice width).
        z_3d: volume embedding, (1, volume width).
        weights: the fusion's weights over slices, (1 or prompt tokens, S) or its transpose.
        report: the generated text.
        fusion_type: of the model.
    """

    slices: Mapping[str, np.ndarray]
    z_2d: np.ndarray
    z_3d: np.ndarray
    weights: np.ndarray
    report: str
    fusion_type: str


def run_model(folder: Path, ct: Path) -> PipelineArrays:
    """Run the model saved in `folder` on a CT."""
    model, processor = SamfForConditionalGeneration.from_pretrained(folder), SamfProcessor.from_pretrained(folder)
    slices = processor.image_processor.extract(read_ct(ct))
    conversation = record_conversation({"question": REPORT_QUESTION, "choices": None}, slices)
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = model(**inputs, output_slice_attentions=True)
        tokens = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    attentions = outputs.slice_attentions
    weights = attentions.alpha if attentions.alpha is not None else attentions.slice_text
    (report,) = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return PipelineArrays(
        slices=slices,
        z_2d=outputs.image_outputs.last_hidden_state[0].numpy(),
        z_3d=outputs.image_outputs.pooler_output[0].numpy(),
        weights=weights[0][:, inputs["prompt_mask"][0]].numpy() if weights.shape[1] > 1 else weights[0].numpy(),
        report=report.strip(),
        fusion_type=model.config.fusion_type,
    )


def draw(arrays: PipelineArrays, path: Path) -> None:
    """Draw the arrays side by side and save the image."""
    figure = Figure(figsize=(15, 4.6), facecolor="white")
    FigureCanvasAgg(figure)
    columns = figure.add_gridspec(
        1, 5, width_ratios=[4, 2.1, 0.55, 2.1, 4], left=0.01, right=0.99, bottom=0.1, top=0.82, wspace=0.25
    )
    _draw_slices(figure, columns[0], arrays.slices)
    panels = (
        ("slice encoder: z_2d", arrays.z_2d, "embedding", "slice"),
        ("aggregator:\nz_3d", arrays.z_3d.T, "", "embedding"),
        (f"fusion ({arrays.fusion_type})", arrays.weights, "prompt token", "slice"),
    )
    for place, (title, array, below, left) in zip(range(1, 4), panels, strict=True):
        axes = figure.add_subplot(columns[place])
        axes.imshow(array, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"{below} ({array.shape[1]})" if below else "")
        axes.set_ylabel(f"{left} ({array.shape[0]})", labelpad=1)
        axes.set_xticks([])
        axes.set_yticks([])
    axes = figure.add_subplot(columns[4])
    axes.axis("off")
    axes.set_title("language model: report", fontsize=11)
    axes.text(
        0, 0.98, textwrap.fill(arrays.report, 44), va="top", fontsize=9.5, family="serif", transform=axes.transAxes
    )
    figure.suptitle("One phantom CT in a SAMF model trained by `make demo`", fontsize=12)
    figure.savefig(path, dpi=110)


def _draw_slices(figure: Figure, cell: SubplotSpec, slices: Mapping[str, np.ndarray]) -> None:
    grid = cell.subgridspec(3, _SHOWN, wspace=0.03, hspace=0.03)
    for row, plane in enumerate(_PLANES):
        members = np.flatnonzero(slices["slice_planes"] == row)
        chosen = members[np.linspace(2, len(members) - 3, _SHOWN).round().astype(int)]
        for column, index in enumerate(chosen):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(slices["slices"][index, _WINDOW], cmap="gray", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(plane, fontsize=9, labelpad=1)
            if row == 0 and column == 1:
                axes.set_title("slices of three planes", fontsize=11, loc="left")


def main() -> None:
    """Draw the image that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--ct", type=Path, required=True, help="CT file or DICOM folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "pipeline.png")
    args = parser.parse_args()
    draw(run_model(args.model, args.ct), args.output)


if __name__ == "__main__":
    main()
