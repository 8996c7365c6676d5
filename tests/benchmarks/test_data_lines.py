"""The synthetic copy of CT-RATE's tables that reading is measured on is one that the reader reads in full."""

import json

import numpy as np
import pytest
import torch

from samf.benchmarks import data_lines, remote_lines
from samf.benchmarks.workloads import Settings
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.ct_rate.tables import CT_RATE_LABELS, read_json_array


def test_the_copy_has_the_size_that_is_asked_for_and_every_kind_of_record(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("SAMF_TEST_DATA", raising=False)
    root = tmp_path / "CT-RATE"
    templates = data_lines.find_templates()
    data_lines.write_ct_rate_copy(root, 900, 300_000, templates)
    vqa = root / "vqa/train_vqa.json"
    assert 300_000 <= vqa.stat().st_size < 305_000
    entries = json.loads(vqa.read_text(encoding="utf-8"))
    assert entries == list(read_json_array(vqa))
    found = load_ct_rate(root, "train", on_missing="keep", finding_names=CT_RATE_LABELS, cache_dir=tmp_path)
    assert "left out" not in caplog.text
    assert found["task"][:900] == ["report"] * 900
    assert len(found) == 900 + sum(len(entry["conversations"]) // 2 for entry in entries)
    assert set(found["task"]) == {"report", "multiple_choice", "short_answer", "long_answer"}
    assert len(set(found["volume"][:900])) == 900
    reports = dict(zip(found["scan_id"][:900], found["answer"][:900], strict=True))
    assert len(reports) == 450  # two reconstructions of a scan have one report
    assert all(reports[row["scan_id"]] == row["answer"] for row in found.select(range(900)))
    assert all(len(labels) == 18 for labels in found["finding_labels"])


def test_both_stages_run(tmp_path):
    settings = Settings("tiny", torch.device("cpu"), torch.float32, 1.0, tmp_path)
    for stage in (data_lines.write_copy, data_lines.read_copy, data_lines.read_copy):
        assert all(figure.values[0] >= 0 for figure in stage(settings))


def test_real_rows_are_taken_where_they_are(test_data):
    templates = data_lines.find_templates(test_data / "reports")
    assert (len(templates.reports), len(templates.metadata)) == (200, 3039)


def test_padding_is_what_batches_hold_beside_their_records():
    lengths = np.array([4, 2, 3, 1, 5])
    assert data_lines.padding_share(lengths, 2) == 1 - 15 / (8 + 6 + 5)
    assert data_lines.padding_share(np.sort(lengths), 1) == 0


def test_sorting_leaves_less_padding_than_chance(test_data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMF_TEST_DATA", str(test_data))
    figures = data_lines.count_padding(Settings("tiny", torch.device("cpu"), torch.float32, 1.0, tmp_path))
    random, by_step, by_length = (figure.values[0] for figure in figures)
    assert 100 > random > by_step > by_length > 0


@pytest.mark.slow
def test_a_start_from_a_table_on_the_hub_reads_every_row(tmp_path, monkeypatch):
    monkeypatch.delenv("SAMF_TEST_DATA", raising=False)
    monkeypatch.setattr(remote_lines, "_REPEATS", 1)
    settings = Settings("tiny", torch.device("cpu"), torch.float32, 1.0, tmp_path)
    figures = [figure for stage in remote_lines.STAGES.values() for figure in stage(settings)]
    assert sum("200 records" in figure.note for figure in figures) == 3
