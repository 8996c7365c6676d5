"""The slice encoder's labels lie where the finding lies, and its folder is what train.py takes."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from samf import SamfImageProcessor, pretrain_encoder
from samf.data.labelled_slices import slice_labels
from samf.data.phantom import Finding, make_phantom

QUARTERS = ("top left", "top right", "bottom left", "bottom right")


@pytest.mark.parametrize(
    ("lobe", "axial", "coronal"),
    [
        ("right upper lobe", "left", "top left"),
        ("left upper lobe", "right", "top right"),
        ("right lower lobe", "left", "bottom left"),
        ("left lower lobe", "right", "bottom right"),
    ],
)
def test_labels_are_in_the_quarter_where_a_radiologist_sees_the_finding(lobe, axial, coronal):
    """The patient's right is on the picture's left; in coronal pictures the head is on top."""
    processor = SamfImageProcessor(slices_per_plane=6, size=32, slab="mean")
    finding = Finding("Consolidation", lobe=lobe)
    labels = slice_labels(make_phantom(np.random.default_rng(3), findings=[finding]), processor, ["Consolidation"])
    seen = {
        plane: {QUARTERS[quarter] for quarter in np.flatnonzero(labels[6 * number : 6 * number + 6].any(axis=0))}
        for number, plane in enumerate(("axial", "coronal"))
    }
    assert seen["axial"] and all(quarter.endswith(axial) for quarter in seen["axial"])
    assert coronal in seen["coronal"]
    assert all(quarter.endswith(coronal.split()[1]) for quarter in seen["coronal"])


def test_a_normal_chest_has_no_labels():
    processor = SamfImageProcessor(slices_per_plane=4, size=32)
    assert not slice_labels(make_phantom(np.random.default_rng(0), findings=[]), processor, ["Consolidation"]).any()


def test_a_run_ends_in_an_encoder_folder(tmp_path):
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    options = sizes | {"slices_per_plane": 2, "train_patients": 4, "valid_patients": 4, "max_steps": 2}
    options |= {"output_dir": tmp_path, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    pretrain_encoder.main([f"--{key}={value}" for key, value in options.items()])
    encoder, processor = AutoModel.from_pretrained(tmp_path), SamfImageProcessor.from_pretrained(tmp_path)
    assert (encoder.config.hidden_size, processor.size, processor.slices_per_plane) == (16, 32, 2)
    pixel_values = torch.zeros(1, len(processor.hu_windows), 32, 32)
    assert encoder.float()(pixel_values).last_hidden_state.shape == (1, 5, 16)
