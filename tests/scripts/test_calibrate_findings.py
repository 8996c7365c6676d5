"""calibrate_findings.py on a few phantoms and a tiny model: what it writes, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import model_for, tiny_processor

from samf import SamfForConditionalGeneration
from samf.data.loading import load_records
from samf.evaluation.finding_scaling import HeldOut, fit_scaling
from samf.model.pipeline_samf import SamfReportPipeline
from samf.phantoms.dataset import PhantomSettings, write_dataset
from samf.scripts.calibrate_findings import main

NAMES = ["Cardiomegaly", "Pleural effusion"]
STATEMENTS = {"Cardiomegaly": ["Heart size is increased.", "Heart size is normal."]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("phantoms")
    options = {"text_questions": 1, "workers": 1, "progress": False}
    write_dataset(folder, train_patients=0, valid_patients=8, settings=PhantomSettings(voxel_mm=12.0), **options)
    return str(folder)


@pytest.fixture
def model(tmp_path) -> str:
    processor = tiny_processor()
    model_for(processor, finding_names=NAMES).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_the_calibration_is_that_of_the_pipelines_logits_and_labels(model, data, tmp_path, capsys):
    before = config_of(tmp_path / "model")
    assert main([model, "--data", data, "--folds", "4", "--slice_cache", str(tmp_path / "cache")]) == 0
    after = config_of(tmp_path / "model")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"finding_temperature", "finding_bias"}

    records = load_records(data, "valid", tasks=("report",), finding_names=NAMES)
    loaded = SamfForConditionalGeneration.from_pretrained(model)
    reporter = SamfReportPipeline(model=loaded, processor=tiny_processor(), device=torch.device("cpu"))
    logits = [reporter.finding_logits(reporter.encode(path)) for path in records["volume"]]
    held_out = HeldOut(
        tuple(NAMES), np.array(logits), np.array(records["finding_labels"][:]), tuple(records["patient_id"])
    )
    expected = fit_scaling(held_out, "platt")
    np.testing.assert_allclose(loaded.config.finding_temperature, expected.temperature, rtol=1e-3)
    np.testing.assert_allclose(loaded.config.finding_bias, expected.bias, atol=1e-3)

    report = json.loads((tmp_path / "model" / "calibration.json").read_text(encoding="utf-8"))
    assert (
        report["patients"] == report["scans"] == 8 and report["after"]["n"] == 16 and list(report["findings"]) == NAMES
    )
    assert "not for diagnosis" in report["disclaimer"] and str(tmp_path) not in json.dumps(report)
    assert (tmp_path / "model" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "Cardiomegaly, platt" in capsys.readouterr().out


def test_a_copy_leaves_the_model_as_it_is_and_a_second_run_starts_from_unscaled_logits(model, data, tmp_path):
    before = config_of(tmp_path / "model")
    (tmp_path / "model" / "calibration_samf.py").unlink()  # a folder of an earlier version
    options = [model, "--data", data, "--folds", "2", "--scaling", "temperature"]
    assert main([*options, "--output", str(tmp_path / "copy")]) == 0
    assert config_of(tmp_path / "model") == before
    assert (tmp_path / "copy" / "calibration_samf.py").is_file(), "code that applies the calibration"
    first = config_of(tmp_path / "copy")["finding_temperature"]
    assert len(set(first)) == 1 and config_of(tmp_path / "copy")["finding_bias"] is None
    assert main([str(tmp_path / "copy"), *options[1:]]) == 0
    assert config_of(tmp_path / "copy")["finding_temperature"] == pytest.approx(first)
    assert SamfForConditionalGeneration.from_pretrained(tmp_path / "copy").config.finding_temperature == pytest.approx(
        first
    )


def test_a_model_without_a_head_is_calibrated_by_its_statements(data, tmp_path):
    processor = tiny_processor()
    model_for(processor).save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    (tmp_path / "statements.json").write_text(json.dumps(STATEMENTS), encoding="utf-8")
    options = [str(tmp_path / "plain"), "--data", data, "--folds", "2"]
    assert main(options) == 2, "neither a head nor statements"
    with_limit = SamfForConditionalGeneration.from_pretrained(tmp_path / "plain")
    with_limit.generation_config.max_new_tokens = 6  # of the report before the statements
    with_limit.save_pretrained(tmp_path / "plain")
    assert main([*options, "--statements", str(tmp_path / "statements.json")]) == 0
    config = SamfForConditionalGeneration.from_pretrained(tmp_path / "plain").config
    assert config.finding_statements == STATEMENTS and len(config.finding_temperature) == 1
    assert json.loads((tmp_path / "plain" / "calibration.json").read_text())["source"] == "statements"


def test_what_cannot_be_calibrated_is_one_line(model, data, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(model, adapter)
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    cases = {
        "someone/model": "--output",
        str(adapter): "is an adapter",
    }
    for name, message in cases.items():
        assert main([name, "--data", data]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1
    assert main([model, "--data", data, "--folds", "9"]) == 2 and "9 folds of 8 patients" in capsys.readouterr().err
    assert main([model, "--data", data, "--split", "train"]) == 2
