"""The demo model that comes with the package, and the command that makes it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import model_for, tiny_processor

from samf import SamfForConditionalGeneration, SamfProcessor
from samf.experiments.demo import STAGES
from samf.model.model_card import is_generated
from samf.phantoms.findings import DEMO_FINDINGS
from samf.phantoms.single import write_phantom
from samf.scripts import make_demo_model as script
from samf.utils.packaged import DEMO_MODEL, RECIPES


def results(value: float) -> dict:
    findings = {"macro": {"f1": value}, "per_finding": {name: {"f1": value} for name in DEMO_FINDINGS}}
    report = {"findings": findings, "text": {"bleu_4": None}}
    return {"tasks": {"report": report, "multiple_choice": {"multiple_choice": {"accuracy": value}}}}


@pytest.fixture
def run(tmp_path) -> Path:
    """What the demo leaves, with two held-out phantoms and random weights."""
    folder, processor = tmp_path / "run", tiny_processor()
    model_for(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for steps, name in enumerate([*STAGES[:-1], "model"]):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "trainer_state.json").write_text(json.dumps({"global_step": steps}))
    for name, value in (("own", 0.75), ("shuffled", 0.25)):
        (folder / f"evaluation_{name}").mkdir()
        (folder / f"evaluation_{name}" / "results.json").write_text(json.dumps(results(value)))
    for seed in range(2):
        patient = folder / "phantoms" / "dataset" / "valid_fixed" / f"valid_{seed}"
        write_phantom(patient / f"valid_{seed}_a_1.nii.gz", seed, voxel_mm=10.0)
    (folder / "phantoms" / "dataset" / "train_fixed" / "train_1").mkdir(parents=True)
    (folder / "phantoms" / "phantom.json").write_text('{"seed": 3}')
    return folder


def stored_types(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize(("changed", "stored"), [(False, "F16"), (True, "F32")])
def test_the_folder_loads_without_code_and_says_what_it_knows(run, changed, stored, tmp_path, monkeypatch):
    """Half precision only where it changes no report."""
    texts = iter([["a", "b"], ["a", "c" if changed else "b"]])
    monkeypatch.setattr(script, "_reports", lambda *_: next(texts))
    output = tmp_path / "demo_model"
    script.main(["--from", str(run), "--output", str(output)])
    assert stored_types(output) == {stored}
    model, processor = SamfForConditionalGeneration.from_pretrained(output), SamfProcessor.from_pretrained(output)
    assert model.config.caution == script.CAUTION and processor.tokenizer.vocab_size
    check_folder(output)
    card = (output / "README.md").read_text(encoding="utf-8")
    for text in (
        "| reports: findings, macro-F1 | 0.75 |",
        "another patient's volume | 0.25 |",
        "| Seed | 3 |",
        "1_aggregator 0",
    ):
        assert text in card


def check_folder(folder: Path) -> None:
    assert not list(folder.glob("*.py")) and not list(folder.glob(".*"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= script.MAX_BYTES
    assert not any(
        key in file.read_text() for file in folder.glob("*.json") for key in ("auto_map", "custom_pipelines")
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert is_generated(card) and script.CAUTION in card and "not for diagnosis" in card


def test_reports_are_those_of_the_pipeline_in_float32(run):
    scans = sorted(run.rglob("*.nii.gz"))
    first = script._reports(run / "model", SamfProcessor.from_pretrained(run / "model"), scans)
    assert len(first) == 2 and first == script._reports(
        run / "model", SamfProcessor.from_pretrained(run / "model"), scans
    )


def test_an_unfinished_run_is_one_line_that_names_what_is_missing(run, tmp_path):
    (run / "evaluation_own" / "results.json").unlink()
    with pytest.raises(SystemExit, match="evaluation_own/results.json: missing"):
        script.main(["--from", str(run), "--output", str(tmp_path / "demo_model")])
    assert not (tmp_path / "demo_model").exists()


def test_the_packages_own_demo_model():
    check_folder(DEMO_MODEL)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["caution"] == script.CAUTION and config["finding_names"] == list(DEMO_FINDINGS)
    card = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
    for stage in STAGES:
        assert f"recipes/demo/{stage}.yaml" in card and (RECIPES / "demo" / f"{stage}.yaml").is_file()
    model = SamfForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
