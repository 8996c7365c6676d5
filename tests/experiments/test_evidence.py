"""The evidence experiment: its scores against masks and likelihoods that are known, and that it resumes."""

import json

import numpy as np
import pytest
import torch
from tiny import model_for, tiny_processor

from samf import SamfImageProcessor
from samf.experiments import evidence
from samf.experiments.evidence import Run, finding_rows, seen_runs, write_tables
from samf.experiments.evidence_scores import Case, MaskScorer, order_effects, weights_point
from samf.model.ct_volume import CTVolume
from samf.model.evidence_samf import Evidence
from samf.model.explain_samf import ScanImages
from samf.phantoms.dataset import PhantomSettings, write_dataset

AFFINE = np.array([[2.0, 0, 0, -40], [0, 3.0, 0, -45], [0, 0, 4.0, -48], [0, 0, 0, 1]])


def water_cube():
    """A body of water with air around it, and a mask of one voxel."""
    hu = np.full((40, 30, 24), -1000, dtype=np.int16)
    hu[10:30, 8:22, 6:18] = 0
    mask = np.zeros(hu.shape, dtype=bool)
    mask[15, 10, 8] = True
    return CTVolume(hu, (2.0, 3.0, 4.0), AFFINE, "cube"), mask


def test_points_are_scored_by_their_distance_in_mm():
    volume, mask = water_cube()
    scorer = MaskScorer(mask, volume, 9.0)
    assert scorer.distance_of((-10, -15, -16)) == pytest.approx(0, abs=1e-6)
    assert scorer.distance_of((-10 + 8, -15 + 6, -16)) == pytest.approx(10, abs=1e-6)
    x, y, z = np.meshgrid(np.arange(10, 30), np.arange(8, 22), np.arange(6, 18), indexing="ij")
    near = ((x - 15) * 2.0) ** 2 + ((y - 10) * 3.0) ** 2 + ((z - 8) * 4.0) ** 2 <= 81
    assert scorer.chance() == pytest.approx(near.mean())


@pytest.mark.parametrize("slab", ["none", "mean"])
def test_the_slices_that_show_a_finding_are_those_next_to_it(slab):
    volume, mask = water_cube()
    processor = SamfImageProcessor(slices_per_plane=(6, 10, 8), size=16, slab=slab)
    images = ScanImages.of(volume, processor.extract(volume), processor)
    mask = np.roll(mask, 1, axis=2)  # to 15, 10, 9: not halfway between slices
    shown = np.flatnonzero(MaskScorer(mask, volume, 9.0).slices_shown(images))
    assert shown.tolist() == [9 * 6 // 24, 6 + 10 * 10 // 30, 16 + 15 * 8 // 40]


def test_the_weights_point_is_where_the_heaviest_slices_cross():
    volume, _ = water_cube()
    processor = SamfImageProcessor(slices_per_plane=8, size=16)
    images = ScanImages.of(volume, processor.extract(volume), processor)
    alpha = np.full(24, 0.01)
    alpha[[2, 8 + 5, 16 + 6]] = 0.3

    def point(weights):
        return weights_point(images, Evidence("", "", (), weights, (), (), (), ()))

    found = point({"alpha": tuple(alpha)})
    expected = [images.mm[22], images.mm[13], images.mm[2]]
    assert np.abs(found - expected).max() < 6, "a cell"
    np.testing.assert_allclose(point({}), [-1, -1.5, -2])


def test_deletion_and_insertion_of_a_sum_are_those_of_its_parts():
    """A log-likelihood that adds over slices, by plain loops."""
    values = torch.tensor([5.0, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0.0])

    def likelihood(slices, keep):
        return torch.stack([torch.zeros(len(keep)), (keep * values).sum(1)], dim=1)

    found = order_effects(likelihood, torch.zeros(8, 2), values.tolist(), 1, seed=0)
    ranked = sorted(values.tolist(), reverse=True)
    deleted = np.mean([sum(ranked[number:]) for number in range(9)])
    inserted = np.mean([sum(ranked[:number]) for number in range(9)])
    assert found["insertion"] - found["deletion"] == pytest.approx(inserted - deleted, abs=1e-5)
    assert found["deletion"] < 0 < found["insertion"]
    useless = order_effects(lambda s, keep: torch.zeros(len(keep), 1), torch.zeros(8, 2), values.tolist(), 0, seed=0)
    assert useless == {"deletion": 0, "insertion": 0}


def case(finding, hit, head, patient=1):
    scores = {"chance": 0.1, "weights": False, "shuffled": False, "slice_hit": hit, "slice_chance": 0.5}
    return Case(
        finding=finding,
        patient=patient,
        head=head,
        log_probability=-1.0,
        distance_mm=3.0,
        hit=hit,
        deletion=-1.0,
        insertion=1.0,
        **scores,
    )


def test_tables_average_over_cases_then_findings_then_models(tmp_path):
    first = [case("Emphysema", True, 0.9), case("Emphysema", False, 0.2), case("Lung nodule", False, 0.1)]
    second = [case("Emphysema", True, 0.9), case("Lung nodule", False, 0.8)]
    runs = [Run(model="a", data="a", cases=first), Run(model="b", data="b", cases=second)]
    rows = {row[0]: row[1:] for row in finding_rows(runs)}
    assert rows["Emphysema"][:2] == ["3", "0.75 ± 0.35"] and rows["Lung nodule"][:2] == ["2", "0.00 ± 0.00"]
    assert rows["mean over findings"][:2] == ["5", "0.38 ± 0.18"]
    assert [len(run["cases"]) for run in seen_runs(runs)] == [1, 2]
    text = write_tables(tmp_path, runs, 15.0)
    assert "| Emphysema | 3 |" in text and (tmp_path / "evidence.md").read_text(encoding="utf-8") == text + "\n"
    assert json.loads((tmp_path / "evidence.json").read_text())[1]["cases"] == second


def test_it_runs_on_phantoms_and_resumes(tmp_path, monkeypatch, capsys):
    data, folder = tmp_path / "phantoms", tmp_path / "model"
    write_dataset(
        data, train_patients=1, valid_patients=3, settings=PhantomSettings(voxel_mm=14.0), text_questions=8, workers=1
    )
    processor = tiny_processor(slices_per_plane=3)
    model_for(processor, finding_names=["Emphysema", "Cardiomegaly"]).save_pretrained(folder)
    processor.save_pretrained(folder)
    options = ["--model", str(folder), "--data", str(data), "--output", str(tmp_path / "out"), "--patients", "2"]
    evidence.main(options)
    first = capsys.readouterr().out
    (run,) = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert {found["patient"] for found in run["cases"]} <= {1, 2} and "mean over findings" in first
    assert all(0 <= found["chance"] < 0.6 for found in run["cases"])
    monkeypatch.setattr(evidence, "PhantomRun", lambda *args: pytest.fail("all phantoms are finished"))
    evidence.main(options)
    assert "mean over findings" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another --output"):
        evidence.main([*options, "--margin_mm", "20"])
