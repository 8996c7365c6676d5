"""The evidence sheet: what is hot in the data is hot in the picture, and nothing is drawn without evidence."""

import dataclasses

import numpy as np
import pytest
from matplotlib.image import imread

from samf.model.evidence_samf import Evidence, Place, SentenceEvidence, SliceHeat
from samf.model.report_samf import Provenance, Report, Sentence
from samf.reporting.evidence_sheet import save_evidence_sheet


def report_with(heat):
    """Two sentences on three grey slices; `heat` (3, 32, 32) is the first one's."""
    images = np.full((3, 2, 32, 32), 90, dtype=np.uint8)
    place = Place((1.0, 2.0, 3.0), (-1.0, -2.0, 3.0), (0, 0, 0), (0, 0, 0))
    sentences = []
    for number, (own, peak) in enumerate([(heat, place), (np.zeros_like(heat), None)]):
        shown = SliceHeat(
            np.arange(3), ("axial", "coronal", "sagittal"), np.zeros(3), np.full((3, 2), 2.0), images, own
        )
        text = f"Sentence {number} is here."
        sentences.append(SentenceEvidence(text, -1.0, None, (0.0,) * 3, (), peak, own.mean(axis=0)[None], shown))
    affine = tuple(map(tuple, np.eye(4).tolist()))
    evidence = Evidence("occlusion", "windows", tuple(sentences), {}, (1, 32, 32), affine, (1, 32, 32), affine)
    made = Provenance("scan", (1, 32, 32), (1.0, 1.0, 1.0), "RAS", "", "")
    texts = tuple(Sentence(sentence.text, 0, 1) for sentence in sentences)
    return Report("Sentence 0 is here. Sentence 1 is here.", "?", texts, made, evidence=evidence)


def reds(path):
    """Where the picture is redder than blue by far: hot, since all else is grey, white or yellowish letters."""
    picture = imread(path)
    return (picture[..., 0] - picture[..., 2] > 0.25) & (picture[..., 1] < 0.7)


def test_heat_is_drawn_where_it_is(tmp_path):
    heat = np.zeros((3, 32, 32), dtype=np.float32)
    cold = reds(save_evidence_sheet(report_with(heat), tmp_path / "cold.png"))
    heat[1, 20:28, 4:12] = 0.8  # lower left of the middle image
    hot = reds(save_evidence_sheet(report_with(heat), tmp_path / "hot.png"))
    assert hot.shape == cold.shape
    rows, columns = np.nonzero(hot & ~cold)
    assert len(rows) > 500
    width = hot.shape[1] / 3
    assert width < columns.min() and columns.max() < 1.5 * width, "left half of the second of three"
    assert rows.max() < hot.shape[0] / 2, "the row of the first sentence"


def test_a_report_without_images_is_refused(tmp_path):
    report = report_with(np.zeros((3, 32, 32), dtype=np.float32))
    read = Report.from_json(report.to_json())
    for without in (read, dataclasses.replace(report, evidence=None)):
        with pytest.raises(ValueError, match="no evidence with images"):
            save_evidence_sheet(without, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
