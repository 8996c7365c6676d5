"""The slice encoder's labels are where the finding is; both objectives end in a folder that train.py takes."""

import json
import shutil

import numpy as np
import pytest
import torch
from launch import kill_script, logged, run_script
from transformers import AutoModel, ViTConfig, ViTModel

from samf import SamfImageProcessor, pretrain_encoder
from samf.phantoms.dataset import Finding, make_phantom, write_nifti
from samf.phantoms.labelled_slices import finding_masks, patch_labels, quarter_labels
from samf.pretraining.labels import label_weights

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
    """The patient's right is on the image's left; in coronal images the head is at the top."""
    processor = SamfImageProcessor(slices_per_plane=6, size=32, slab="mean")
    finding = Finding("Consolidation", lobe=lobe)
    masks = finding_masks(make_phantom(np.random.default_rng(3), findings=[finding]), processor, ["Consolidation"])
    labels = quarter_labels(masks)
    seen = {
        plane: {QUARTERS[quarter] for quarter in np.flatnonzero(labels[6 * number : 6 * number + 6].any(axis=0))}
        for number, plane in enumerate(("axial", "coronal"))
    }
    assert seen["axial"] and all(quarter.endswith(axial) for quarter in seen["axial"])
    assert coronal in seen["coronal"]
    assert all(quarter.endswith(coronal.split()[1]) for quarter in seen["coronal"])


def test_a_normal_chest_has_no_labels():
    processor = SamfImageProcessor(slices_per_plane=4, size=32)
    masks = finding_masks(make_phantom(np.random.default_rng(0), findings=[]), processor, ["Consolidation"])
    assert not masks.any() and not quarter_labels(masks).any() and not patch_labels(masks, 8).any()


def test_patch_labels_are_in_the_order_of_a_vits_patches():
    """A ViT whose patch embedding sums a patch's pixels has its largest tokens where the labels are."""
    masks = np.zeros((2, 2, 32, 32), dtype=bool)
    masks[0, 0, 3:6, 25:29] = masks[1, 1, 17:24, 9:12] = True
    config = ViTConfig(image_size=32, patch_size=8, num_channels=1, hidden_size=4, num_attention_heads=1)
    embeddings = ViTModel(config, add_pooling_layer=False).embeddings.patch_embeddings
    torch.nn.init.ones_(embeddings.projection.weight), torch.nn.init.zeros_(embeddings.projection.bias)
    labels = patch_labels(masks, 8)
    for finding in range(2):
        sums = embeddings(torch.from_numpy(masks[:, finding, None]).float())[..., 0]  # (S, P)
        np.testing.assert_array_equal(labels[:, :, finding], sums.detach().numpy() >= 3)


def test_a_constant_prediction_costs_the_same_for_rare_and_for_common_labels():
    shares = torch.tensor([0.5, 0.1, 0.01])
    labels = (torch.arange(1000)[:, None] < 1000 * shares).float()  # (N, L)
    constant = torch.logit(shares).expand_as(labels)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(constant, labels, reduction="none").mean(0)
    weights = label_weights(labels)
    torch.testing.assert_close(losses * weights, (losses * weights).mean().expand(3))
    assert weights.mean() == pytest.approx(1)


def test_a_run_on_labels_ends_in_an_encoder_folder(tmp_path):
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    options = sizes | {"slices_per_plane": 2, "train_patients": 4, "valid_patients": 4, "max_steps": 2}
    options |= {"output_dir": tmp_path, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    options |= {"objective": "labels", "patch_loss_weight": 1.0}
    pretrain_encoder.main([f"--{key}={value}" for key, value in options.items()])
    encoder, processor = AutoModel.from_pretrained(tmp_path), SamfImageProcessor.from_pretrained(tmp_path)
    assert (encoder.config.hidden_size, processor.size, processor.slices_per_plane) == (16, 32, 2)
    pixel_values = torch.zeros(1, len(processor.hu_windows), 32, 32)
    assert encoder.float()(pixel_values).last_hidden_state.shape == (1, 5, 16)

    options |= {"save_strategy": "steps", "save_steps": 2, "output_dir": tmp_path / "saved"}
    pretrain_encoder.main([f"--{key}={value}" for key, value in options.items()])
    options |= {"max_steps": 3, "resume_from_checkpoint": "last"}
    pretrain_encoder.main([f"--{key}={value}" for key, value in options.items()])
    state = json.loads((tmp_path / "saved" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 3 and (tmp_path / "saved" / "checkpoint-2").is_dir()


# ---- DINO, from the command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    """Write six small scans, of which two are held out."""
    folder = tmp_path_factory.mktemp("cts")
    for patient in range(6):
        phantom = make_phantom(np.random.default_rng(patient), voxel_mm=20.0)
        write_nifti(phantom, folder / f"train_{patient + 1}_a_1.nii.gz")
    return folder


def dino_options(cts, folder, **options) -> dict:
    """Four scans of 24 slices are six steps of 16 per epoch."""
    return {
        "data": cts,
        "slice_cache": cts.parent / f"{cts.name}_cache",
        "output_dir": folder,
        "valid_share": 0.34,
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "slices_per_plane": 8,
        "local_crops": 2,
        "local_crop_size": 16,
        "head_dim": 32,
        "head_hidden_dim": 16,
        "head_bottleneck_dim": 8,
        "attention_slices": 0,
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 0.04,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }


def test_a_dino_run_ends_in_an_encoder_folder_that_another_run_goes_on_from(tmp_path, cts):
    options = dino_options(cts, tmp_path / "first", max_steps=1, save_strategy="no")
    pretrain_encoder.main([f"--{key}={value}" for key, value in options.items()])
    (accuracy,) = logged(tmp_path / "first", "eval_knn_accuracy")
    assert 0 <= accuracy <= 1
    first = AutoModel.from_pretrained(tmp_path / "first")
    assert first.config.hidden_size == 16
    options = dino_options(cts, tmp_path / "second", max_steps=1, save_strategy="no", learning_rate=0.0)
    options |= {"encoder": tmp_path / "first", "image_size": 224, "hidden_size": 768}  # the folder's own sizes count
    pretrain_encoder.main([f"--{key}={value}" for key, value in options.items()])
    second = AutoModel.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(second.embeddings.cls_token, first.embeddings.cls_token)
    assert SamfImageProcessor.from_pretrained(tmp_path / "second").size == 32
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_are_one_at_equal_batch(tmp_path, cts):
    run_script("pretrain_encoder.py", 1, dino_options(cts, tmp_path / "one", save_strategy="no"))
    both = dino_options(cts, tmp_path / "two", save_strategy="no", per_device_train_batch_size=8)
    run_script("pretrain_encoder.py", 2, both)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 20
    np.testing.assert_allclose(one, two, atol=1e-4)
    (first,), (second,) = (logged(tmp_path / name, "eval_knn_accuracy") for name in ("one", "two"))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, cts, processes):
    """Killed after the checkpoint of step 8, in the middle of the second epoch of six steps."""
    sizes = {"per_device_train_batch_size": 16 // processes}
    run_script("pretrain_encoder.py", processes, dino_options(cts, tmp_path / "unbroken", **sizes))
    options = dino_options(cts, tmp_path / "killed", **sizes)
    kill_script("pretrain_encoder.py", processes, options, tmp_path / "killed" / "checkpoint-8" / "trainer_state.json")
    for late in (tmp_path / "killed").glob("checkpoint-[12]?"):
        shutil.rmtree(late)  # a fast machine wrote it before the kill
    run_script("pretrain_encoder.py", processes, options | {"resume_from_checkpoint": "last"})
    assert logged(tmp_path / "killed") == logged(tmp_path / "unbroken")
